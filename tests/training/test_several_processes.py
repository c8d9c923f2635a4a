"""Runs of several processes, on loopback: the numbers of one process, stops, deaths, bad input.

Two devices or four in all, so that the mesh is the same for every number of processes.
"""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nrt_jax.local import _environment, _free_port
from nrt_jax.training.logger import ROLLOUTS
from tests.training.runs import Outcome, Process, TinyRun, names

SFT = (
    "method=sft",
    "train.steps=2",
    "train.micro_batch_prompts=2",
    "evaluation.examples=0",
    "checkpoint.every_steps=1",
)
NRT = (
    "train.micro_batch_prompts=4",
    "train.mini_batch_prompts=4",
    "objective.kl_coefficient=0",
    "evaluation.every_steps=8",
    "logging.rollouts=true",
)


def start(run: TinyRun, processes: int, devices: int, *overrides: str) -> list[Process]:
    """The processes of a run, which are told their places by the environment."""
    address = f"localhost:{_free_port()}"
    return [
        run.start(*overrides, **_environment(address, process, processes, devices))
        for process in range(processes)
    ]


def end(processes: list[Process]) -> list[Outcome]:
    try:
        return [process.end() for process in processes]
    finally:
        for process in processes:
            process.process.kill()


def train(run: TinyRun, processes: int, devices: int) -> None:
    """Train to the end."""
    if processes == 1:
        assert run.train(JAX_NUM_CPU_DEVICES=str(devices)).status == 0
        return
    for outcome in end(start(run, processes, devices)):
        assert outcome.status == 0, outcome


def fingerprints(run: TinyRun, step: int) -> dict[str, int]:
    """Of weights, moments and counters, the same number on every mesh."""
    return json.loads((run.checkpoints / str(step) / "progress" / "metadata").read_text())[
        "fingerprints"
    ]


def arrays(run: TinyRun, step: int) -> dict[str, np.ndarray]:
    """Weights, moments and counters, whatever devices they were saved from."""
    checkpointer = ocp.PyTreeCheckpointer()
    path = run.checkpoints / str(step) / "state"
    tree = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    leaves = jax.tree_util.tree_leaves_with_path(checkpointer.restore(path, None, as_numpy))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(run: TinyRun, reference: TinyRun, processes: int) -> None:
    """Equal metrics, samples and files, and state that is equal to the bit."""
    assert run.metrics() == reference.metrics()
    assert_alike(run, reference, processes)
    last = max(run.steps)
    assert fingerprints(run, last) == fingerprints(reference, last)


def assert_alike(run: TinyRun, reference: TinyRun, processes: int) -> None:
    """Equal samples and files; metrics and weights that differ by rounding alone.

    With more than two devices the parts of a sum are added in another order.
    """
    assert run.lines("samples.jsonl") == reference.lines("samples.jsonl")
    assert run.steps == reference.steps
    for mine, theirs in zip(run.metrics(), reference.metrics(), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-5)
        assert mine.get("trace/tokens") == theirs.get("trace/tokens")
    for name in ("tokens", "finish"):
        assert column(run, name) == column(reference, name), name
    for name in ("reward", "advantage", "answer_logprobs"):
        mine, theirs = (column(each, name) for each in (run, reference))
        assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-4), name
    last = max(run.steps)
    found, wanted = arrays(run, last), arrays(reference, last)
    assert found.keys() == wanted.keys()
    for name, array in wanted.items():
        np.testing.assert_allclose(found[name], array, rtol=1e-5, atol=1e-5, err_msg=name)
    logs = [f"log.{process}.txt" for process in range(1, processes)]
    assert [name for name in names(run.directory) if name not in logs] == names(reference.directory)


def column(run: TinyRun, name: str) -> list:
    """Every value of a column of the log of rollouts, those of lists one by one; none in SFT."""
    if not run.rollouts():
        return []
    values = pq.read_table(run.directory / ROLLOUTS)[name].combine_chunks()
    return (values.flatten() if pa.types.is_list(values.type) else values).to_pylist()


