"""A request on its way: events from the thread of the engine to the asyncio loop of its client."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np

from nrt_jax.engine.requests import Event


class PromptLogprobs(NamedTuple):
    """log pi(token i + 1 | tokens <= i) of a prompt of n tokens, in nats."""

    logprobs: np.ndarray
    """float32 [n - 1]."""
    top_ids: np.ndarray
    """int32 [n - 1, top]: the most probable tokens of each place."""
    top_logprobs: np.ndarray
    """float32 [n - 1, top]."""


@runtime_checkable
class Cancels(Protocol):
    """What a generation needs of the loop that runs it."""

    def cancel(self, generation: "Generation", copy: int | None = None) -> None: ...


class Generation:
    """The events of one request, one queue per copy; used on the thread of its asyncio loop."""

    def __init__(self, engine: "Cancels", copies: int, request_id: str):
        self.request_id = request_id
        self.loop = asyncio.get_running_loop()
        self._engine = engine
        self._queues: list[asyncio.Queue[Event | Exception]]
        self._queues = [asyncio.Queue() for _ in range(copies)]
        self._unfinished = set(range(copies))

    async def events(self, copy: int) -> AsyncIterator[Event]:
        """The events of one copy up to its last; raises the error that ended the request."""
        while True:
            event = await self._queues[copy].get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finished is not None:
                return

    def give_up(self, copy: int) -> None:
        """End one copy and free its slot."""
        if copy in self._unfinished:
            self._unfinished.discard(copy)
            self._engine.cancel(self, copy)

    def close(self) -> None:
        """End all copies and free their slots."""
        if self._unfinished:
            self._unfinished.clear()
            self._engine.cancel(self)

    def fail(self, error: Exception) -> None:
        """End every copy with `error`, and free its slots."""
        self.close()
        for queue in self._queues:
            queue.put_nowait(error)

    def deliver(self, event: Event | Exception) -> None:
        """Hand an event to its copy; a failure goes to every copy."""
        if isinstance(event, Exception):
            self._unfinished.clear()
            for queue in self._queues:
                queue.put_nowait(event)
            return
        if event.finished is not None:
            self._unfinished.discard(event.sample)
        self._queues[event.sample].put_nowait(event)


def post(posts: "dict[Generation, list[Event | Exception]]") -> None:
    """Deliver events and failures, with one call into each asyncio loop."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Generation, Event | Exception]]] = {}
    for generation, events in posts.items():
        by_loop.setdefault(generation.loop, []).extend((generation, event) for event in events)
    for loop, deliveries in by_loop.items():
        _call(loop, _deliver, deliveries)


def _deliver(deliveries: "list[tuple[Generation, Event | Exception]]") -> None:
    for generation, event in deliveries:
        generation.deliver(event)


def answer(future: "asyncio.Future[PromptLogprobs]", result: PromptLogprobs | Exception) -> None:
    """Give a future its result or its failure, on the thread of its loop."""
    _call(future.get_loop(), _resolve, future, result)


def _resolve(future: "asyncio.Future[PromptLogprobs]", result: PromptLogprobs | Exception) -> None:
    if future.done():
        return  # the client went away
    if isinstance(result, Exception):
        future.set_exception(result)
    else:
        future.set_result(result)


def _call(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the loop is closed, and its clients are gone
        loop.call_soon_threadsafe(function, *args)
