"""The share of a run's life that its finished steps took, over several starts."""

import json
from pathlib import Path

import pytest

from nrt_jax.config.logging import LoggingConfig
from nrt_jax.training.life import STARTS_FILE, RunLife
from nrt_jax.training.logger import METRICS_FILE, MetricsWriter


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def start(tmp_path):
    """A start of a run after a step, and its clock."""
    clock, metrics = Clock(), tmp_path / METRICS_FILE
    metrics.touch()

    def begin(after: int) -> tuple[RunLife, Clock]:
        return RunLife(tmp_path, metrics, after, clock), clock

    return begin


def write(folder: Path, step: int, metrics: dict[str, float]) -> None:
    with (folder / METRICS_FILE).open("a") as file:
        file.write(json.dumps({"step": step} | metrics) + "\n")


def test_a_start_and_its_steps(start):
    life, clock = start(-1)
    clock.now += 10
    metrics = life.of_step(4.0)
    assert metrics == {
        "goodput/useful_s": 4.0,
        "goodput/life_s": 10.0,
        "goodput/share": 0.4,
        "goodput/starts": 1.0,
    }


def test_stops_and_lost_steps_count_against_it(start, tmp_path):
    life, clock = start(-1)
    for step in (1, 2):
        clock.now += 5
        write(tmp_path, step, life.of_step(5.0))
    clock.now += 5
    life.of_step(5.0)  # of a step whose line was dropped, since no checkpoint has it
    clock.now += 75
    life, clock = start(2)
    clock.now += 10
    metrics = life.of_step(10.0)
    assert metrics["goodput/useful_s"] == 20
    assert metrics["goodput/life_s"] == 100
    assert metrics["goodput/share"] == 0.2
    assert metrics["goodput/starts"] == 2


def test_a_line_that_was_cut_short_hides_no_start(start, tmp_path):
    start(-1)
    with (tmp_path / STARTS_FILE).open("a") as file:
        file.write('{"time": 10')
    life, clock = start(-1)
    clock.now += 1
    assert life.of_step(1.0)["goodput/starts"] == 2


def test_a_clock_that_went_back_gives_no_share_above_1(start):
    life, clock = start(-1)
    clock.now -= 100
    assert life.of_step(5.0)["goodput/share"] == 1
    assert life.of_step(-1.0)["goodput/useful_s"] == 5


def test_a_run_that_goes_on_counts_the_lines_that_are_kept(tmp_path):
    def writer(after: int) -> MetricsWriter:
        config = LoggingConfig(tensorboard=False)
        return MetricsWriter(tmp_path, config, after=after, total=9, resolved={})

    with writer(-1) as first:
        for step in (1, 2, 3):
            first.write(step, first.of_life(2.0))
    with writer(2) as second:
        assert second.of_life(2.0)["goodput/useful_s"] == 6
