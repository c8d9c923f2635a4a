"""A list of rows to leave out: all of them are found, or the list is refused."""

import json
import logging

import pytest

from nrt_jax.data.bad_rows import rejected_lines
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.errors import InputError

ROWS = [{"question": f"{i}+1", "answer": "=1"} for i in range(4)]


@pytest.fixture
def load(make_config, write_rows, tokenizer):
    def load(path, listed: list, **settings):
        leave_out = write_rows(listed, "list.jsonl")
        config = make_config(source=None, path=path, eval_rows=0, leave_out=leave_out, **settings)
        return load_dataset(config, tokenizer)

    return load


def test_listed_rows_are_left_out(load, write_rows, tmp_path):
    """From one of two files, which both have such a row; the reason is the list's."""
    paths = (write_rows(ROWS[:2], "a.jsonl"), write_rows(ROWS[2:], "b.jsonl"))
    listed = [
        {"file": str(paths[1]), "row": "line 1", "reason": "near-duplicate"},
        {"file": str(paths[1]), "row": "line 2", "excerpt": json.dumps(ROWS[3]), "more": 1},
    ]
    dataset = load(paths, listed, max_bad_share=0)
    assert [row.example.index for row in dataset.train] == [0, 1]
    assert dataset.bad_rows == {"near-duplicate": 1, "named by data.leave_out": 1}
    assert dataset.rejected[0].detail == f"{tmp_path}/list.jsonl line 1 names it"


def test_a_list_of_rejected_rows(load, write_rows):
    """The rows that one run rejected are left out of the next, damaged or not."""
    path = write_rows([*ROWS, ROWS[0], {"question": "2+2", "answer": ""}, b'{"question'])
    first = load(path, [], max_bad_share=0.5)
    assert [row.reason for row in first.rejected] == ["duplicate", "empty 'answer'", "bad JSON"]
    listed = rejected_lines(first.rejected).splitlines()
    second = load(path, listed, max_bad_share=0)
    assert [row.example.index for row in second.train] == [0, 1, 2, 3]
    assert second.bad_rows == first.bad_rows


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ({"row": "line 1"}, "line 1: 'file' is None; give file and row as in rejected.jsonl"),
        ({"file": "PATH", "row": None}, "line 1: 'row' is None; give file and row as in rejected"),
        (b"{", "line 1: '{' is not JSON"),
        (
            {"file": "PATH", "row": "line 9"},
            "line 1: names PATH line 9, which is not among the training rows (1 such lines); make",
        ),
        (
            {"file": "OTHER", "row": "line 1"},
            "line 1: names OTHER line 1, which is not among the training rows (1 such lines); make",
        ),
        (
            {"file": "PATH", "row": "line 2", "excerpt": '{"question": "8+1"}'},
            "line 1: PATH line 2 is no longer the row that was listed "
            """('{"question": "8+1"}'); make the list again from this data""",
        ),
    ],
)
def test_a_list_that_does_not_fit(line, said, load, write_rows):
    path = write_rows(ROWS)
    if isinstance(line, dict):
        line = {key: str(path) if value == "PATH" else value for key, value in line.items()}
    with pytest.raises(InputError) as caught:
        load(path, [line])
    assert f"list.jsonl {said}" in str(caught.value).replace(str(path), "PATH")
    assert "\n" not in str(caught.value)


def test_a_file_that_two_sources_read(make_config, write_rows, tokenizer):
    path = write_rows(ROWS)
    leave_out = write_rows([{"file": str(path), "row": "line 2"}], "list.jsonl")
    parts = [{"name": name, "path": path} for name in ("a", "b")]
    settings = {"eval_rows": 0, "leave_out": leave_out, "duplicates": "keep"}
    config = make_config(source=None, mixture=parts, **settings)
    dataset = load_dataset(config, tokenizer)
    assert [row.example.index for row in dataset.train] == [0, 2, 3, 4, 6, 7]


def test_rows_that_are_not_read(make_config, write_rows, tokenizer, caplog):
    """Of a permuted order the list may have any row; those that are read are left out."""
    path = write_rows(ROWS)
    listed = [{"file": str(path), "row": f"line {i + 1}"} for i in (1, 2)]
    config = make_config(
        path=path,
        eval_rows=0,
        leave_out=write_rows(listed, "list.jsonl"),
        permutation_seed=0,  # 2 0 1 3
        train_rows=1,
        max_bad_share=0.5,
    )
    with caplog.at_level(logging.INFO):
        dataset = load_dataset(config, tokenizer)
    assert [row.example.index for row in dataset.train] == [0]
    assert f"1 of 2 rows in data.leave_out={config.leave_out} are not among" in caplog.text
