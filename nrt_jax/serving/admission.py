"""Limits on requests: a number of them run, a short queue waits, others get status 429."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from nrt_jax.serving.protocol import ApiError

RETRY_AFTER_S = 1


class Admission:
    """Used on the event loop's thread; `running` and `waiting` count requests."""

    def __init__(self, concurrent: int, queue: int):
        self._free = asyncio.Semaphore(concurrent)
        self._queue = queue
        self._left = asyncio.Event()
        self.running = self.waiting = 0
        self.draining = False

    @asynccontextmanager
    async def admit(self) -> AsyncIterator[None]:
        """Wait for a turn; ApiError 429 when the queue is full, 503 while draining."""
        if self.draining:
            raise ApiError(503, "the server is shutting down; ask another one", code="draining")
        if self._free.locked() and self.waiting >= self._queue:
            raise ApiError(
                429,
                f"{self.running} requests are in work and {self.waiting} wait; try again later",
                code="queue_full",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            )
        self.waiting += 1
        try:
            await self._free.acquire()
        finally:
            self.waiting -= 1
            self._left.set()
        self.running += 1
        try:
            yield
        finally:
            self.running -= 1
            self._free.release()
            self._left.set()

    async def drain(self) -> None:
        """Admit no further request, and return when none runs or waits."""
        self.draining = True
        while self.running or self.waiting:
            self._left.clear()
            await self._left.wait()
