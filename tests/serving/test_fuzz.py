"""Thousands of generated requests: no mistake of ours, no lost request, flat memory.

HTTP requests are generated from the server's own /openapi.json, and from what its fields are not;
gRPC calls from the fields of the protocol. Both go to a server process.
"""

import contextlib
import functools
import http.client
import json
import re
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from nrt_jax.serving.request_fields import ChatRequest, CompletionRequest
from tests.serving.runs import write_run
from tests.serving.test_serve import serving

pytestmark = pytest.mark.slow

CALLS = 5_000
"""Of the HTTP interface, together."""
WARM_CALLS = 2_000
"""After which all programs are compiled, and memory may not grow."""
GROWTH_MB = 48
SECONDS = 600
"""After which no further request is generated."""
KEY = "fuzz-key"
OURS = {200, 400, 401, 404, 413, 429}
"""Statuses of a server that is neither overloaded nor broken."""
SETTINGS = ("slots=4", "decode_steps=8", "max_sequences=4", "max_body_bytes=65536", "grpc_port=0")


@dataclass
class Target:
    """The server process and what was seen of it."""

    pid: int
    port: int
    grpc_port: int
    calls: int = 0
    statuses: Counter[str] = field(default_factory=Counter)
    memory_mb: list[tuple[int, float]] = field(default_factory=list)
    began: float = field(default_factory=time.monotonic)

    @property
    def late(self) -> bool:
        return time.monotonic() - self.began > SECONDS

    def ask(self, method: str, path: str, body: bytes | None = None) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            return answer.status, answer.read()

    def count(self, status: object) -> None:
        self.calls += 1
        self.statuses[str(status)] += 1
        if self.calls % 250 == 0:
            text = Path(f"/proc/{self.pid}/status").read_text("ascii")
            self.memory_mb.append((self.calls, int(re.findall(r"VmRSS:\s+(\d+)", text)[0]) / 1024))

    def metric(self, name: str) -> float:
        _, text = self.ask("GET", "/metrics")
        return float(re.findall(rf"^{name} (\S+)$", text.decode(), re.M)[0])


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> Iterator[Target]:
    """Ends with the checks that hold after any requests."""
    folder = tmp_path_factory.mktemp("fuzz")
    key_file = folder / "keys"
    key_file.write_text(KEY)
    key_file.chmod(0o600)
    words = (*SETTINGS, f"api_key_file={key_file}")
    with serving(write_run(folder), folder, *words) as (process, port, also):
        found = Target(process.process.pid, port, int(also.rpartition(":")[2]))
        yield found
        for name in ("requests_running", "requests_waiting", "slots_in_use", "sequences_waiting"):
            assert found.metric(f"nrt_{name}") == 0
        assert found.metric("nrt_engine_errors_total") == 0
        process.signal(signal.SIGTERM)
        outcome = process.end()
        assert outcome.status == 0
        assert "Traceback" not in outcome.err
        assert KEY not in outcome.err + outcome.out


def fuzz(strategy: st.SearchStrategy, examples: int) -> Callable:
    """Call the function with that many examples, the same in every run."""

    def decorate(function: Callable[[Any], None]) -> Callable[[], None]:
        return settings(
            max_examples=examples,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )(given(strategy)(function))

    return decorate


# --- HTTP -----------------------------------------------------------------------------------------

POSTS = ("/v1/completions", "/v1/chat/completions")
SCHEMA_CALLS = CALLS // 8
BODY_CALLS = CALLS - SCHEMA_CALLS


def test_requests_of_the_document(target):
    schemathesis = pytest.importorskip("schemathesis")
    checks = schemathesis.checks
    from schemathesis.specs.openapi import checks as openapi_checks

    status, text = target.ask("GET", "/openapi.json")
    assert status == 200
    schema = schemathesis.openapi.from_dict(json.loads(text))
    wanted = [
        checks.not_a_server_error,
        openapi_checks.status_code_conformance,
        openapi_checks.content_type_conformance,
        openapi_checks.response_schema_conformance,
    ]
    refused = [*wanted, openapi_checks.negative_data_rejection]
    positive, negative = schemathesis.GenerationMode.POSITIVE, schemathesis.GenerationMode.NEGATIVE
    operations = {operation.ok().path: operation.ok() for operation in schema.get_all_operations()}
    assert operations.keys() >= {*POSTS, "/v1/models", "/health"}
    for path, operation in operations.items():
        if path not in POSTS:
            ask_all(target, operation.as_strategy(generation_mode=positive), 20, wanted)
            continue
        each = SCHEMA_CALLS // 4
        ask_all(target, operation.as_strategy(generation_mode=positive), each, wanted)
        ask_all(target, operation.as_strategy(generation_mode=negative), each, refused)


def ask_all(target: Target, cases: st.SearchStrategy, examples: int, checks: list) -> None:
    headers = {"Authorization": f"Bearer {KEY}"}

    @fuzz(cases, examples)
    def ask(case: Any) -> None:
        if target.late:
            return
        answer = case.call(f"http://127.0.0.1:{target.port}", headers=headers, timeout=60)
        target.count(answer.status_code)
        case.validate_response(answer, checks=checks, headers=headers)

    ask()


