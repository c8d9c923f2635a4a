"""Arrays, tables, packed files and Arrow files: their rows, their damage, and their memory."""

import gzip
import json
import tracemalloc
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.sources import read_rows
from nrt_jax.data.training_rows import read_source
from nrt_jax.errors import InputError

ROWS = [{"question": "1+2", "answer": "3"}, {"question": "größer 数\n", "answer": "4.0"}]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def zstd(content: bytes) -> bytes:
    return pyarrow.compress(content, codec="zstd", asbytes=True)


def read(path: Path, content: bytes | str, source: str, **options) -> list:
    """The fields of each row, or the reason and detail of a bad one, with its place."""
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [
        (row.place, str(row.fields) if isinstance(row.fields, BadRow) else row.fields)
        for row in read_rows(source, path, list, **options)
    ]


def values(found: list) -> list:
    return [fields for _, fields in found]


# --- arrays --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    [
        json.dumps(ROWS),
        json.dumps(ROWS, indent=1, ensure_ascii=False),
        "\ufeff\n [ " + " ,\n ".join(map(json.dumps, ROWS)) + " ] \n",
        LINES,
    ],
)
def test_json_is_an_array_or_lines(content, tmp_path):
    assert values(read(tmp_path / "x", content, "json")) == ROWS
    assert read(tmp_path / "x", "[]", "json") == []


