"""Many clients at once against `nrt-jax serve`, good ones and bad ones.

    .venv/bin/python benchmarks/serve_soak.py runs/quickstart/nrt --requests 2000

Starts a server for the run, and sends requests of random lengths from several clients: completions
and chats, whole and streamed, greedy and with seeds; some clients vanish, some send bodies that are
broken or prompts that are too long. Every answer is compared with what the same engine writes when
it is asked for one sequence at a time. At the end the server's memory (VmRSS) and its slots must be
as they were, and SIGTERM must end it with status 0. Prints the figures as JSON; the exit status is
1 when something is wrong.
"""

import argparse
import contextlib
import http.client
import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from nrt_jax.config.load import load_config
from nrt_jax.config.serving import ServingConfig
from nrt_jax.data.detokenizer import decode_after
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.serving.served_model import ServedModel, open_served

PATIENCE_S = 120.0
KINDS = {
    "completion": 34,
    "completion stream": 24,
    "chat": 10,
    "chat stream": 6,
    "vanish": 7,
    "vanish stream": 7,
    "malformed": 6,
    "too long": 6,
}
"""What clients do, and how often, in percent."""
MALFORMED = (
    b"",
    b'{"model": ',
    b"\xff\xfe\x00",
    b"[1, 2]",
    b'{"model": "NAME"}',
    b'{"model": "NAME", "prompt": "1", "temperature": NaN}',
    b'{"model": "NAME", "prompt": "1", "max_tokens": -3}',
    b'{"model": "NAME", "prompt": "1", "tempratur": 1}',
    b'{"model": "NAME", "prompt": "1", "logit_bias": {"5": 3}}',
    b'{"model": "NAME", "prompt": [[1], ["a"]]}',
)


class Asked(NamedTuple):
    """One question of the pool, with the answer it must get."""

    path: str
    body: dict[str, Any]
    texts: tuple[tuple[str, str, str], ...]
    """Trace, text and finish of each choice."""


# --- the server ----------------------------------------------------------------------------------


