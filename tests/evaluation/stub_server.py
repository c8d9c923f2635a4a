"""A server that speaks like OpenAI's, and does what a test says."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    """Connections that wait; the default of 5 resets those of a client with many at once."""


class StubServer:
    """While entered, answers each request with (status, body) of `reply`, called one at a time."""

    def __init__(self, reply: Callable[[dict[str, Any]], tuple[int, Any]]):
        self.reply = reply
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        lock, stub = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    stub.asked.append(body | {"path": self.path})
                    stub.headers.append(dict(self.headers))
                    status, value = stub.reply(body)
                if status == 0:
                    self.connection.close()
                    return
                text = value if isinstance(value, bytes) else json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_: object) -> None:
                """Print nothing."""

        self._server = _Server(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> "StubServer":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def completion(content: str | None, finish: str = "stop", **message: Any) -> dict[str, Any]:
    """The body of an answer of 7 tokens."""
    return {
        "choices": [
            {
                "message": {"content": content, "role": "assistant", **message},
                "finish_reason": finish,
            }
        ],
        "usage": {"completion_tokens": 7, "completion_tokens_details": {"reasoning_tokens": 4}},
    }