@pytest.mark.parametrize("chunk", [1, 2, 7, 64])
def test_an_array_in_pieces(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr("nrt_jax.data.json_rows.CHUNK_CHARACTERS", chunk)
    found = read(tmp_path / "x", json.dumps([*ROWS, 12, ROWS[0]], indent=1), "json")
    assert values(found)[:2] == ROWS
    assert found[2] == ("row 2", "not an object: 12 is no JSON object; write {...}")
    assert found[3] == ("row 3", ROWS[0])


def test_numbers_of_an_array_stay_as_they_are_written(tmp_path):
    ((_, row),) = read(tmp_path / "x", '[{"answer": 51.0}]', "json")
    assert row == {"answer": "51.0"}


def test_rows_of_an_array_that_are_bad_one_by_one(tmp_path):
    content = b'[{"a": "1", "a": "2"}, {"a": "\xff"}, null, {"a": "\\ud83d"}, {"a": "3"}]'
    found = values(read(tmp_path / "x", content, "json"))
    assert found[0].startswith('key twice: in \'{"a": "1", "a": "2"}\' the key \'a\' occurs')
    assert found[1].startswith("not UTF-8: has the bytes b'\\xff\"}'; save the file as UTF-8")
    assert found[2].startswith("not an object: None")
    assert found[3:] == [{"a": "\ud83d"}, {"a": "3"}]


# --- tables --------------------------------------------------------------------------------------


def test_csv_with_a_header(tmp_path):
    text = '\ufeffQuestion,Best Answer\r\n"1, ""2""\nand 3",x\r\n\r\nq,\r\n'
    assert read(tmp_path / "x", text, "csv") == [
        ("line 2", {"Question": '1, "2"\nand 3', "Best Answer": "x"}),
        ("line 5", {"Question": "q", "Best Answer": ""}),
    ]


def test_csv_without_a_header(tmp_path):
    found = read(tmp_path / "x", "q,1\nr,2\n", "csv", columns=("question", "answer"))
    assert found[0] == ("line 1", {"question": "q", "answer": "1"})
    assert len(found) == 2


def test_tsv_has_no_quotes(tmp_path):
    text = 'q\ta\n"open\t1\\n2\\\\n\\x\r\n'
    assert values(read(tmp_path / "x", text, "tsv")) == [{"q": '"open', "a": "1\\n2\\\\n\\x"}]
    assert values(read(tmp_path / "x", text, "tsv", unescape=True)) == [
        {"q": '"open', "a": "1\n2\\n\\x"}
    ]


BAD_CELLS = {
    "ragged row": ("q,a\n1,2,3\nx,y\n", "['1', '2', '3'] has 3 fields, and there are 2 columns ("),
    "header among the rows": ("q,a\nq,a\nx,y\n", "['q', 'a'] are the columns; drop the line"),
    "bad CSV": ('q,a\n"1"2,3\nx,y\n', "',' expected after '\"'; write \" inside quotes as"),
    "not UTF-8": (b"q,a\n1,\xff\nx,y\n", "has the bytes b'\\xff'; save the file as UTF-8"),
}


@pytest.mark.parametrize("reason", BAD_CELLS)
def test_rows_of_a_table_that_are_bad_one_by_one(reason, tmp_path):
    content, detail = BAD_CELLS[reason]
    (place, bad), good = read(tmp_path / "x", content, "csv")
    assert place == "line 2"
    assert bad.startswith(f"{reason}: {detail}")
    assert good == ("line 3", {"q": "x", "a": "y"})


# --- packed files --------------------------------------------------------------------------------


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize(
    ("source", "content"),
    [("jsonl", LINES), ("json", json.dumps(ROWS).encode()), ("tsv", b"question\tanswer\n1\t2\n")],
)
def test_packed_text(pack, source, content, tmp_path):
    plain = read(tmp_path / "x", content, source)
    assert read(tmp_path / "x", pack(content), source) == plain
    assert plain


def test_an_arrow_file(tmp_path):
    table = pyarrow.Table.from_pylist(ROWS)
    for make in (pyarrow.ipc.new_file, pyarrow.ipc.new_stream):
        with make(tmp_path / "rows.arrow", table.schema) as out:
            out.write_table(table)
        assert [r.fields for r in read_rows("arrow", tmp_path / "rows.arrow", list)] == ROWS


# --- damage: each is one line --------------------------------------------------------------------

MANY = LINES * 300
OTHER = pyarrow.table({"prompt": ["1"], "answer": ["2"]})
ARROW = pyarrow.BufferOutputStream()
with pyarrow.ipc.new_stream(ARROW, OTHER.schema) as _out:
    _out.write_table(OTHER)


def parquet(table: pyarrow.Table) -> bytes:
    out = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(table, out)
    return out.getvalue().to_pybytes()


DAMAGE: dict[str, tuple[str, bytes, str]] = {
    "gzip cut": ("x.jsonl.gz", gzip.compress(MANY)[:-40], "its gzip packing is cut or damaged"),
    "gzip with a flipped byte": (
        "x.jsonl.gz",
        gzip.compress(MANY)[:-6] + b"\0" + gzip.compress(MANY)[-5:],
        "its gzip packing is cut or damaged after line",
    ),
    "gzip head alone": ("x.csv.gz", b"\x1f\x8b\x08", "its gzip packing is cut or damaged at its b"),
    "zstd cut": ("x.jsonl.zst", zstd(MANY)[:-9], "its zstd packing is cut or damaged"),
    "zstd of something else": ("x.json.zst", b"\x28\xb5\x2f\xfd" + b"x" * 99, "its zstd packing"),
    "gzip around Parquet": ("x.parquet", gzip.compress(parquet(OTHER)), "is compressed with gzip"),
    "gzip twice": ("x.jsonl.gz", gzip.compress(gzip.compress(LINES)), "is compressed with gzip"),
    "a named zip": ("x.csv", b"PK\x03\x04zip", "is a zip archive; unpack it with unzip"),
    "a web page": ("x.json", b"<!DOCTYPE html><html>", "is a web page, not the file"),
    "UTF-16": ("x.csv", "q,a\n1,2\n".encode("utf-16"), "is text in UTF-16; save it as UTF-8"),
    "Parquet named CSV": ("x.csv", parquet(OTHER), "is a Parquet file; rows in it are read with"),
    "array cut": ("x.json", json.dumps(ROWS).encode()[:-30], "row 1 is not JSON (Unterminated"),
    "array without its end": ("x.json", b'[{"a": "1"}', "row 0 is followed by the end of the file"),
    "array without a comma": ("x.json", b'[{"a": "1"} {}]', "row 0 is followed by '{', not by"),
    "array with a comma too many": ("x.json", b"[{},]", "row 1 is not JSON (Expecting value)"),
    "text after the array": ("x.json", b"[{}] []", "'[' follows the end of the array"),
    "array nested too deeply": ("x.json", b"[" * 99_999, "row 0 is nested too deeply"),
    "two headers in one": ("x.csv", b"a,a\n1,2\n", "its first line ['a', 'a'] names 'a' twice"),
    "semicolons": ("x.csv", b"question;answer\n1;2\n", "its first line 'question;answer' is one"),
    "commas in tsv": ("x.tsv", b"question,answer\n1,2\n", "its first line 'question,answer' is on"),
    "header with a quote": ("x.csv", b'"a"b,c\n', "its first line is no header: ',' expected"),
    "Parquet cut": ("x.parquet", parquet(OTHER)[:-9], "not a readable Parquet file ("),
    "Parquet of another schema": ("x.parquet", parquet(OTHER), "has no column 'question' (it has"),
    "Arrow of another schema": (
        "x.arrow",
        ARROW.getvalue().to_pybytes(),
        "has no column 'question' (it has 'prompt', 'answer')",
    ),
    "Arrow cut": ("x.arrow", ARROW.getvalue().to_pybytes()[:60], "not a readable Arrow file ("),
    "Arrow that is JSON": ("x.arrow", LINES, "not a readable Arrow file ("),
    "Git LFS pointer": (
        "x.parquet",
        b"version https://git-lfs.github.com/spec/v1\n",
        "is a Git LFS pointer, not the file itself",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_line(damage, tmp_path):
    name, content, said = DAMAGE[damage]
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError) as caught:
        list(read_source(DataConfig(path=path), path))
    assert str(caught.value).startswith(f"{path}: {said}")
    assert "\n" not in str(caught.value)


def test_the_shard_of_another_schema_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    (tmp_path / "b.parquet").write_bytes(parquet(OTHER))
    found = []
    with pytest.raises(InputError, match=rf"^{tmp_path}/b.parquet: has no column 'question'"):
        found.extend(read_source(DataConfig(path=tmp_path), tmp_path))
    assert [row.fields for row in found] == ROWS


def test_a_quote_that_is_never_closed(tmp_path, monkeypatch):
    monkeypatch.setattr("nrt_jax.data.table_rows.MAX_FIELD_CHARACTERS", 1000)
    (_, bad), *_ = read(tmp_path / "x", 'q,a\n"1,2\n' + "x,y\n" * 999, "csv")
    assert bad.startswith("bad CSV: field larger than field limit (1000)")


# --- memory --------------------------------------------------------------------------------------

COUNT, LONG = 150, b"1234567890" * 400
TABLE = b"question\tanswer\n" + (LONG + b"\t" + LONG + b"\n") * COUNT
OBJECT = b'{"question": "%s", "answer": "%s"}' % (LONG, LONG)
FORMATS = {
    "rows.json": b"[" + (OBJECT + b",\n") * (COUNT - 1) + OBJECT + b"]",
    "rows.csv": TABLE.replace(b"\t", b","),
    "rows.jsonl.gz": gzip.compress((OBJECT + b"\n") * COUNT),
}


@pytest.mark.parametrize("name", FORMATS)
def test_memory_does_not_grow_with_rows(name, tmp_path):
    path = tmp_path / name
    path.write_bytes(FORMATS[name])
    next(read_source(DataConfig(path=path), path))  # what is imported and checked once
    tracemalloc.start()
    try:
        count = sum(1 for _ in read_source(DataConfig(path=path), path))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert count == COUNT
    # All rows together are 1.2 MB of text.
    assert peak < 600_000
