"""One HTTP request under way: its sequences in the engine, its time limit, its measurements."""

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any, TypeVar

import numpy as np

from nrt_jax.engine.requests import Request
from nrt_jax.serving.detokenize import Piece, TextWriter
from nrt_jax.serving.engine_loop import EngineLoop
from nrt_jax.serving.generation import Generation, PromptLogprobs
from nrt_jax.serving.metrics import Metrics
from nrt_jax.serving.protocol import ApiError

T = TypeVar("T")


class Call:
    """Submits sequences for one request; `close` frees those that are still in the engine."""

    def __init__(self, engine: EngineLoop, metrics: Metrics, request_id: str, timeout_s: float):
        self.id = request_id
        self._engine, self._metrics = engine, metrics
        self._began = time.monotonic()
        self._timeout_s = timeout_s
        loop = asyncio.get_running_loop()
        self.deadline = loop.time() + timeout_s
        self._timer = loop.call_at(self.deadline, self._expire)
        self._generations: list[Generation] = []
        self._heard = self._expired = False

    def submit(self, request: Request, seed: int | None) -> Generation:
        """Start sequences; without a seed one is drawn. ApiError 504 after the time limit."""
        if self._expired:
            raise self.timed_out()
        generation = self._engine.submit(request, seed, self.id)
        self._generations.append(generation)
        return generation

    async def score(self, tokens: np.ndarray) -> PromptLogprobs:
        """Logprobs of a prompt's tokens."""
        return await self._engine.score(tokens, self.id)

    async def pieces(
        self, generation: Generation, copy: int, writer: TextWriter
    ) -> AsyncGenerator[Piece, None]:
        """The text of one sequence, up to its end or to a stop text."""
        first: float | None = None
        later = 0
        async for event in generation.events(copy):
            piece = writer.write(event)
            self._metrics.tokens_out.inc(piece.sampled)
            now = time.monotonic()
            if first is None:
                first = now
                self._hear_first(now)
            else:
                # Tokens that arrive together with the first are not timed.
                later += piece.sampled
            if piece.finish is not None:
                generation.give_up(copy)
                if later:
                    self._metrics.per_token.observe((now - first) / later)
            yield piece
            if piece.finish is not None:
                return

    def _hear_first(self, now: float) -> None:
        if not self._heard:
            self._heard = True
            self._metrics.first_token.observe(now - self._began)

    def close(self) -> None:
        """Free all slots: the request is answered, or its client has gone."""
        self._timer.cancel()
        for generation in self._generations:
            generation.close()

    def timed_out(self) -> ApiError:
        """The error of a request that took too long."""
        return ApiError(504, f"not answered in {self._timeout_s:g} s", code="timeout")

    def _expire(self) -> None:
        # Between trace and answer nothing is in the engine: the answer must not start.
        self._expired = True
        for generation in self._generations:
            generation.fail(self.timed_out())


async def merge(streams: Sequence[AsyncIterator[T]]) -> AsyncGenerator[tuple[int, T], None]:
    """Yield the items of all streams as they come, each with the index of its stream.

    The first failure ends all streams.
    """
    items: asyncio.Queue[Any] = asyncio.Queue()

    async def pump(index: int, stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                items.put_nowait((index, item))
            items.put_nowait(None)
        except Exception as error:
            items.put_nowait(error)

    tasks = [asyncio.create_task(pump(*numbered)) for numbered in enumerate(streams)]
    try:
        left = len(tasks)
        while left:
            item = await items.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