NUMBERS = st.one_of(
    st.integers(),
    st.sampled_from([-1, 0, 1, 2, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64, 10**400]),
    st.floats(),
)
TEXTS = st.one_of(st.text(max_size=20), st.sampled_from(["", "\0", "\ud800", "a" * 3000, "<s>"]))
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXTS, inner, max_size=3)),
    max_leaves=6,
)
PLAIN = {
    "model": st.just("run"),
    "prompt": st.one_of(st.text("0123456789+=", min_size=1), st.lists(st.integers(0, 9))),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["user", "assistant", "system"]), "content": st.just("1+1")}
        ),
        min_size=1,
        max_size=3,
    ),
    "max_tokens": st.integers(1, 8),
    "n": st.integers(1, 3),
    "stream": st.booleans(),
}
REQUIRED = {POSTS[0]: ("model", "prompt"), POSTS[1]: ("model", "messages")}


@st.composite
def bodies(draw: Any) -> tuple[str, bytes]:
    """A body that can be served, with some fields changed, or bytes that are none."""
    path = draw(st.sampled_from(POSTS))
    if draw(st.integers(0, 9)) == 0:
        return path, draw(st.binary(max_size=60))
    schema = CompletionRequest if path == POSTS[0] else ChatRequest
    names = [name for name in PLAIN if name in schema.model_fields]
    body = {name: draw(PLAIN[name]) for name in names}
    for name in draw(st.lists(st.sampled_from(sorted(schema.model_fields)), max_size=3)):
        body[name] = draw(VALUES)
    if draw(st.integers(0, 9)) == 0:
        body[draw(TEXTS)] = draw(VALUES)
    return path, json.dumps(body).encode("ascii")


def test_bodies_that_the_document_does_not_allow(target):
    @fuzz(bodies(), BODY_CALLS)
    def ask(sent: tuple[str, bytes]) -> None:
        if target.late:
            return
        status, answer = target.ask("POST", *sent)
        target.count(status)
        assert status in OURS, (sent, answer)
        if status != 200:
            error = json.loads(answer)["error"]
            assert error.keys() == {"message", "type", "param", "code"}
            assert "\n" not in error["message"]

    ask()
    assert target.statuses["200"] > BODY_CALLS / 20
    assert target.statuses["400"] > BODY_CALLS / 20


def test_clients_that_vanish(target):
    @fuzz(st.tuples(bodies(), st.integers(0, 400)), 200)
    def ask(sent: tuple[tuple[str, bytes], int]) -> None:
        (path, body), length = sent
        connection = http.client.HTTPConnection("127.0.0.1", target.port, timeout=60)
        with contextlib.closing(connection):
            connection.putrequest("POST", path)
            connection.putheader("Authorization", f"Bearer {KEY}")
            connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body[:length])
        target.count("vanished")

    ask()
    assert target.ask("GET", "/health")[0] == 200


def test_memory_is_flat(target):
    if target.calls < CALLS:
        pytest.skip(f"only {target.calls} calls were made before; run the whole file")
    warm = [mb for calls, mb in target.memory_mb if calls >= WARM_CALLS]
    assert max(warm) - warm[0] < GROWTH_MB, target.memory_mb


# --- gRPC -----------------------------------------------------------------------------------------


@functools.cache
def decode_requests() -> st.SearchStrategy:
    from nrt_jax.serving.jetstream_grpc import messages

    ids = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(0, 15))
    texts = st.one_of(st.text(max_size=30), st.text("0123456789+=", max_size=50))
    limits = st.one_of(st.integers(-(2**31), 2**31 - 1), st.integers(1, 40))
    text = st.builds(lambda text: {"text_content": {"text": text}}, texts)
    tokens = st.builds(
        lambda ids: {"token_content": {"token_ids": ids}},
        st.one_of(st.lists(ids, max_size=5), st.lists(st.integers(0, 15), max_size=100)),
    )
    rest = st.fixed_dictionaries(
        {"max_tokens": limits, "priority": st.integers(-9, 9), "session_cache": st.text(max_size=5)}
    )
    built = st.builds(
        lambda content, rest: messages.DecodeRequest(**content, **rest).SerializeToString(),
        st.one_of(text, tokens, st.just({})),
        rest,
    )
    return st.one_of(built, built, built, st.binary(max_size=40))


def test_grpc_calls(target):
    grpc = pytest.importorskip("grpc")
    pytest.importorskip("nrt_jax.serving.jetstream_grpc")
    path = "/jetstream_proto.Orchestrator/Decode"
    allowed = {"OK", "INVALID_ARGUMENT", "RESOURCE_EXHAUSTED", "UNAUTHENTICATED"}
    keys = st.sampled_from([KEY] * 9 + ["wrong"])
    with grpc.insecure_channel(f"127.0.0.1:{target.grpc_port}") as channel:
        decode = channel.unary_stream(path)

        @fuzz(st.tuples(decode_requests(), keys), 1_000)
        def ask(sent: tuple[bytes, str]) -> None:
            metadata = [("authorization", f"Bearer {sent[1]}")]
            call = decode(sent[0], metadata=metadata, timeout=60)
            with contextlib.suppress(grpc.RpcError):
                list(call)
            target.statuses[call.code().name] += 1
            assert call.code().name in allowed, (sent, call.details())

        ask()
        for request in [b"\x20\x08\x2a\x03\x0a\x011"] * 20:
            decode(request, metadata=[("authorization", f"Bearer {KEY}")]).cancel()
    assert target.statuses["OK"] > 50
    assert target.statuses["INVALID_ARGUMENT"] > 50