@dataclass
class Server:
    """A server process."""

    process: subprocess.Popen
    port: int

    def connect(self) -> http.client.HTTPConnection:
        """A connection of one client."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def post(self, path: str, body: bytes) -> tuple[int, str]:
        """Status and text of the answer."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("POST", path, body)
            response = connection.getresponse()
            return response.status, response.read().decode("utf-8")

    def metrics(self) -> dict[str, float]:
        """The figures without labels."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode("utf-8").splitlines()
        rows = (line.split(" ") for line in lines if line and line[0] != "#" and "{" not in line)
        return {name: float(value) for name, value in rows}

    def rss_mb(self) -> float:
        """Resident memory of the process."""
        status = Path(f"/proc/{self.process.pid}/status").read_text("ascii")
        (line,) = [line for line in status.splitlines() if line.startswith("VmRSS:")]
        return int(line.split()[1]) / 1024


@contextlib.contextmanager
def serving(run: Path, overrides: list[str]) -> Iterator[Server]:
    """A server on a free port; it is killed when the block is left and it still runs."""
    command = [sys.executable, "-m", "nrt_jax", "serve", str(run), "port=0", "grpc_port=null"]
    process = subprocess.Popen([*command, *overrides], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit("the server did not start")
        yield Server(process, int(line.rsplit(":", 1)[1]))
    finally:
        process.kill()
        process.wait()


# --- questions with their answers ----------------------------------------------------------------


@dataclass
class Pool:
    """Questions of random lengths, answered one sequence at a time by an engine of our own."""

    served: ServedModel
    config: ServingConfig
    random: random.Random

    def __post_init__(self) -> None:
        self._engine = self.served.engine(self.config.slots, self.config.top_logprobs)
        special = self.served.tokenizer.special_ids
        size = self.served.tokenizer.vocab_size
        self._ordinary = [token for token in range(size) if token not in special]

    def questions(self, count: int) -> list[Asked]:
        """Two completions for every chat."""
        return [self._chat() if i % 3 == 2 else self._completion() for i in range(count)]

    def _completion(self) -> Asked:
        limits, n = self.served.limits, self.random.choice([1, 1, 1, 2, 3])
        limit = self.random.randint(1, limits.new)
        tokens = self.random.choices(
            self._ordinary, k=self.random.randint(1, limits.context - limit)
        )
        sampling = self._sampling()
        body = {"prompt": tokens, "max_tokens": limit, "n": n, **sampling}
        written = self._write(tokens, limit, 0, n, sampling)
        texts = tuple(("", text, finish) for text, finish, _ in written)
        return Asked("/v1/completions", self._named(body), texts)

    def _chat(self) -> Asked:
        limits, tokenizer, sampling = self.served.limits, self.served.tokenizer, self._sampling()
        while True:
            count = self.random.randint(1, limits.prompt)
            question = tokenizer.decode(self.random.choices(self._ordinary, k=count))
            messages = [{"role": "user", "content": question}]
            with contextlib.suppress(ValueError):  # blank, or of other tokens than it is made of
                x = self.served.chat_prompt(messages).tolist()
                if len(x) <= limits.prompt:
                    break
        body = self._named({"messages": messages, **sampling})
        if not self.served.reasons:
            ((text, finish, _),) = self._write(x, limits.new, 0, 1, sampling)
            return Asked("/v1/chat/completions", body, (("", text, finish),))
        opened = [*x, tokenizer.think_start_id]
        ((trace, end, ids),) = self._write(opened, limits.trace, 0, 1, sampling)
        closed = [*opened, *ids, tokenizer.think_end_id]
        rest = limits.new - 2 - len(ids) - (end == "stop")
        ((text, finish, _),) = self._write(closed, rest, 1, 1, sampling)
        return Asked("/v1/chat/completions", body, ((trace, text, finish),))

    def _sampling(self) -> dict[str, Any]:
        if self.random.random() < 0.5:
            return {"temperature": 0, "seed": 0}
        top_p = self.random.choice([1.0, 0.9])
        return {"temperature": 1.0, "top_p": top_p, "seed": self.random.randrange(2**31)}

    def _named(self, body: dict[str, Any]) -> dict[str, Any]:
        return {"model": self.served.name, **body}

    def _write(
        self, tokens: list[int], limit: int, stream: int, n: int, sampling: dict[str, Any]
    ) -> list[tuple[str, str, list[int]]]:
        """Text, finish and ids of each copy."""
        settings = {name: value for name, value in sampling.items() if name != "seed"}
        request = Request(np.array(tokens, np.int32), stream, n, limit, Sampling(**settings))
        key = jax.random.key(sampling["seed"])
        params, steps = self.served.opened.params, self.config.decode_steps
        (traces,) = generate(self._engine, params, [request], key, steps=steps)
        return [
            (
                decode_after(self.served.tokenizer, tokens, trace.tokens),
                "length" if trace.end_token is None else "stop",
                trace.tokens.tolist(),
            )
            for trace in traces
        ]


# --- clients -------------------------------------------------------------------------------------


@dataclass
class Soak:
    """What the clients send, and what went wrong."""

    server: Server
    served: ServedModel
    pool: list[Asked]
    wrong: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._lock = threading.Lock()

    def run(self, requests: int, clients: int, seed: int) -> None:
        """Send them all; memory is read ten times on the way, and after the last."""
        every = max(1, requests // 10)
        with ThreadPoolExecutor(clients) as pool:
            for done, _ in enumerate(pool.map(self._one, range(requests), [seed] * requests)):
                if done % every == every - 1:
                    self.memory.append(self.server.rss_mb())

    def _one(self, number: int, seed: int) -> None:
        rng = random.Random(seed * 1_000_003 + number)
        (kind,) = rng.choices(list(KINDS), KINDS.values())
        begun = time.monotonic()
        try:
            reason = self._do(kind, rng)
        except Exception as error:  # a request that is lost must not take the figures with it
            reason = f"{type(error).__name__}: {error}"
        with self._lock:
            self.counts[kind] += 1
            if "vanish" not in kind:
                self.seconds.append(time.monotonic() - begun)
            if reason:
                self.wrong.append(f"request {number} ({kind}): {reason}")

    def _do(self, kind: str, rng: random.Random) -> str | None:
        """Send one request; what is wrong with its answer, if anything."""
        if kind == "malformed":
            name = self.served.name.encode()
            return self._expect(400, rng.choice(MALFORMED).replace(b"NAME", name))
        if kind == "too long":
            tokens = [1] * (self.served.limits.context + rng.randint(1, 1000))
            body = {"model": self.served.name, "prompt": [[1], tokens], "max_tokens": 1}
            return self._expect(
                400, json.dumps(body).encode(), f"prompt 1 has {len(tokens)} tokens"
            )
        chats = [asked for asked in self.pool if "chat" in asked.path]
        rest = [asked for asked in self.pool if "chat" not in asked.path]
        asked = rng.choice(chats if "chat" in kind else rest)
        body = json.dumps(asked.body | {"stream": "stream" in kind}).encode()
        if "vanish" in kind:
            return self._vanish(asked.path, body, rng)
        status, text = self.server.post(asked.path, body)
        if status != 200:
            return f"status {status}: {text[:200]}"
        got = _choices_of_stream(text) if "stream" in kind else _choices(json.loads(text))
        return None if got == asked.texts else f"got {got}, expected {asked.texts}"

    def _expect(self, status: int, body: bytes, said: str = "") -> str | None:
        got, text = self.server.post("/v1/completions", body)
        return None if (got, said in text) == (status, True) else f"status {got}: {text[:200]}"

    def _vanish(self, path: str, body: bytes, rng: random.Random) -> None:
        connection = self.server.connect()
        connection.request("POST", path, body)
        if rng.random() < 0.5:
            time.sleep(rng.random() * 0.05)
        else:
            connection.getresponse().read(rng.randint(1, 200))
        connection.close()


def _choices(answer: dict[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """Trace, text and finish of each choice of a whole answer."""
    rows = []
    for choice in answer["choices"]:
        message = choice.get("message", {})
        text = message.get("content", choice.get("text"))
        rows.append((message.get("reasoning_content", ""), text, choice["finish_reason"]))
    return tuple(rows)


def _choices_of_stream(text: str) -> tuple[tuple[str, str, str], ...]:
    """The same of a stream, its chunks joined."""
    *events, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", ""), text[-300:]
    rows: dict[int, list[str]] = {}
    for event in events:
        for choice in json.loads(event.removeprefix("data: "))["choices"]:
            row, delta = rows.setdefault(choice["index"], ["", "", ""]), choice.get("delta", {})
            row[0] += delta.get("reasoning_content", "")
            row[1] += delta.get("content", choice.get("text", ""))
            row[2] += choice["finish_reason"] or ""
    return tuple((trace, text, finish) for _, (trace, text, finish) in sorted(rows.items()))


# --- the end -------------------------------------------------------------------------------------


def settle(server: Server) -> dict[str, float]:
    """The metrics when nothing is in work any more, or after a while."""
    deadline = time.monotonic() + 30
    names = ("nrt_slots_in_use", "nrt_requests_running", "nrt_requests_waiting")
    while any((metrics := server.metrics())[name] for name in names):
        if time.monotonic() > deadline:
            break
        time.sleep(0.1)
    return metrics


def stop(server: Server) -> int:
    """The status with which SIGTERM ends the server."""
    server.process.send_signal(signal.SIGTERM)
    return server.process.wait(PATIENCE_S)


def check(soak: Soak, metrics: dict[str, float], status: int, growth_mb: float) -> list[str]:
    """What is wrong, a line each."""
    wrong = list(soak.wrong)
    for name in ("nrt_slots_in_use", "nrt_requests_running", "nrt_requests_waiting"):
        if metrics[name]:
            wrong.append(f"{name} is {metrics[name]:g} at the end")
    if metrics["nrt_engine_errors_total"]:
        wrong.append(f"the engine failed {metrics['nrt_engine_errors_total']:g} times")
    # The first half compiles for the lengths that come, and fills the allocator's pools.
    grown = soak.memory[-1] - soak.memory[len(soak.memory) // 2]
    if grown > growth_mb:
        wrong.append(f"memory grew by {grown:.1f} MB in the second half: {soak.memory}")
    if status:
        wrong.append(f"SIGTERM ended the server with status {status}")
    return wrong


def main(argv: list[str] | None = None) -> int:
    """Run the soak; 0 when nothing was wrong."""
    parser = argparse.ArgumentParser(description="Many clients against nrt-jax serve.")
    parser.add_argument("run", type=Path, metavar="RUN_OR_CHECKPOINT")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--questions", type=int, default=150, help="different ones")
    parser.add_argument("--growth-mb", type=float, default=24.0, help="allowed in the second half")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("overrides", nargs="*", metavar="FIELD=VALUE", help="of the server")
    args = parser.parse_intermixed_args(argv)
    config = load_config(ServingConfig, [], args.overrides)
    served = open_served(args.run, config)
    questions = Pool(served, config, random.Random(args.seed)).questions(args.questions)
    with serving(args.run, args.overrides) as server:
        soak = Soak(server, served, questions)
        begun = time.monotonic()
        soak.run(args.requests, args.clients, args.seed)
        elapsed = time.monotonic() - begun
        metrics = settle(server)
        soak.memory.append(server.rss_mb())
        status = stop(server)
    wrong = check(soak, metrics, status, args.growth_mb)
    latencies = np.percentile(soak.seconds, [50, 99])
    print(
        json.dumps(
            {
                "requests": args.requests,
                "by_kind": dict(soak.counts),
                "seconds": round(elapsed, 1),
                "requests_per_second": round(args.requests / elapsed, 1),
                "tokens_per_second": round(metrics["nrt_generated_tokens_total"] / elapsed),
                "latency_p50_s": round(float(latencies[0]), 3),
                "latency_p99_s": round(float(latencies[1]), 3),
                "rss_mb": [round(value, 1) for value in soak.memory],
                "slots_in_use_at_the_end": metrics["nrt_slots_in_use"],
                "exit_status": status,
                "wrong": len(wrong),
            },
            indent=1,
        )
    )
    for line in wrong[:20]:
        print(line, file=sys.stderr)
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
