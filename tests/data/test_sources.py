"""JSON Lines and Parquet, values of every type, and files of other kinds."""

import bz2
import decimal
import json
import os

import pyarrow
import pyarrow.parquet
import pytest

from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.parquet_values import Unreadable
from nrt_jax.data.sources import read_rows
from nrt_jax.errors import InputError

ROWS = [{"question": "1+2", "answer": "=3"}, {"question": "größer 数", "answer": None}]


def test_jsonl_numbers_physical_lines(tmp_path):
    path = tmp_path / "rows.jsonl"
    first, second = (json.dumps(row, ensure_ascii=False) for row in ROWS)
    path.write_bytes(b"\xef\xbb\xbf" + f"{first}\r\n\n{second}".encode())
    rows = list(read_rows("jsonl", path, list))
    assert [row.fields for row in rows] == ROWS
    assert [row.number for row in rows] == [0, 2]
    assert [row.place for row in rows] == ["line 1", "line 3"]


def test_parquet_gives_the_same_rows(tmp_path):
    path = tmp_path / "rows.parquet"
    many = ROWS * 1000  # more than one read
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(many), path, row_group_size=300)
    rows = list(read_rows("parquet", path, list))
    assert [row.fields for row in rows] == many
    assert [row.number for row in rows] == list(range(2000))
    assert rows[1500].place == "row 1500"


