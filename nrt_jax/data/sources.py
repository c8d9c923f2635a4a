"""Read data files as rows: JSON Lines and Parquet."""

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.parquet_values import column_values
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import HEAD_BYTES, check_text, recognise, why_missing
from nrt_jax.strict_json import KeyTwice, parse_row

FieldsOf = Callable[[Sequence[str]], Sequence[str]]
"""From the names of all fields to those that are read."""


_CONVERT_CSV = (
    "python -c 'import csv, json, sys; [print(json.dumps(row)) for row in "
    "csv.DictReader(sys.stdin)]' < FILE > rows.jsonl"
)


class Row(NamedTuple):
    """One row of a file: its fields, or why they cannot be read."""

    number: int
    """Counted from 0, blank lines included."""
    place: str
    """Name of the row in messages, such as "line 3"."""
    fields: dict | BadRow


def read_rows(source: str, path: Path, fields_of: FieldsOf) -> Iterator[Row]:
    """The rows of a "jsonl" or "parquet" file in order.

    Of a Parquet file only the columns `fields_of(names of all columns)` are read. Raises InputError
    when the file cannot be read, is of another kind, or has one of these columns twice or not.
    """
    try:
        with path.open("rb") as file:
            yield from _READERS[source](path, file, fields_of)
    except FileNotFoundError:
        reason = why_missing(path).replace("no such file", "No such file or directory")
        raise InputError(f"{path}: {reason}; set data.path or data.eval_path to a file") from None
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: {reason}; set data.path or data.eval_path to a file") from error


# --- JSON Lines ----------------------------------------------------------------------------------


def _read_jsonl(path: Path, file: Any, fields_of: FieldsOf) -> Iterator[Row]:
    check_text(path, file.peek(HEAD_BYTES)[:HEAD_BYTES])
    lines = ((number, line) for number, line in enumerate(_without_mark(file)) if line.strip())
    first = list(islice(lines, 2))
    told = _other_text([line for _, line in first])
    if told is not None:
        raise InputError(f"{path}: {told}")
    for number, line in chain(first, lines):
        yield Row(number, f"line {number + 1}", _parse_line(line))


def _without_mark(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The lines without a byte order mark at their beginning."""
    for line in islice(lines, 1):
        yield line.removeprefix(b"\xef\xbb\xbf")
    yield from lines


def _parse_line(line: bytes) -> dict | BadRow:
    line = line.rstrip(b"\r\n")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        value = shorten(line[error.start : error.start + 8])
        return BadRow("not UTF-8", f"has the bytes {value}; save the file as UTF-8")
    try:
        fields = parse_row(text)
    except KeyTwice as error:
        return BadRow("key twice", f"in {shorten(text)} {error}")
    except ValueError as error:
        reason = f"{shorten(text)} is not JSON ({error})"
        return BadRow("bad JSON", f"{reason}; write one JSON object a line")
    if not isinstance(fields, dict):
        return BadRow("not an object", f"{shorten(fields)} is no JSON object; write {{...}}")
    return fields


def _other_text(first: Sequence[bytes]) -> str | None:
    """What a text is instead of JSON Lines, and what to do; told from its first two lines."""
    lines = [line.strip().decode("utf-8", "replace") for line in first]
    problems = [_problem(line) for line in lines]
    if lines and lines[0].startswith("[") and (lines[0] == "[" or None not in problems):
        convert = "jq -c '.[]' FILE > rows.jsonl"
        return f"is a JSON array, not one object per line; convert it: {convert}"
    if len(lines) < 2 or None in problems or not isinstance(problems[0], json.JSONDecodeError):
        return None
    if lines[0].startswith("{"):
        # The first line of an indented object is right as far as it goes.
        if problems[0].pos < len(lines[0]):
            return None
        convert = "jq -c . FILE > rows.jsonl"
        return f"has JSON objects over several lines, not one per line; convert it: {convert}"
    shown = f"its first line is {shorten(lines[0])}"
    if any(_is_table(lines, mark) for mark in ",;\t|"):
        return f"is no JSON Lines but looks like CSV ({shown}); convert it: {_CONVERT_CSV}"
    return f"is no JSON Lines ({shown}); write one JSON object per line"


def _is_table(lines: Sequence[str], separator: str) -> bool:
    """Whether the lines have as many fields, more than one; a quoted field may go on in a third."""
    first, second = (next(csv.reader([line], delimiter=separator), []) for line in lines)
    return len(first) > 1 and (len(second) == len(first) or lines[1].count('"') % 2 == 1)


def _problem(line: str) -> ValueError | None:
    """Why a line is no JSON object; None where it is one."""
    try:
        return None if isinstance(json.loads(line), dict) else ValueError("another value")
    except RecursionError:
        return ValueError("nested too deeply")
    except ValueError as error:
        return error


# --- Parquet -------------------------------------------------------------------------------------


def _read_parquet(path: Path, file: Any, fields_of: FieldsOf) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    head = file.read(HEAD_BYTES)
    told = None if head.startswith(b"PAR1") else recognise(head)
    if told is not None:
        raise InputError(f"{path}: {told}")
    file.seek(0)
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = _columns(path, table.schema_arrow.names, fields_of)
            number = 0
            for batch in table.iter_batches(batch_size=1024, columns=columns):
                values = [column_values(batch.column(name)) for name in columns]
                for row in zip(*values, strict=True):
                    yield Row(number, f"row {number}", dict(zip(columns, row, strict=True)))
                    number += 1
    # Of a damaged file pyarrow raises also a bare OSError.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a readable Parquet file ({reason}); check data.source"
        ) from error


def _columns(path: Path, names: Sequence[str], fields_of: FieldsOf) -> list[str]:
    """The columns to read; InputError when one of them is missing or there twice."""
    columns = list(dict.fromkeys(fields_of(names)))
    for column in columns:
        if column not in names:
            has = ", ".join(map(repr, names[:5])) or "none"
            raise InputError(
                f"{path}: has no column {column!r} (it has {has}); name the columns in "
                "data.question_field and data.answer_field, or in data.messages_field"
            )
        if names.count(column) > 1:
            raise InputError(
                f"{path}: has {names.count(column)} columns named {column!r}, and which one is "
                "meant is not known; rename or drop the others"
            )
    return columns


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet}
