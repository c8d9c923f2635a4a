"""A run that is killed or stopped at any moment, and started again, ends as one that never was."""

import random
import signal
import time
from collections.abc import Callable

import pytest

from tests.training.runs import Outcome, TinyRun, assert_same

NRT = ("method=nrt", "logging.rollouts=true")
SFT = ("method=sft",)
METHODS = [pytest.param(NRT, marks=pytest.mark.slow), SFT]
"""SFT among the slow tests: of each product one method is quick."""
EVERY_STEP = ("checkpoint.every_steps=1",)


def after(seconds: float) -> Callable[[], bool]:
    start = time.monotonic()
    return lambda: time.monotonic() - start >= seconds


def finish(run: TinyRun) -> None:
    outcome = run.trained()
    assert "Traceback" not in outcome.err
    assert "error" not in outcome.err.lower()


# Each is killed in this order, so that each start gets further than the one before.
MOMENTS = {
    "before its first step": lambda run: run.begun,
    "in its first evaluation": lambda run: lambda: (run.directory / "samples.jsonl").exists(),
    "before its first checkpoint": lambda run: lambda: run.at_line(2),
    "during a save": lambda run: run.saving,
    "in an evaluation": lambda run: lambda: run.evaluating(3),
}


@pytest.mark.parametrize("method", METHODS, ids=["nrt", "sft"])
def test_killed_at_chosen_moments(method, new_run, reference):
    whole = reference(*method, *EVERY_STEP)
    run = new_run(*method, *EVERY_STEP)
    for name, moment in MOMENTS.items():
        assert run.kill_at(moment(run)), f"the run ended before it was {name}"
        if name == "during a save":
            assert run.saving(), "the kill came after the save"
    finish(run)
    assert_same(run, whole)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS, ids=["nrt", "sft"])
@pytest.mark.parametrize("seed", range(3))
def test_killed_at_random_moments(method, seed, new_run, reference):
    whole = reference(*method)
    run = new_run(*method)
    start = time.monotonic()
    run.trained()
    duration = time.monotonic() - start
    draw = random.Random(seed)
    run = TinyRun(run.config, run.directory.with_name("killed"), method)
    for _ in range(5):
        if draw.random() < 0.5:
            seconds = draw.uniform(0, 1.2 * duration)
            print(f"seed {seed}: kill after {seconds:.3f} s of {duration:.3f}")
            run.kill_at(after(seconds))
        else:
            line = draw.randint(1, len(whole.metrics()))
            print(f"seed {seed}: kill when line {line} of metrics.jsonl is written")
            run.kill_at(lambda line=line: run.at_line(line))
    finish(run)
    assert_same(run, whole)


@pytest.mark.slow
def test_killed_while_it_compiles(new_run, reference):
    """Without stored programs every start compiles, and a kill falls into that for seconds."""
    compiles = {"JAX_ENABLE_COMPILATION_CACHE": "false"}
    whole = reference(*NRT)
    run = new_run(*NRT)
    draw = random.Random(0)
    for line in (1, 4):
        assert run.kill_at(lambda line=line: run.at_line(line), **compiles)
        at_least = time.monotonic() + draw.uniform(0.5, 3)
        assert run.kill_at(lambda at=at_least: time.monotonic() > at and run.begun(), **compiles)
    assert run.train(**compiles).status == 0
    assert_same(run, whole)


def stop_at(run: TinyRun, moment: Callable[[], bool], *more: int) -> str:
    """SIGTERM at the moment, then more signals; it must end with status 0. What it printed."""
    process = run.start()
    assert process.wait_until(moment)
    process.signal(signal.SIGTERM)
    for number in more:
        time.sleep(0.05)
        process.signal(number)
    outcome = process.end()
    assert outcome.status == 0, outcome
    assert "Traceback" not in outcome.err
    return outcome.err


@pytest.mark.parametrize("method", METHODS, ids=["nrt", "sft"])
def test_stopped_by_sigterm(method, new_run, reference):
    whole = reference(*method)
    run = new_run(*method)
    said = stop_at(run, run.begun)
    assert "stopped; nothing is saved yet, and the same command starts the run anew" in said
    assert run.steps == []
    stop_at(run, lambda: (run.directory / "samples.jsonl").exists())
    # The line that the evaluation before left would be taken for that of the next start.
    (run.directory / "metrics.jsonl").unlink()
    said = stop_at(run, lambda: run.at_line(1))
    # The signal may come before the first step begins; a step that has begun is finished and saved.
    step = max(run.steps, default=0)
    assert step in (0, 1)
    if step:
        assert "stopped after step 1; the same command continues the run" in said
    else:
        assert "; nothing is saved yet, and the same command starts the run anew" in said
    stop_at(run, lambda: run.evaluating(3), signal.SIGTERM, signal.SIGTERM)
    # No save is due at step 3.
    assert max(run.steps) == 3
    finish(run)
    assert_same(run, whole)


@pytest.mark.slow
def test_interrupted_from_the_keyboard(new_run, reference):
    run = new_run(*SFT)

    def interrupt(moment: Callable[[], bool], presses: int = 1) -> Outcome:
        process = run.start()
        # Everything is compiled after this: there is time for the signal to come before the end.
        assert process.wait_until(moment)
        for _ in range(presses):
            process.signal(signal.SIGINT)
            time.sleep(0.02)
        outcome = process.end()
        assert outcome.status == 130, outcome
        assert "Traceback" not in outcome.err
        return outcome

    assert interrupt(run.begun).error == (
        "interrupted; nothing is saved yet, and the same command starts the run anew"
    )
    assert run.steps == []
    said = interrupt(lambda: run.at_line(2)).err
    assert "nrt-jax: INFO: Ctrl-C: finishing the step and saving; Ctrl-C again leaves at" in said
    # No save is due at an odd step, and it is saved.
    step = max(run.steps)
    assert f"stopped after step {step}; the same command continues the run" in said
    # The second one leaves between any two instructions.
    interrupt(lambda: run.at_line(step + 2), presses=2)
    finish(run)
    assert_same(run, reference(*SFT))


def test_two_processes_in_one_directory(new_run):
    run = new_run(*SFT, "optimizer.schedule=constant", "optimizer.warmup_ratio=0")
    first = run.start("train.steps=100000")
    assert first.wait_until(lambda: run.at_line(2))
    try:
        refused = run.train()
    finally:
        first.signal(signal.SIGKILL)
        first.end()
    assert refused.status == 2
    assert refused.error == (
        f"run_dir {run.directory}: another process trains in it; wait until it ends, or choose "
        "another run_dir"
    )
    # A process that was killed leaves no lock behind.
    run.trained("train.steps=1")
