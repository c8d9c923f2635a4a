"""References that all tests of models share, and a copy of one to damage."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.models.references import Reference, make_reference


@pytest.fixture(scope="session")
def reference_of(tmp_path_factory) -> Callable[[str], Reference]:
    """What transformers computes of a variant; made once, so nothing in it may be changed."""
    folder = tmp_path_factory.mktemp("references")
    return lambda name: make_reference(name, folder)


@pytest.fixture
def copy(reference_of, tmp_path) -> Path:
    """A directory of an untied Llama, to be changed."""
    return Path(shutil.copytree(reference_of("llama_mha").directory, tmp_path / "copy"))