def test_parquet_keeps_chat_turns(tmp_path):
    path = tmp_path / "chat.parquet"
    row = {"messages": [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    assert [found.fields for found in read_rows("parquet", path, list)] == [row]


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_missing_file_and_directory(source, tmp_path):
    missing = tmp_path / "missing"
    with pytest.raises(InputError) as caught:
        list(read_rows(source, missing, list))
    assert str(caught.value) == (
        f"{missing}: No such file or directory; set data.path or data.eval_path to a file"
    )
    with pytest.raises(InputError) as caught:
        list(read_rows(source, tmp_path, list))
    assert str(caught.value) == (
        f"{tmp_path}: Is a directory; set data.path or data.eval_path to a file"
    )


def test_a_file_that_is_no_parquet(tmp_path):
    path = tmp_path / "rows.parquet"
    path.write_text(json.dumps(ROWS[0]))
    with pytest.raises(InputError) as caught:
        list(read_rows("parquet", path, list))
    text = str(caught.value)
    assert text.startswith(f"{path}: not a readable Parquet file (")
    assert text.endswith("); check data.source")
    assert "\n" not in text


# --- JSON Lines: other texts ---------------------------------------------------------------------

LINE = '{"question": "1+2", "answer": "3"}'


def refusal(source: str, path, fields_of=list) -> str:
    with pytest.raises(InputError) as caught:
        list(read_rows(source, path, fields_of))
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{path}: ")
    return text.removeprefix(f"{path}: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"[{LINE}, {LINE}]", "is a JSON array, not one object per line; convert it: jq -c '.[]'"),
        (f"[\n{LINE}\n]\n", "is a JSON array"),
        (f"\ufeff\n[{LINE},\n{LINE}]", "is a JSON array"),
        (json.dumps([json.loads(LINE)] * 2, indent=1), "is a JSON array"),
        ("[]", "is a JSON array"),
        (json.dumps(json.loads(LINE), indent=2), "has JSON objects over several lines, not one"),
        ('{"question": "1+2",\n "answer": "3"}\n' * 3, "has JSON objects over several lines"),
        ("question,answer\n1+2,3\n", "is no JSON Lines but looks like CSV (its first line is 'que"),
        ('question;answer\n"1; 2";3\n', "is no JSON Lines but looks like CSV"),
        ('question\tanswer\n"1\n2"\t3\n', "is no JSON Lines but looks like CSV"),
        ("- question: 1\n  answer: 2\n", "is no JSON Lines (its first line is '- question: 1')"),
        (
            "Dear reader, hello\nworld\n",
            "is no JSON Lines (its first line is 'Dear reader, hello')",
        ),
    ],
)
def test_texts_that_are_no_json_lines(text, said, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    assert refusal("jsonl", path).startswith(said)


@pytest.mark.parametrize(
    ("text", "reasons"),
    [
        (f"[1]\n{LINE}\n", ["not an object", None]),
        (f"{LINE}\n[1]\n", [None, "not an object"]),
        (f'{{"question":\n{LINE}\n', ["bad JSON", None]),
        ("{'question': 1}\n{'question': 2}\n", ["bad JSON", "bad JSON"]),
        (f"{LINE},\n{LINE},\n", ["bad JSON", "bad JSON"]),
        ('{"a": 1, "a": 2}\n{"b": {"a": 1, "a": 2}}\n', ["key twice", "key twice"]),
        (f'{LINE}\n{{"a": {"[" * 9999}', [None, "bad JSON"]),
    ],
)
def test_lines_that_are_bad_one_by_one(text, reasons, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(text)
    found = [row.fields for row in read_rows("jsonl", path, list)]
    assert [getattr(fields, "reason", None) for fields in found] == reasons


def test_a_key_twice_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"answer": "1", "answer": "2"}')
    (row,) = read_rows("jsonl", path, list)
    assert isinstance(row.fields, BadRow)
    assert row.fields.detail == (
        """in '{"answer": "1", "answer": "2"}' the key 'answer' occurs twice in one object; """
        "keep one"
    )


@pytest.mark.parametrize("source", ["jsonl", "parquet"])
def test_files_of_other_kinds(source, tmp_path):
    path = tmp_path / "rows"
    path.write_bytes(bz2.compress(LINE.encode()))
    assert refusal(source, path).startswith("is compressed with bzip2; decompress it with bunzip2")
    path.write_text(LINE, encoding="utf-16")
    assert refusal(source, path).startswith("is text in UTF-16; save it as UTF-8")
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert refusal(source, path).startswith("is a Git LFS pointer, not the file itself")
    path.unlink()
    os.symlink("/nowhere/rows", path)
    assert refusal(source, path).startswith("is a symbolic link to /nowhere/rows, which does not")


def test_parquet_read_as_json_lines(tmp_path):
    path = write_parquet(tmp_path, question=["1"])
    assert refusal("jsonl", path) == (
        "is a Parquet file; rows in it are read with data.source=parquet"
    )


# --- Parquet: columns and types ------------------------------------------------------------------

NANOSECONDS = pyarrow.array([1_700_000_000_123_456_789] * 2, pyarrow.timestamp("ns"))
ODD = {
    "timestamp[ns]": NANOSECONDS,
    "duration[ns]": pyarrow.array([1, 2], pyarrow.duration("ns")),
    "timestamp[us]": pyarrow.array([2**60] * 2, pyarrow.timestamp("us")),
    "timestamp[us, tz=US/Nowhere]": pyarrow.array([1, 2], pyarrow.timestamp("us", "US/Nowhere")),
    "time64[ns]": pyarrow.array([1, 2], pyarrow.time64("ns")),
}


def write_parquet(folder, **columns):
    path = folder / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


def values(path, *columns) -> list:
    """The values of the columns, row by row."""
    rows = []
    for row in read_rows("parquet", path, lambda names: columns):
        assert isinstance(row.fields, dict)
        rows.append(tuple(row.fields[column] for column in columns))
    return rows


def test_columns_that_nobody_asks_for_are_not_read(tmp_path):
    odd = {f"odd{i}": array for i, array in enumerate(ODD.values())} | {"answer.at": NANOSECONDS}
    path = write_parquet(tmp_path, question=["1", "2"], answer=["3", "4"], **odd)
    assert values(path, "answer", "question") == [("3", "1"), ("4", "2")]


def test_damage_in_a_column_that_nobody_asks_for(tmp_path):
    path = write_parquet(tmp_path, answer=["3"] * 9, other=["x"] * 9)
    column = pyarrow.parquet.ParquetFile(path).metadata.row_group(0).column(1)
    content = bytearray(path.read_bytes())
    start = column.dictionary_page_offset
    content[start : start + column.total_compressed_size] = b"\xff" * column.total_compressed_size
    path.write_bytes(content)
    assert refusal("parquet", path).startswith("not a readable Parquet file (")
    assert values(path, "answer") == [("3",)] * 9


@pytest.mark.parametrize("kind", ODD)
def test_values_that_python_cannot_hold(kind, tmp_path):
    path = write_parquet(tmp_path, answer=ODD[kind])
    assert repr(values(path, "answer")[0][0]) == f"a value of the type {kind}"


def test_one_odd_field_spoils_no_turn(tmp_path):
    kind = pyarrow.struct({"role": pyarrow.string(), "at": pyarrow.timestamp("ns")})
    turns = [{"role": "user", "at": 1}, {"role": "assistant", "at": 2_000}]
    for outer in (pyarrow.list_(kind), pyarrow.large_list(kind), pyarrow.list_(kind, 2)):
        path = write_parquet(tmp_path, messages=pyarrow.array([turns, None], outer))
        ((found,), (none,)) = values(path, "messages")
        assert [turn["role"] for turn in found] == ["user", "assistant"]
        assert isinstance(found[0]["at"], Unreadable)
        assert none is None


def test_text_that_is_not_utf8_spoils_no_other_row(tmp_path):
    bad = pyarrow.array([b"\xff", b"3"]).view(pyarrow.string())
    ((first,), second) = values(write_parquet(tmp_path, answer=bad), "answer")
    assert repr(first) == "bytes that are not UTF-8"
    assert second == ("3",)


def test_a_column_twice(tmp_path):
    two = pyarrow.array(["1", "2"])
    names = ["question", "x", "x", "answer", "answer"]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_arrays([two] * 5, names=names), path)
    assert refusal("parquet", path, lambda _: ["question", "answer"]) == (
        "has 2 columns named 'answer', and which one is meant is not known; rename or drop the "
        "others"
    )
    # Nobody asks for the other one.
    assert values(path, "question") == [("1",), ("2",)]


def test_a_field_of_turns_twice(tmp_path):
    two = pyarrow.array(["1", "2"])
    turns = pyarrow.StructArray.from_arrays([two] * 3, names=["role", "content", "content"])
    path = write_parquet(tmp_path, messages=pyarrow.ListArray.from_arrays([0, 1, 2], turns))
    (first, _) = values(path, "messages")
    assert repr(first[0][0]) == "a struct with the field 'content' twice"


def test_a_column_that_is_missing(tmp_path):
    path = write_parquet(tmp_path, query=["1"], reply=["2"])
    assert refusal("parquet", path, lambda _: ["question", "answer"]) == (
        "has no column 'question' (it has 'query', 'reply'); name the columns in "
        "data.question_field and data.answer_field, or in data.messages_field"
    )


@pytest.mark.parametrize(
    "array",
    [
        pyarrow.array(["a", "b", None]).dictionary_encode(),
        pyarrow.array(["a", "b", None], pyarrow.large_string()),
        pyarrow.array(["a", "b", None], pyarrow.string_view()),
        pyarrow.chunked_array([["a"], ["b", None]]),
    ],
    ids=str,
)
def test_every_way_to_store_text(array, tmp_path):
    assert values(write_parquet(tmp_path, answer=array), "answer") == [("a",), ("b",), (None,)]


def test_floats_are_the_shortest_that_their_type_has(tmp_path):
    for kind in (pyarrow.float32(), pyarrow.float64()):
        path = write_parquet(tmp_path, answer=pyarrow.array([0.1, 5.0, None], kind))
        assert values(path, "answer") == [(0.1,), (5.0,), (None,)]
    half = pyarrow.array([0.1], pyarrow.float16())
    assert values(write_parquet(tmp_path, answer=half), "answer") == [(0.1,)]


def test_decimals_keep_their_scale(tmp_path):
    cents = pyarrow.array([decimal.Decimal("5.00")])
    ((value,),) = values(write_parquet(tmp_path, answer=cents), "answer")
    assert str(value) == "5.00"


def test_a_file_without_rows(tmp_path):
    assert values(write_parquet(tmp_path, answer=pyarrow.array([], "string")), "answer") == []


@pytest.mark.parametrize("damage", ["cut", "page", "short", "empty"])
def test_damaged_parquet(damage, tmp_path):
    path = write_parquet(tmp_path, answer=["a"] * 100)
    whole = path.read_bytes()
    page = whole[:8] + b"\xff" * 30 + whole[38:]
    content = {"cut": whole[:-20], "page": page, "short": b"PAR1", "empty": b""}[damage]
    path.write_bytes(content)
    assert refusal("parquet", path).startswith("not a readable Parquet file (")
