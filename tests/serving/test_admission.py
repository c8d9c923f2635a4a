"""Turns are taken in order, and a drain ends when everyone has left."""

import asyncio

import pytest

from nrt_jax.serving.admission import Admission
from nrt_jax.serving.protocol import ApiError


def test_turns_are_taken_in_order():
    async def run() -> list[int]:
        admission, order = Admission(2, 10), []

        async def visit(number: int) -> None:
            async with admission.admit():
                assert admission.running <= 2
                order.append(number)
                await asyncio.sleep(0.001)

        await asyncio.gather(*(visit(number) for number in range(8)))
        assert (admission.running, admission.waiting) == (0, 0)
        return order

    assert asyncio.run(run()) == list(range(8))


def test_a_drain_waits_for_those_inside_and_those_in_the_queue():
    async def run() -> list[str]:
        admission, log = Admission(1, 1), []

        async def visit(name: str) -> None:
            async with admission.admit():
                await asyncio.sleep(0.01)
                log.append(name)

        visits = [asyncio.create_task(visit(name)) for name in ("first", "second")]
        await asyncio.sleep(0)
        with pytest.raises(ApiError, match="1 requests are in work and 1 wait") as full:
            async with admission.admit():
                pass
        assert full.value.status == 429
        await admission.drain()
        log.append("drained")
        with pytest.raises(ApiError) as late:
            async with admission.admit():
                pass
        assert late.value.status == 503
        await asyncio.gather(*visits)
        return log

    assert asyncio.run(run()) == ["first", "second", "drained"]


def test_who_gives_up_waiting_leaves_no_trace():
    async def run() -> None:
        admission = Admission(1, 1)
        async with admission.admit():
            waits = asyncio.create_task(admission.admit().__aenter__())
            await asyncio.sleep(0)
            assert admission.waiting == 1
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            assert admission.waiting == 0
        async with asyncio.timeout(1), admission.admit():
            assert admission.running == 1

    asyncio.run(run())
