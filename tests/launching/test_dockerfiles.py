"""The Dockerfiles: pinned, small, without root and secrets, and made of files that are there."""

import re
from pathlib import Path

import pytest

from nrt_jax.launching.fill import DIRECTORY
from tests.conftest import REPOSITORY

FILES = sorted(DIRECTORY.glob("Dockerfile.*"))


def instructions(file: Path) -> list[tuple[str, str]]:
    """Name and words of each instruction, continued lines joined."""
    text = re.sub(r"\\\n", " ", file.read_text("utf-8"))
    lines = (line.strip() for line in text.splitlines())
    pairs = (line.partition(" ") for line in lines if line and not line.startswith("#"))
    return [(name, words.strip()) for name, _, words in pairs]


def words_of(file: Path, name: str) -> list[str]:
    return [words for found, words in instructions(file) if found == name]


def test_there_are_two():
    assert [file.name for file in FILES] == ["Dockerfile.cuda", "Dockerfile.tpu"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_base_is_pinned_to_a_patch_version(file):
    for base in words_of(file, "FROM"):
        assert re.search(r":\d+\.\d+\.\d+|@sha256:[0-9a-f]{64}", base), base
        assert "latest" not in base


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_apt_leaves_nothing_behind(file):
    runs = [words for words in words_of(file, "RUN") if "apt-get install" in words]
    assert runs
    for run in runs:
        assert "apt-get update" in run
        assert "--no-install-recommends" in run
        assert "rm -rf /var/lib/apt/lists/*" in run
        packages = re.search(r"--no-install-recommends (.*?) &&", run)
        assert packages
        assert all("=" in package for package in packages[1].split()), packages[1]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_pip_takes_the_lock_and_keeps_no_cache(file):
    for run in words_of(file, "RUN"):
        if "pip install" in run:
            assert "--no-cache-dir" in run
            assert "--no-deps" in run
    locks = re.findall(r"-r (requirements\S+)", file.read_text("utf-8"))
    assert locks
    assert all((REPOSITORY / lock).is_file() for lock in locks)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_is_copied_is_there_and_not_everything(file):
    for copied in words_of(file, "COPY"):
        *sources, _ = copied.split()
        assert "." not in sources
        assert all((REPOSITORY / source).exists() for source in sources), copied
    assert not words_of(file, "ADD")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_the_program_does_not_run_as_root(file):
    (user,) = words_of(file, "USER")
    assert int(user) > 0
    names = [name for name, _ in instructions(file)]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name == "RUN")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_signals_reach_the_program_and_no_secret_is_in_it(file):
    (entry,) = words_of(file, "ENTRYPOINT")
    assert entry == '["tini", "--", "nrt-jax"]'
    assert not re.search(r"(?i)(token|password|secret|api_?key)\s*=", file.read_text("utf-8"))
    assert not words_of(file, "ENV") + words_of(file, "ARG")
