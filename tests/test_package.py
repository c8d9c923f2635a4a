"""What is installed: the wheel with its presets, and neither TensorFlow nor torch."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import REPOSITORY

UNWANTED = {"tensorflow", "torch", "pytest", "seqio"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(folder)]
    subprocess.run(command, cwd=REPOSITORY, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def files(folder: Path) -> set[str]:
    paths = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc")
    return {path.relative_to(folder).as_posix() for path in paths}


def required(text: str) -> set[str]:
    """The packages of a lock, or of the `Requires-Dist` of a wheel without its extras."""
    return {match.lower() for match in re.findall(r"^(?:Requires-Dist: )?([\w.-]+)", text, re.M)}


def test_the_wheel_has_the_package_and_the_presets(wheel):
    package = {f"nrt_jax/{name}" for name in files(REPOSITORY / "nrt_jax")}
    presets = {f"nrt_jax/configs/{name}" for name in files(REPOSITORY / "configs")}
    launch = {f"nrt_jax/launch/{name}" for name in files(REPOSITORY / "launch")}
    assert "nrt_jax/configs/quickstart/base_model/model.safetensors" in presets
    names = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert names == package | presets | launch


def test_the_wheel_asks_for_no_more_than_it_needs(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    core = "\n".join(line for line in lines if "Requires-Dist" in line and "extra ==" not in line)
    assert {"jax", "transformers"} <= required(core)
    assert not (UNWANTED | {"google-jetstream"}) & required(core)


def test_presets_are_found_in_the_installed_package(wheel, tmp_path):
    installed, empty = tmp_path / "installed", tmp_path / "empty"
    wheel.extractall(installed)
    empty.mkdir()
    result = subprocess.run(
        [sys.executable, "-m", "nrt_jax", "config", "show", "quickstart/nrt", "methods/rlpr"],
        cwd=empty,
        env=os.environ | {"PYTHONPATH": str(installed)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert f"path: {installed}/nrt_jax/configs/quickstart/base_model\n" in result.stdout
    assert "scheme: am\n" in result.stdout


def test_the_locks_have_no_tensorflow():
    for lock in REPOSITORY.glob("requirements*.txt"):
        unwanted = UNWANTED - {"torch", "pytest"} if lock.stem == "requirements-test" else UNWANTED
        assert not unwanted & required(lock.read_text("utf-8")), lock.name
