"""Servers in a thread of the test process, and plain HTTP to talk to them."""

import asyncio
import contextlib
import http.client
import json
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import uvicorn

from nrt_jax.serving.app import OpenAIServer

PATIENCE_S = 60.0


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    text: str

    @property
    def json(self) -> Any:
        """The body."""
        return json.loads(self.text)

    @property
    def error(self) -> dict[str, Any]:
        """The error, which has all of its fields and no other."""
        (error,) = self.json.values()
        assert error.keys() == {"message", "type", "param", "code"}
        return error

    @property
    def chunks(self) -> list[dict[str, Any]]:
        """The events of a stream, which ends as it should."""
        events = self.text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""], self.text
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


@dataclass
class Live:
    """A server that listens."""

    api: OpenAIServer
    port: int

    @property
    def url(self) -> str:
        """Where the openai client finds it."""
        return f"http://127.0.0.1:{self.port}/v1"

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def get(self, path: str) -> Answer:
        return self._ask("GET", path, None)

    def post(self, path: str, body: Any) -> Answer:
        """Post an object as JSON, or bytes as they are."""
        return self._ask("POST", path, body if isinstance(body, bytes) else json.dumps(body))

    def complete(self, prompt: Any, **fields: Any) -> Answer:
        """A completion, greedy unless said otherwise."""
        body = {"model": "tiny", "prompt": prompt, "temperature": 0, **fields}
        return self.post("/v1/completions", body)

    def chat(self, content: Any, **fields: Any) -> Answer:
        """A chat of one message of the user, or of several."""
        messages = content if isinstance(content, list) else [{"role": "user", "content": content}]
        body = {"model": "tiny", "messages": messages, "temperature": 0, **fields}
        return self.post("/v1/chat/completions", body)

    def metric(self, name: str, **labels: str) -> float:
        """A figure of /metrics; 0 when there is none."""
        value = self.api.metrics.registry.get_sample_value(name, labels)
        return 0.0 if value is None else value

    def _ask(self, method: str, path: str, body: Any) -> Answer:
        with contextlib.closing(self.connect()) as connection:
            connection.request(method, path, body)
            response = connection.getresponse()
            headers = {name.lower(): value for name, value in response.getheaders()}
            return Answer(response.status, headers, response.read().decode("utf-8"))


@contextlib.contextmanager
def listening(api: OpenAIServer, **options: Any) -> Iterator[Live]:
    """Serve in a thread until the block is left."""
    config = uvicorn.Config(
        api.app(), port=0, log_config=None, lifespan="off", timeout_graceful_shutdown=1, **options
    )
    server = uvicorn.Server(config)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    api.engine.start()
    thread.start()
    wait_until(lambda: server.started)
    try:
        yield Live(api, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        thread.join()
        api.engine.stop()


def wait_until(moment: Callable[[], bool]) -> None:
    """Return at `moment`, or fail."""
    deadline = time.monotonic() + PATIENCE_S
    while not moment():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)
