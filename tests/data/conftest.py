"""The quickstart's tokenizer, and files of rows in its alphabet."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from nrt_jax.data.config import DataConfig
from nrt_jax.data.quickstart_tokenizer import write_quickstart_tokenizer
from nrt_jax.data.tokenizer import Tokenizer

MISTRAL_THINK = {"think_start": "[control_12]", "think_end": "[control_13]"}


@pytest.fixture(scope="session")
def quickstart_directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_quickstart_tokenizer(directory)
    return directory


@pytest.fixture(scope="session")
def tokenizer(quickstart_directory) -> Tokenizer:
    return Tokenizer.load(quickstart_directory)


@pytest.fixture(scope="session")
def mistral_directory(shared_data) -> Path:
    directory = shared_data / "tokenizers" / "mistral_v3_fast"
    if not directory.is_dir():
        pytest.skip(f"no tokenizer at {directory}")
    return directory


@pytest.fixture(scope="session")
def mistral(mistral_directory) -> Tokenizer:
    return Tokenizer.load(mistral_directory, **MISTRAL_THINK)


@pytest.fixture(scope="session")
def mistral_reference(mistral_directory):
    """The same directory, read by transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(mistral_directory)


@pytest.fixture
def make_config(quickstart_directory) -> Callable[..., DataConfig]:
    """A config of a data file (or generator) with the quickstart's tokenizer."""

    def make(source: str = "jsonl", **values) -> DataConfig:
        return DataConfig(source=source, tokenizer=quickstart_directory, **values)

    return make


@pytest.fixture
def write_rows(tmp_path) -> Callable[..., Path]:
    """Write a JSONL file; a row is an object, or a line as it is."""

    def write(rows: list, name: str = "rows.jsonl") -> Path:
        lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
        path = tmp_path / name
        path.write_bytes(b"\n".join(lines) + b"\n")
        return path

    return write