def test_two_processes_train_what_one_does(new_run, tmp_path):
    """By `nrt-jax local`, which prints what process 0 prints."""
    alone = TinyRun(new_run().config, tmp_path / "alone", SFT)
    train(alone, 1, 2)
    run = new_run(*SFT)
    words = ["local", "--processes", "2", "--", "train", str(run.config), *SFT]
    outcome = Process([*words, f"run_dir={run.directory}"], tmp_path).end()
    assert outcome.status == 0, outcome
    assert_same(run, alone, processes=2)
    steps = [line for line in outcome.out.splitlines() if line.startswith("step ")]
    assert [line.split()[1] for line in steps] == ["1/2", "2/2"]
    assert outcome.err.count("memory per device: weights") == 1
    assert "memory per device: weights" in (run.directory / "log.1.txt").read_text()


@pytest.fixture(scope="module")
def of_four(tmp_path_factory, tiny_config) -> TinyRun:
    """One process with four devices."""
    run = TinyRun(tiny_config, tmp_path_factory.mktemp("four") / "run", NRT)
    train(run, 1, 4)
    return run


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 4])
def test_nrt_in_several_processes(processes, new_run, of_four):
    run = new_run(*NRT)
    train(run, processes, 4 // processes)
    assert_alike(run, of_four, processes)


@pytest.mark.slow
def test_stopped_and_killed_with_other_numbers_of_processes(new_run, of_four):
    """SIGTERM to one of four, SIGKILL to one of two, and the end in one."""
    run = new_run(*NRT)
    processes = start(run, 4, 1)
    assert processes[0].wait_until(lambda: run.at_line(2))
    processes[2].signal(signal.SIGTERM)
    for outcome in end(processes):
        assert outcome.status == 0, outcome
    stopped = max(run.steps)
    assert stopped == run.metrics()[-1]["step"]
    processes = start(run, 2, 2)
    assert processes[0].wait_until(lambda: run.metrics()[-1]["step"] >= stopped + 2)
    processes[1].signal(signal.SIGKILL)
    first, second = end(processes)
    assert second.status == -signal.SIGKILL
    assert first.status not in (0, -signal.SIGKILL), first
    train(run, 1, 4)
    assert_alike(run, of_four, processes=4)


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_local_starts_all_again(killed, new_run, of_four, tmp_path):
    run = new_run(*NRT)
    words = ["local", "--processes", "2", "--devices-per-process", "2", "--restarts", "1", "--"]
    process = Process(
        [*words, "train", str(run.config), *NRT, f"run_dir={run.directory}"], tmp_path
    )
    assert process.wait_until(lambda: run.at_line(4))
    number = process.process.pid
    children = Path(f"/proc/{number}/task/{number}/children").read_text("utf-8").split()
    os.kill(int(children[killed]), signal.SIGKILL)
    outcome = process.end()
    assert outcome.status == 0, outcome
    assert "starting all again, 0 more starts are left" in outcome.err
    assert_alike(run, of_four, processes=2)


def errors(outcomes: list[Outcome]) -> list[str]:
    """The line of each process, which is the only one; the status is that of a mistake."""
    lines = []
    for outcome in outcomes:
        assert outcome.status == 2, outcome
        (line,) = [text for text in outcome.err.splitlines() if "error" in text]
        lines.append(line.removeprefix("nrt-jax: error: "))
    return lines


def start_differently(
    run: TinyRun, change: Callable[[int], tuple[str, ...]], **of_second: str
) -> list[Outcome]:
    """How two processes end that are started with other words, and another environment."""
    address = f"localhost:{_free_port()}"
    processes = []
    for process in range(2):
        environment = _environment(address, process, 2, 1) | (of_second if process else {})
        processes.append(run.start(*change(process), **environment))
    return end(processes)


def test_other_configs(new_run):
    run = new_run(*SFT)
    said = errors(start_differently(run, lambda process: (f"seed={process}",)))
    assert said == 2 * [
        "config: seed is 0 on process 0 and 1 on process 1; give all processes the same config"
    ]
    assert not run.directory.exists()
