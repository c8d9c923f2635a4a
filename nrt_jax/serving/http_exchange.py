"""Between ASGI and the handlers: bodies, clients that leave, event streams, request counts."""

import asyncio
import secrets
from collections.abc import AsyncGenerator, Coroutine
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nrt_jax.serving.metrics import Metrics
from nrt_jax.serving.protocol import ApiError

T = TypeVar("T")
CLIENT_GONE = 499


class ClientGone(Exception):
    """The client closed the connection before its answer ended."""


async def read_body(request: Request, most: int) -> bytes:
    """The whole body; ApiError 413 when it has more than `most` bytes."""
    too_large = ApiError(413, f"the body is larger than {most} bytes; send less at a time")
    announced = request.headers.get("content-length", "")
    # Python reads no number of thousands of digits.
    if announced.isdecimal() and (len(announced) > 18 or int(announced) > most):
        raise too_large
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > most:
                raise too_large
            chunks.append(chunk)
    except ClientDisconnect:
        raise ClientGone from None
    return b"".join(chunks)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`; when the client leaves, `work` is cancelled and ClientGone raised.

    Call it after the body has been read.
    """
    task, gone = asyncio.ensure_future(work), asyncio.ensure_future(_hang_up(request))
    try:
        await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        gone.cancel()
        task.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _hang_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; however the response ends, it closes the stream and what it holds."""

    def __init__(self, events: AsyncGenerator[str, None], held: AsyncExitStack):
        super().__init__(
            events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"}
        )
        self._events, self._held = events, held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        try:
            await super().__call__(scope, receive, send)
        except ClientDisconnect:
            pass
        finally:
            await self._events.aclose()
            await self._held.aclose()


class Exchanges:
    """Middleware that gives every answer an `x-request-id` and counts it."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]):
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = secrets.token_hex(12)
        scope.setdefault("state", {})["request_id"] = request_id
        status = CLIENT_GONE

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode("ascii")))
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        finally:
            # Clients may ask for any path: only existing routes become labels.
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, str(status)).inc()
