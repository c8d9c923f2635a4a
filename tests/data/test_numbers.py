"""Numbers as questions and answers are text, whatever file they come from."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.pipeline import first_rows, load_dataset

TURNS = '{"messages": [{"role": "user", "content": 5}, {"role": "assistant", "content": 1.50}]}'
NUMBERS = ["5", "5.0", "-0", "0.10", "1e3", "1E-7", "12345678901234567890123", "0"]


@pytest.fixture
def rows(make_config, made):
    """The (question, answer) of each row of a file, or why it is left out."""

    def read(path, source="jsonl", **values):
        found = first_rows(make_config(source, path=path, **values), made("llama3"), 100)
        return [
            row.detail if isinstance(row, BadRow) else (row.example.question, row.example.answer)
            for _, row in found
        ]

    return read


def test_json_numbers_are_text_as_they_are_written(rows, write_rows):
    lines = [f'{{"question": {number}, "answer": {number}}}'.encode() for number in NUMBERS]
    assert rows(write_rows(lines)) == [(number, number) for number in NUMBERS]


def test_numbers_in_turns(rows, write_rows):
    ((question, answer),) = rows(write_rows([TURNS.encode()]), template="tulu")
    assert "\n5\n" in question
    assert answer == "1.50"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("true", "'answer' is True; write it as a string"),
        ("null", "'answer' is null; fill it in or drop the row"),
        ("[5, null]", "'answer[1]' is null; fill it in or drop the row"),
        ("[[5.0]]", "'answer[0]' is [5.0]; write it as a string"),
        ('{"text": 5.0}', "'answer' is {'text': 5.0}; write it as a string"),
        ("NaN", "'answer' is nan; fill it in or drop the row"),
        ("-Infinity", "'answer' is -inf; fill it in or drop the row"),
    ],
)
def test_what_is_no_number(value, said, rows, write_rows):
    assert rows(write_rows([f'{{"question": "q", "answer": {value}}}'.encode()])) == [said]


def test_values_of_other_fields_do_not_matter(rows, write_rows):
    line = b'{"question": "q", "answer": "a", "score": NaN, "ids": [1e999, null], "ok": true}'
    assert rows(write_rows([line])) == [("q", "a")]


@pytest.mark.parametrize(
    ("values", "texts"),
    [
        (pyarrow.array([5, 2**62, -1]), ["5", "4611686018427387904", "-1"]),
        (pyarrow.array([2**64 - 1], pyarrow.uint64()), ["18446744073709551615"]),
        # A column of integers with one missing, as pandas writes it.
        (pyarrow.array([42.0, -7.0, float("nan"), None]), ["42", "-7", None, None]),
        (pyarrow.array([0.1, 5.0, 1e16, 1e300]), ["0.1", "5", "1e+16", "1e+300"]),
        (pyarrow.array([0.1, 3.14], pyarrow.float32()), ["0.1", "3.14"]),
        (pyarrow.array([1, 2]).cast(pyarrow.decimal128(21, 2)), ["1.00", "2.00"]),
    ],
    ids=str,
)
def test_parquet_numbers(values, texts, rows, tmp_path):
    path = tmp_path / "rows.parquet"
    table = pyarrow.table({"question": ["q"] * len(values), "answer": values})
    pyarrow.parquet.write_table(table, path)
    found = rows(path, "parquet")
    assert [row[1] if isinstance(row, tuple) else None for row in found] == texts
    missing = [row for row in found if not isinstance(row, tuple)]
    assert all(row.endswith("; fill it in or drop the row") for row in missing)


def test_only_the_columns_of_the_config_are_read(rows, tmp_path):
    """Of a chat the messages alone, else question and answer."""
    odd = pyarrow.array([1_700_000_000_123_456_789], pyarrow.timestamp("ns"))
    turns = json.loads(TURNS)["messages"]
    turns = [turn | {"content": str(turn["content"])} for turn in turns]
    columns = {"when": odd, "question": odd, "answer": ["a"], "ask": ["1+1"], "messages": [turns]}
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    assert rows(path, "parquet", question_field="ask") == [("1+1", "a")]
    ((_, answer),) = rows(path, "parquet", template="tulu")
    assert answer == "1.5"
    assert rows(path, "parquet") == [
        "'question' is a value of the type timestamp[ns]; write it as a string"
    ]


def test_training_reads_what_is_shown(make_config, write_rows, made):
    path = write_rows([{"question": i, "answer": i + 1} for i in range(3)])
    dataset = load_dataset(make_config(path=path, eval_rows=0), made("llama3"))
    assert [example.example.answer for example in dataset.train] == ["1", "2", "3"]
