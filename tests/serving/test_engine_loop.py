"""The thread that owns the engine, around a scheduler that fails when the test says so."""

import asyncio

import numpy as np
import pytest

from nrt_jax.engine.requests import Event, Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.serving.engine_loop import EngineFailed, EngineLoop

REQUESTS = 3
REQUEST = Request(np.array([1], np.int32), 0, 1, 4, Sampling(0.0))


class FailsWhenFull:
    """A scheduler that does nothing until it has all requests, and then raises."""

    busy, slots_in_use, waiting = True, 0, 0

    def __init__(self):
        self.submitted = 0

    def submit(self, request, key) -> int:
        self.submitted += 1
        return self.submitted - 1

    def cancel(self, ticket, copy=None) -> None:
        pass

    def step(self) -> list[Event]:
        if self.submitted == REQUESTS:
            raise RuntimeError("boom")
        return []


def test_a_failure_ends_every_request_that_the_engine_has():
    failures = []

    async def first_event(generation) -> Event:
        async for event in generation.events(0):
            return event
        raise AssertionError("it ended without an event")

    async def run() -> None:
        engine = EngineLoop(
            FailsWhenFull, lambda tokens: ((), (), ()), on_failure=lambda: failures.append(0)
        )
        engine.start()
        try:
            generations = [engine.submit(REQUEST, 0, f"request {n}") for n in range(REQUESTS)]
            async with asyncio.timeout(30):
                for generation in generations:
                    with pytest.raises(EngineFailed):
                        await first_event(generation)
        finally:
            engine.stop()

    asyncio.run(run())
    assert failures == [0]
