"""Programs with collectives, launched by several threads."""

import threading
import time

import pytest

from nrt_jax.engine.programs import Programs
from tests.models.tiny import mesh

THREADS = 4


def most_at_once(programs: list[Programs]) -> int:
    """The most threads that were in a launch at the same time."""
    inside, seen = set(), []
    start = threading.Barrier(THREADS)

    def launch(number: int) -> None:
        inside.add(number)
        seen.append(len(inside))
        time.sleep(0.02)
        inside.discard(number)

    def work(number: int) -> None:
        program = programs[number % len(programs)].get("kind", number, make=lambda: launch)
        start.wait()
        program(number)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == THREADS
    return max(seen)


@pytest.mark.parametrize("engines", [1, 2])
def test_on_several_devices_one_thread_launches_at_a_time(engines):
    """Otherwise the devices may get two programs in different orders, and wait for each other."""
    assert most_at_once([Programs(mesh(fsdp=4)) for _ in range(engines)]) == 1


def test_on_one_device_nobody_waits():
    """Its queue has one order. A compilation of one thread must not hold up the others."""
    assert most_at_once([Programs(mesh())]) > 1


def test_a_launch_that_raises_lets_the_next_one_in():
    programs = Programs(mesh(fsdp=2))

    def fails() -> None:
        raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        programs.get("fails", make=lambda: fails)()
    assert programs.get("works", make=lambda: lambda: 5)() == 5
