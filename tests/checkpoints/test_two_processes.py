"""Import, export and rollouts by two processes, each of which holds half of every weight."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.training.runs import REPOSITORY, write_model

PATIENCE_S = 300


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run(module: str, *arguments: object, processes: int = 2) -> list[tuple[int, str]]:
    """The status and what was printed by each process of `tests.module PORT RANK ARGUMENTS`."""
    port = free_port()
    started = [
        subprocess.Popen(
            [sys.executable, "-m", f"tests.{module}", str(port), str(rank)]
            + [str(argument) for argument in arguments],
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        printed = [process.communicate(timeout=PATIENCE_S)[0] for process in started]
        return [(process.returncode, text) for process, text in zip(started, printed, strict=True)]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_what_two_processes_import_and_export_is_the_source(tmp_path):
    source = write_model(tmp_path / "source", num_attention_heads=4, num_key_value_heads=2)
    for status, printed in run("checkpoints.two_processes", source, tmp_path):
        assert status == 0, printed
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "exported" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    assert (tmp_path / "exported" / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "imported", "source"]


def sampled(out: Path, processes: int) -> list[dict]:
    """The traces and scores of each process, from the same four devices in all."""
    out.mkdir()
    for status, printed in run("training.two_samplers", processes, out, processes=processes):
        assert status == 0, printed
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_what_two_processes_sample_is_what_one_samples(tmp_path):
    """Seven prompts of three copies in four slots, so that each slot is used again."""
    (alone,) = sampled(tmp_path / "one", 1)
    first, second = sampled(tmp_path / "two", 2)
    assert first == second == alone
    lengths = [len(trace[0]) for trace in alone["traces"]]
    assert len(lengths) == 21
    assert len(set(lengths)) > 4, "sequences that end at different times"
    assert all(np.isfinite(trace[1]).all() for trace in alone["traces"])
