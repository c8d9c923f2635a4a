"""The same requests to a server of the quickstart's NRT run, one after the other."""

import contextlib
import http.client
import json
import re
from typing import Any

PATIENCE_S = 300.0
MODEL = "nrt"
PROMPT = "3+1+4+0+2+2+1"
OPENED = PROMPT + "\n"
"""The base model's documents go on with running totals here."""
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def _chat(content: Any = PROMPT, **fields: Any) -> tuple[str, str, Any]:
    messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
    return "POST", CHAT, {"model": MODEL, "messages": messages} | fields


def _complete(prompt: Any = PROMPT, **fields: Any) -> tuple[str, str, Any]:
    return "POST", COMPLETIONS, {"model": MODEL, "prompt": prompt} | fields


REQUESTS: dict[str, tuple[str, str, Any]] = {
    "models": ("GET", "/v1/models", None),
    "model": ("GET", f"/v1/models/{MODEL}", None),
    "health": ("GET", "/health", None),
    "chat": _chat(temperature=0),
    "chat, sampled twice": _chat(n=2, seed=3, temperature=2, logprobs=True, top_logprobs=2),
    "chat without a seed": _chat(temperature=2, top_p=0.95),
    "chat, cut": _chat(seed=1, max_tokens=3),
    "chat, reasoning cut": _chat(seed=1, max_reasoning_tokens=2),
    "chat, stream": _chat(
        seed=5, temperature=2, logprobs=True, stream=True, stream_options={"include_usage": True}
    ),
    "completion": _complete(temperature=0),
    "completion, log-probs": _complete(OPENED, seed=2, max_tokens=8, logprobs=3),
    "completion, n": _complete(OPENED, seed=7, n=2, max_tokens=12, temperature=2),
    "completion, several prompts": _complete([OPENED, "1+1"], seed=7, max_tokens=6, temperature=2),
    "completion, ids": _complete([[1, 7, 16, 8, 4], [1, 8, 18]], seed=7, max_tokens=6),
    "completion, stop": _complete(OPENED, seed=7, max_tokens=20, stop=["00", "02", "~"]),
    "completion, truncated": _complete(
        OPENED,
        seed=9,
        max_tokens=12,
        top_k=9,
        min_p=0.01,
        repetition_penalty=1.2,
        temperature=2,
    ),
    "completion, stream": _complete(seed=4, max_tokens=20, temperature=2, stream=True, logprobs=1),
    "completion, stream of two": _complete(
        OPENED, n=2, seed=4, max_tokens=20, temperature=2, stream=True
    ),
    "echo": _complete(PROMPT + "=3", max_tokens=0, echo=True, logprobs=2),
    "echo and more": _complete(seed=4, max_tokens=4, echo=True, logprobs=1),
    "broken body": ("POST", COMPLETIONS, b'{"model": '),
    "no object": ("POST", CHAT, b"[1, 2]"),
    "not a number": ("POST", COMPLETIONS, b'{"model": "nrt", "prompt": "1", "temperature": NaN}'),
    "unknown model": _chat(model="gpt-4"),
    "unknown model, completion": _complete(model="gpt-4"),
    "unknown model, card": ("GET", "/v1/models/gpt-4", None),
    "too many tokens": _complete(max_tokens=1000),
    "too many tokens, chat": _chat(max_tokens=1000),
    "prompt too long": _complete("1+" * 60),
    "prompt too long, chat": _chat("1+" * 60 + "1"),
    "too many sequences": _complete(["1"] * 50, n=3),
    "wrong type": _complete(temperature="hot"),
    "wrong type of a prompt": _complete(5),
    "wrong type of a message": _chat([{"role": "user", "content": 5}]),
    "out of bounds": _chat(top_p=1.5),
    "unknown field": _complete(temprature=1),
    "unsupported field": _chat(tools=[{"type": "function"}]),
    "missing field": ("POST", CHAT, {"model": MODEL}),
    "no messages": _chat([]),
    "unknown role": _chat([{"role": "tool", "content": "1"}]),
    "unknown token": _complete([[1, 10_000]]),
    "options without a stream": _complete(stream_options={"include_usage": True}),
    "another path": ("POST", "/v1/embeddings", {}),
    "another method": ("GET", COMPLETIONS, None),
    "figures": ("GET", "/metrics", None),
}


def transcript(port: int) -> dict[str, dict[str, Any]]:
    """Status, type and body of every answer, without ids and times."""
    return {name: exchange(port, *request) for name, request in REQUESTS.items()}


def exchange(port: int, method: str, path: str, body: Any) -> dict[str, Any]:
    """One answer."""
    sent = body if body is None or isinstance(body, bytes) else json.dumps(body)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    with contextlib.closing(connection):
        connection.request(method, path, sent)
        response = connection.getresponse()
        kind = response.getheader("Content-Type", "")
        text = response.read().decode("utf-8")
    return {
        "status": response.status,
        "type": kind,
        "named": response.getheader("x-request-id") is not None,
        "body": parsed(kind, text),
    }


def parsed(kind: str, text: str) -> Any:
    """A body's JSON, a stream's events, or the names of the figures, without ids and times."""
    if kind.startswith("text/event-stream"):
        events = [event.removeprefix("data: ") for event in text.split("\n\n") if event]
        return [event if event == "[DONE]" else lasting(json.loads(event)) for event in events]
    if kind.startswith("application/json"):
        return lasting(json.loads(text))
    return [line for line in text.splitlines() if line.startswith("# ")]


def lasting(value: Any) -> Any:
    """JSON with ids and times replaced."""
    if isinstance(value, dict):
        return {k: "<time>" if k == "created" else lasting(v) for k, v in value.items()}
    if isinstance(value, list):
        return [lasting(item) for item in value]
    return re.sub(r"[0-9a-f]{24}", "<id>", value) if isinstance(value, str) else value
