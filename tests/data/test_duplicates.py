"""Rows that repeat an earlier one: found exactly, left out or kept, and counted either way."""

import logging
import random

import numpy as np

from nrt_jax.data.duplicates import DIGEST_BYTES, Duplicates, digest_of, first_of_equal
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.rows import Row
from nrt_jax.types import Example

ROWS = [
    {"question": "1+2", "answer": "=3"},
    {"question": "1+2", "answer": "=4"},
    {"question": "1+3", "answer": "=3"},
    {"question": "1+2\n", "answer": "=3"},
    {"question": "1+2", "answer": "=3"},
]


def kept(dataset) -> list[int]:
    return [row.example.index for row in dataset.train]


def test_the_first_of_equal_rows_stays(make_config, write_rows, tokenizer):
    """Another answer, another question: no duplicate; white space at the ends: one."""
    path = write_rows(ROWS)
    dataset = load_dataset(make_config(path=path, eval_rows=0), tokenizer)
    assert kept(dataset) == [0, 1, 2]
    assert dataset.bad_rows == {"duplicate": 2}
    fourth, fifth = dataset.rejected
    assert (fourth.file, fourth.row, fourth.reason) == (str(path), "line 4", "duplicate")
    assert fourth.detail == fifth.detail
    assert fourth.detail == (
        f"has the prompt and the answer of {path} line 1; set data.duplicates=keep to train on both"
    )
    assert fourth.excerpt == r'{"question": "1+2\n", "answer": "=3"}'


def test_they_are_kept_and_counted_on_request(make_config, write_rows, tokenizer, caplog):
    config = make_config(path=write_rows(ROWS), eval_rows=0, duplicates="keep")
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(config, tokenizer)
    assert kept(dataset) == [0, 1, 2, 3, 4]
    assert (dataset.bad_rows, dataset.rejected) == ({}, [])
    assert "data: 2 duplicates are kept (data.duplicates=keep)" in caplog.messages


def test_any_share_of_duplicates_is_allowed(make_config, write_rows, tokenizer):
    """They are no damage: nine of ten do not count towards max_bad_share, and a bad row does."""
    path = write_rows([ROWS[0]] * 9 + [ROWS[1]])
    config = make_config(path=path, eval_rows=0, max_bad_share=0)
    assert kept(load_dataset(config, tokenizer)) == [0, 9]


def test_over_all_files_and_sources(make_config, write_rows, tokenizer):
    first, second = write_rows(ROWS[:2], "a.jsonl"), write_rows(ROWS[1:3], "b.jsonl")
    third = write_rows([ROWS[0]], "c.jsonl")
    files = make_config(source=None, path=(first, second), eval_rows=0)
    assert kept(load_dataset(files, tokenizer)) == [0, 1, 3]
    parts = [{"name": "x", "path": first}, {"name": "y", "path": (third, second)}]
    mixture = make_config(source=None, mixture=parts, eval_rows=0)
    dataset = load_dataset(mixture, tokenizer)
    assert kept(dataset) == [0, 1, 4]
    places = [(row.file, row.row, row.detail.split(";")[0]) for row in dataset.rejected]
    assert places == [
        (str(third), "line 1", f"has the prompt and the answer of {first} line 1"),
        (str(second), "line 1", f"has the prompt and the answer of {first} line 2"),
    ]


def test_an_evaluation_keeps_its_own(make_config, write_rows, tokenizer):
    path, held_out = write_rows(ROWS[:1]), write_rows([ROWS[2]] * 3, "eval.jsonl")
    dataset = load_dataset(make_config(path=path, eval_path=held_out), tokenizer)
    assert len(dataset.eval) == 3


def test_where_a_question_ends_counts():
    """Nothing of the question moves into the answer without another digest."""
    one, other = Example(0, "12", "3"), Example(0, "1", "23")
    assert digest_of(one) != digest_of(other)
    assert digest_of(one) == digest_of(Example(7, " 12\n", "3\t", user_text="x", source="y"))
    assert len(digest_of(one)) == DIGEST_BYTES


def test_against_a_dict():
    """Enough rows to grow the table, digests that begin alike, and files of several names."""
    random.seed(1)
    digests = [bytes(8) + random.randbytes(1) + bytes(7) for _ in range(400)]
    digests += [random.randbytes(1) * 2 + random.randbytes(14) for _ in range(3000)]
    digests += random.choices(digests, k=600)
    duplicates, first = Duplicates(), {}
    places = first_of_equal(np.frombuffer(b"".join(digests), f"V{DIGEST_BYTES}"))
    assert places.tolist() == [digests.index(digest) for digest in digests]
    for number, digest in enumerate(digests):
        row = Row(number, f"line {number}", {}, f"{number % 7}.jsonl")
        found = duplicates.find(row, digest)
        place = first.setdefault(digest, f"{row.file} {row.place}")
        if place == f"{row.file} {row.place}":
            assert found is None
        else:
            assert found is not None
            assert f"answer of {place};" in found.detail
    assert duplicates.count == len(digests) - len(first)
