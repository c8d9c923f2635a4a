"""A tiny model with its config, and runs of it that nothing has disturbed."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nrt_jax.cli import main
from tests.training.runs import TinyRun, write_config, write_model


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
