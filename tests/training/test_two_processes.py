"""Import and export by two processes, each of which holds half of every weight."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from tests.training.runs import REPOSITORY, write_model

PATIENCE_S = 300


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def run_both(*arguments: Path) -> list[tuple[int, str]]:
    """The status and what was printed by each."""
    port = free_port()
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.training.two_processes", str(port), str(rank)]
            + [str(argument) for argument in arguments],
            cwd=REPOSITORY,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        printed = [process.communicate(timeout=PATIENCE_S)[0] for process in processes]
        return [
            (process.returncode, text) for process, text in zip(processes, printed, strict=True)
        ]
    finally:
        for process in processes:
            process.kill()


def test_what_two_processes_import_and_export_is_the_source(tmp_path):
    source = write_model(tmp_path / "source", num_attention_heads=4, num_key_value_heads=2)
    for status, printed in run_both(source, tmp_path):
        assert status == 0, printed
    before = load_file(source / "model.safetensors")
    after = load_file(tmp_path / "exported" / "model.safetensors")
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])
    assert (tmp_path / "exported" / "tokenizer.json").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["exported", "imported", "source"]
