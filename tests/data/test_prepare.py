"""Prepared data: the rows of `load_dataset`, the same bytes however many processes make them."""

import json
from itertools import islice
from pathlib import Path

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data import merge, plan, prepare
from nrt_jax.data.pipeline import BatchIterator, Dataset, load_dataset
from nrt_jax.types import TokenizedExample


def additions(count: int, first: int = 0) -> list:
    """Questions of which some are asked twice, and unusable rows."""
    rows: list = [
        {"question": f"{i % 23}+{i % 7}", "answer": [f"={i % 23 + i % 7}", f"{i}"]}
        for i in range(first, first + count)
    ]
    return [*rows[:5], b"{broken", *rows[5:], {"question": "", "answer": "=1"}]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(plan, "ROWS_PER_PART", 16)
    monkeypatch.setattr(prepare, "ROWS_PER_PART", 16)
    monkeypatch.setattr(merge, "SHARD_BYTES", 3000)


@pytest.fixture
def make(make_config, tokenizer, tmp_path):
    """Prepare a config in a folder."""

    def prepared(config: DataConfig, out: str | Path = "out", shares=((0, 1),), workers=1) -> Path:
        for share in shares:
            begun = prepare.prepare(config, tokenizer, tmp_path / out, workers=workers, share=share)
        merge.merge(begun, workers)
        return tmp_path / out

    return prepared


def as_values(example: TokenizedExample) -> tuple:
    return (
        example.example,
        example.prompt_tokens.tolist(),
        example.answer_tokens.tolist(),
        example.after_start_tokens.tolist(),
        example.prompt_tokens.dtype,
    )


def values(dataset: Dataset) -> tuple:
    train, held_out = ([as_values(e) for e in of] for of in (dataset.train, dataset.eval))
    return train, held_out, dataset.bad_rows


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def from_prepared(config: DataConfig, out: Path) -> DataConfig:
    changes = {"path": out, "source": None, "mixture": (), "eval_path": None}
    return config.model_copy(update=changes)


@pytest.fixture
def configs(make_config, write_rows):
    """Held-out rows, an evaluation file, and a mixture."""
    rows = write_rows(additions(90))
    more = write_rows(additions(40, first=300), "more.jsonl")
    held = write_rows(additions(6, first=3), "held.jsonl")
    loose = {"max_bad_share": 0.5, "eval_rows": 7, "seed": 3}
    parts = [{"name": "a", "path": rows, "rows": 50}, {"name": "b", "path": more}]
    return {
        "held out": make_config(path=rows, **loose),
        "evaluation file": make_config(path=rows, eval_path=held, **loose),
        "mixture": make_config(source=None, mixture=parts, eval_path=held, **loose),
        "several files": make_config(path=[rows, more], template="tulu", **loose),
    }


@pytest.mark.parametrize("kind", ["held out", "evaluation file", "mixture", "several files"])
def test_the_rows_are_those_of_the_files(kind, configs, make, tokenizer):
    config = configs[kind]
    out = make(config)
    expected = load_dataset(config, tokenizer)
    found = load_dataset(from_prepared(config, out), tokenizer)
    assert values(found) == values(expected)
    assert len(expected.train) > 40
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == list(expected.rejected)


def test_batches_are_the_same(configs, make, tokenizer):
    config = configs["held out"]
    datasets = (
        load_dataset(config, tokenizer),
        load_dataset(from_prepared(config, make(config)), tokenizer),
    )
    batches = [islice(BatchIterator(d.train, 8, True, 5), 30) for d in datasets]
    for one, other in zip(*batches, strict=True):
        assert list(map(as_values, one)) == list(map(as_values, other))
