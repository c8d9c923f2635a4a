"""Counts and lengths by source, for made-up lengths and for small files."""

import json

import numpy as np
import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data.merge import merge
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.prepare import prepare
from nrt_jax.data.prepared import PreparedExamples
from nrt_jax.data.stats import (
    SourceLengths,
    lengths_of_dataset,
    lengths_of_first_rows,
    summarise_lengths,
    summarise_source,
    together,
)
from nrt_jax.data.tokenizer import Tokenizer
from tests.data.made_tokenizers import write_made_tokenizer


def ints(*values: int) -> np.ndarray:
    return np.asarray(values, np.int32)


def test_lengths():
    assert summarise_lengths(ints(*range(1, 101))) == {
        "mean": 50.5,
        "p50": 50,
        "p90": 90,
        "p99": 99,
        "min": 1,
        "max": 100,
    }
    assert summarise_lengths(ints(7)) == {
        "mean": 7.0,
        **dict.fromkeys(("p50", "p90", "p99", "min", "max"), 7),
    }
    assert summarise_lengths(ints()) is None


def test_sources_and_all_of_them():
    first = SourceLengths("a", ints(1, 3), ints(2, 2), usable=3, left_out={"bad": 1})
    second = SourceLengths("b", ints(), ints(), usable=0, left_out={"bad": 1, "worse": 4})
    found = summarise_source(first)
    assert (found["read"], found["usable"], found["trained"], found["tokens"]) == (4, 3, 2, 8)
    assert summarise_source(second)["prompt"] is None
    found = summarise_source(together([first, second]))
    assert (found["read"], found["usable"], found["trained"]) == (9, 3, 2)
    assert list(found["left_out"].items()) == [("worse", 4), ("bad", 2)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_made_tokenizer("llama3", folder)
    return Tokenizer.load(folder, "<|think_start|>", "<|think_end|>")


@pytest.fixture
def mixture(tmp_path) -> DataConfig:
    """Twenty rows of one source, ten of the other; of each the last one has no answer."""
    for name, rows in {"a": 20, "b": 10}.items():
        lines = [
            {"question": f"{name} {i} " + "more " * i, "answer": "" if i == rows - 1 else "yes"}
            for i in range(rows)
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"{name}.jsonl").write_text(text)
    parts = [
        {"name": name, "path": str(tmp_path / f"{name}.jsonl"), "rows": rows}
        for name, rows in {"a": 8, "b": None}.items()
    ]
    return DataConfig.model_validate({"mixture": parts, "eval_rows": 3, "max_bad_share": 0.2})


def test_every_row_of_a_mixture_is_accounted_for(mixture, tokenizer):
    dataset = load_dataset(mixture, tokenizer)
    first, second = lengths_of_dataset(dataset, "unnamed")
    assert (first.name, first.read, first.usable) == ("a", 20, 19)
    assert (second.name, second.read, second.usable) == ("b", 10, 9)
    assert first.left_out == second.left_out == {"empty 'answer'": 1}
    # Of a eight are drawn, of b all; three of these are held out.
    assert len(first.prompt_tokens) + len(second.prompt_tokens) == 8 + 9 - 3
    trained = [e for e in dataset.train if e.example.source == "b"]
    assert second.prompt_tokens.tolist() == [len(e.prompt_tokens) for e in trained]
    assert second.answer_tokens.tolist() == [len(e.answer_tokens) for e in trained]


def test_prepared_data_are_measured_by_their_manifest(mixture, tokenizer, tmp_path, monkeypatch):
    out = tmp_path / "out"
    merge(prepare(mixture, tokenizer, out, workers=1, share=(0, 1)), 1)
    run = mixture.model_copy(update={"mixture": (), "path": out})
    expected = lengths_of_dataset(load_dataset(mixture, tokenizer), "unnamed")
    dataset = load_dataset(run, tokenizer)
    monkeypatch.setattr(PreparedExamples, "_read", lambda *_: pytest.fail("a record is read"))
    found = lengths_of_dataset(dataset, "unnamed")
    for one, other in zip(found, expected, strict=True):
        assert one.prompt_tokens.tolist() == sorted(other.prompt_tokens)
        assert one.answer_tokens.tolist() == sorted(other.answer_tokens)
        assert (one.name, one.read, one.usable) == (other.name, other.read, other.usable)
        assert one.left_out == other.left_out
        assert summarise_source(one) == summarise_source(other)


def test_the_first_rows_alone(mixture, tokenizer):
    first, second = lengths_of_first_rows(mixture, tokenizer, 10)
    assert (first.read, first.usable, len(first.prompt_tokens)) == (10, 10, 10)
    assert (second.read, second.usable, second.left_out) == (10, 9, {"empty 'answer'": 1})
    assert (np.diff(first.prompt_tokens) > 0).all()
