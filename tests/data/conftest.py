"""The quickstart's tokenizer, and files of rows in its alphabet."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data import merge, plan, prepare
from nrt_jax.data.task_tokenizers import write_quickstart_tokenizer
from nrt_jax.data.tokenizer import Tokenizer
from tests.data.made_tokenizers import write_made_tokenizer
from tests.data.templates import TEMPLATES

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


@pytest.fixture(scope="session")
def llama_directory(shared_data) -> Path:
    directory = shared_data / "tokenizers" / "llama3_1"
    if not directory.is_dir():
        pytest.skip(f"no tokenizer at {directory}")
    return directory


@pytest.fixture(scope="session")
def llama(llama_directory) -> Tokenizer:
    """Its think tokens take the names of two reserved tokens."""
    return Tokenizer.load(llama_directory)


@pytest.fixture(scope="session")
def llama_reference(llama_directory):
    """The same directory, read by transformers."""
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(llama_directory)


@pytest.fixture(scope="session")
def made_directory(tmp_path_factory) -> Callable[[str], Path]:
    """The directory of a small tokenizer of a kind."""
    folder = tmp_path_factory.mktemp("made")
    return cache(lambda kind: write_made_tokenizer(kind, folder / kind))


@pytest.fixture(scope="session")
def made(made_directory) -> Callable[[str], Tokenizer]:
    return cache(lambda kind: Tokenizer.load(made_directory(kind)))


@pytest.fixture(scope="session")
def made_reference(made_directory):
    """The same directories, read by transformers."""
    transformers = pytest.importorskip("transformers")
    return cache(lambda kind: transformers.AutoTokenizer.from_pretrained(made_directory(kind)))


@pytest.fixture
def load(made, made_reference, request):
    """Our tokenizer of a kind, and transformers'; the real ones are skipped without data."""

    def both(kind):
        if kind in ("mistral", "llama"):
            return request.getfixturevalue(kind), request.getfixturevalue(f"{kind}_reference")
        return made(kind), made_reference(kind)

    return both


@pytest.fixture(scope="session")
def template_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("templates")
    for name, text in TEMPLATES.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def config(template_files):
    """A config with a template of a file, or one by its own name."""

    def make(template: str = "tulu", **values) -> DataConfig:
        if template in TEMPLATES:
            values |= {"template": "tokenizer", "template_file": template_files / template}
        else:
            values |= {"template": template}
        return DataConfig(source="chain_addition", **values)

    return make


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


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 16 rows and shards of 3,000 bytes, so that a few rows make several."""
    monkeypatch.setattr(plan, "ROWS_PER_PART", 16)
    monkeypatch.setattr(prepare, "ROWS_PER_PART", 16)
    monkeypatch.setattr(merge, "SHARD_BYTES", 3000)
