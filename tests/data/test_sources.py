"""The two file formats, and files that cannot be read."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from nrt_jax.data.sources import read_rows
from nrt_jax.errors import InputError

ROWS = [{"question": "1+2", "answer": "=3"}, {"question": "größer 数", "answer": None}]


def test_jsonl_numbers_physical_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = (json.dumps(row, ensure_ascii=False) for row in ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\n{second}".encode())
    rows = list(read_rows("jsonl", path))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [0, 2]
    assert [row.place for row in rows] == ["line 1", "line 3"]


def test_parquet_gives_the_same_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    many = ROWS * 1000  # more than one read
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), path, row_group_size=300)
    rows = list(read_rows("parquet", path))
    assert [row.fields for row in rows] == many
    assert [row.number for row in rows] == list(range(2000))
    assert rows[1500].place == "row 1500"


def test_parquet_keeps_chat_turns(tmp_path):
    path = tmp_path / "chat.parquet"
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert [found.fields for found in read_rows("parquet", path)] == [row]


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_missing_file_and_directory(source, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(InputError) as caught:
        list(read_rows(source, missing))
    assert str(caught.value) == (
        f"{missing}: No such file or directory; set data.path or data.eval_path to a file"
    )
    with pytest.raises(InputError) as caught:
        list(read_rows(source, tmp_path))
    assert str(caught.value) == (
        f"{tmp_path}: Is a directory; set data.path or data.eval_path to a file"
    )


def test_a_file_that_is_no_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(InputError) as caught:
        list(read_rows("parquet", path))
    text = str(caught.value)
    assert text.startswith(f"{path}: not a readable Parquet file (")
    assert text.endswith("); check data.source")
    assert "\n" not in text
