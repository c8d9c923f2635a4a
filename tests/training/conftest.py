"""A tiny model with its config, runs that nothing has disturbed, and runs that are refused."""

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nrt_jax.cli import main
from tests.training.runs import TinyRun, write_config, write_model

# The tests' process has eight devices.
SIZES = ("train.batch_prompts=8", "train.mini_batch_prompts=8", "train.micro_batch_prompts=8")


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder / "model")
    return write_config(folder)


@pytest.fixture(scope="session")
def reference(tmp_path_factory, tiny_config) -> Callable[..., TinyRun]:
    """The run of a method from beginning to end, trained once for all tests."""

    @cache
    def train(*overrides: str) -> TinyRun:
        run = TinyRun(tiny_config, tmp_path_factory.mktemp("reference") / "run", overrides)
        outcome = run.trained()
        # Nothing but its own lines, on the stream that they belong to.
        assert outcome.told == []
        assert all(line.startswith("step ") for line in outcome.out.splitlines())
        return run

    return train


@pytest.fixture
def new_run(tmp_path, tiny_config) -> Callable[..., TinyRun]:
    def make(*overrides: str) -> TinyRun:
        return TinyRun(tiny_config, tmp_path / "run", overrides)

    return make


@pytest.fixture
def words(capsys) -> Callable[..., tuple[int, str, str]]:
    """Run a verb in this process; its status and what it printed, out and err."""

    def call(*words: object) -> tuple[int, str, str]:
        status = main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


@pytest.fixture
def refused(tiny_config, tmp_path, capsys) -> Callable[..., str]:
    """Run `train` with overrides in this process; the one line that it prints."""

    def run(*words: object, config: Path = tiny_config) -> str:
        run_dir = f"run_dir={tmp_path / 'run'}"
        assert main(["train", str(config), run_dir, *SIZES, *map(str, words)]) == 2
        captured = capsys.readouterr()
        assert captured.out == ""
        (line,) = captured.err.splitlines()
        prefix = "nrt-jax: error: "
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    return run


@pytest.fixture
def model_copy(tiny_config, tmp_path) -> Path:
    """A folder with a copy of the model and its config, to be broken."""
    shutil.copytree(tiny_config.parent / "model", tmp_path / "model")
    shutil.copy(tiny_config, tmp_path / "tiny.yaml")
    return tmp_path
