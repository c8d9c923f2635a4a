"""Programs that write down how they are called, in place of those of clouds and clusters."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest


class Fakes:
    """A folder of programs that comes first on the path."""

    def __init__(self, folder: Path):
        self.folder, self.calls_file = folder, folder / "calls"
        folder.mkdir()

    def add(self, name: str, script: str = "") -> None:
        """A program that writes its words down, and goes on with a script of bash."""
        program = self.folder / name
        call = f'printf "%s\\n" "{name} $*" >>"{self.calls_file}"\n'
        program.write_text(f"#!/bin/bash\n{call}{script}\n")
        program.chmod(0o755)

    @property
    def calls(self) -> list[str]:
        return self.calls_file.read_text().splitlines() if self.calls_file.exists() else []

    def environment(self, **more: str) -> dict[str, str]:
        return os.environ | {"PATH": f"{self.folder}:{os.environ['PATH']}", "HOME": "/tmp"} | more

    def run(self, script: Path, *words: str, **more: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["bash", str(script), *words],
            env=self.environment(**more),
            cwd=self.folder,
            capture_output=True,
            text=True,
        )


@pytest.fixture
def fakes(tmp_path) -> Fakes:
    return Fakes(tmp_path / "fakes")


@pytest.fixture
def printed(capsys) -> Callable[..., str]:
    """What `nrt-jax launch` prints for these words, with --dry-run."""
    from nrt_jax import cli

    def run(*words: str) -> str:
        assert cli.main(["launch", *words, "--dry-run"]) == 0
        return capsys.readouterr().out

    return run
