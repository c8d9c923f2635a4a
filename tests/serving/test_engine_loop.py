"""The thread that owns the engine, around a scheduler that fails when the test says so."""

import asyncio
import contextlib
import weakref

import numpy as np
import pytest

from nrt_jax.engine.requests import Event, Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.serving.call import Call
from nrt_jax.serving.engine_loop import EngineFailed, EngineLoop, EngineStopped
from nrt_jax.serving.metrics import Metrics
from nrt_jax.serving.protocol import ApiError
from tests.serving.live import wait_until

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
        if self.submitted >= REQUESTS:
            raise RuntimeError("boom")
        return []


class NeverEnds(FailsWhenFull):
    """A scheduler whose sequences get no token; its 13th ticket's request cannot be prepared."""

    def __init__(self):
        super().__init__()
        self.cancelled = []

    def submit(self, request, key) -> int:
        if request.stream == 13:
            raise OverflowError("no int32")
        return super().submit(request, key)

    def cancel(self, ticket, copy=None) -> None:
        self.cancelled.append(ticket)

    def step(self) -> list[Event]:
        return []


async def first_event(generation) -> Event:
    async for event in generation.events(0):
        return event
    raise AssertionError("it ended without an event")


@contextlib.asynccontextmanager
async def running(make, **options):
    """An engine loop that is stopped at the end, on an asyncio loop that does not wait forever."""
    engine = EngineLoop(make, lambda tokens: ((), (), ()), **options)
    engine.start()
    try:
        async with asyncio.timeout(30):
            yield engine
    finally:
        engine.stop()


def test_stopping_ends_what_runs_and_what_comes_later():
    async def run() -> None:
        async with running(NeverEnds) as engine:
            before = engine.submit(REQUEST, 0, "before")
            assert engine.stop()
            assert not engine.healthy
            after = engine.submit(REQUEST, 0, "after")
            for generation in (before, after):
                with pytest.raises(EngineStopped):
                    await first_event(generation)
            with pytest.raises(EngineStopped):
                await engine.score(np.array([1, 2], np.int32), "score")

    asyncio.run(run())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_tells_its_requests():
    class Dies(NeverEnds):
        def step(self) -> list[Event]:
            if self.submitted:
                raise GeneratorExit
            return []

    async def run() -> None:
        async with running(Dies) as engine:
            with pytest.raises(EngineStopped):
                await first_event(engine.submit(REQUEST, 0, "before"))
            with pytest.raises(EngineStopped):
                await first_event(engine.submit(REQUEST, 0, "after"))
            assert not engine.healthy

    asyncio.run(run())


def test_a_request_that_cannot_be_submitted_ends_alone(caplog):
    schedulers = []

    def make():
        schedulers.append(NeverEnds())
        return schedulers[-1]

    async def run() -> None:
        async with running(make) as engine:
            other = engine.submit(REQUEST, 0, "other")
            with pytest.raises(EngineFailed):
                await first_event(engine.submit(REQUEST._replace(stream=13), 0, "thirteen"))
            assert list(engine._tickets) == [other]

    asyncio.run(run())
    assert len(schedulers) == 1
    assert "request thirteen cannot be prepared" in caplog.text


def test_an_engine_is_built_anew_without_a_request(monkeypatch):
    """A server that says it is unhealthy gets none."""
    monkeypatch.setattr("nrt_jax.serving.engine_loop.pauses", lambda: iter([0.01] * 9))
    made = []

    def make():
        made.append(FailsWhenFull())
        if len(made) in (2, 3):
            raise MemoryError
        return made[-1]

    async def run() -> None:
        async with running(make) as engine:
            generations = [engine.submit(REQUEST, 0, str(n)) for n in range(REQUESTS)]
            for generation in generations:
                with pytest.raises(EngineFailed):
                    await first_event(generation)
            wait_until(lambda: engine.healthy)
            assert len(made) == 4

    asyncio.run(run())


def test_requests_that_come_while_there_is_no_engine_fail_with_the_next_try(monkeypatch):
    monkeypatch.setattr("nrt_jax.serving.engine_loop.pauses", lambda: iter([0.01] * 999))
    made = []

    def make():
        made.append(0)
        if len(made) > 1:
            raise MemoryError
        return FailsWhenFull()

    async def run() -> None:
        async with running(make) as engine:
            for generation in [engine.submit(REQUEST, 0, str(n)) for n in range(2 * REQUESTS)]:
                with pytest.raises(EngineFailed):
                    await first_event(generation)
            with pytest.raises(EngineFailed):
                await engine.score(np.array([1, 2], np.int32), "score")

    asyncio.run(run())


def test_the_failed_scheduler_is_gone_before_another_is_built():
    """There may be no memory for the caches of both."""
    old, alive = [], []

    def make():
        alive.append(bool(old) and old[0]() is not None)
        scheduler = FailsWhenFull()
        old[:] = [weakref.ref(scheduler)]
        return scheduler

    async def run() -> None:
        async with running(make) as engine:
            for generation in [engine.submit(REQUEST, 0, str(n)) for n in range(REQUESTS)]:
                with pytest.raises(EngineFailed):
                    await first_event(generation)
            wait_until(lambda: len(alive) == 2)

    asyncio.run(run())
    assert alive == [False, False]


def test_an_answer_does_not_start_after_the_time_limit():
    """The limit may pass between trace and answer, when the engine has nothing of the request."""

    async def run() -> None:
        async with running(NeverEnds) as engine:
            call = Call(engine, Metrics(), "late", 0.02)
            trace = call.submit(REQUEST, 0)
            with pytest.raises(ApiError, match="not answered in"):
                await first_event(trace)
            with pytest.raises(ApiError, match="not answered in") as late:
                call.submit(REQUEST, 0)
            assert late.value.status == 504
            call.close()
            scheduler = engine._scheduler
            wait_until(lambda: scheduler.cancelled == [0])
            assert scheduler.submitted == 1
            assert not engine._tickets

    asyncio.run(run())


def test_a_failure_ends_every_request_that_the_engine_has():
    failures = []

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
