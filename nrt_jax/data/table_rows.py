"""Rows of CSV and TSV files: quoted fields between commas, or plain fields between tabs."""

import csv
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.rows import Row, decoded
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import HEAD_BYTES, check_text

MAX_FIELD_CHARACTERS = 2**26
"""A quote that is never closed is noticed after so many characters."""
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}
_Lines = Iterator[tuple[int, list[str] | BadRow]]
"""Number of the first line of a row, from 1, with its fields."""


def read_csv(path: Any, file: Any, columns: Sequence[str]) -> Iterator[Row]:
    """Fields between commas, which may be quoted as in RFC 4180.

    `columns` names the fields of a file without a header; where it is empty the first row does.
    """
    check_text(path, file.peek(HEAD_BYTES)[:HEAD_BYTES])
    csv.field_size_limit(MAX_FIELD_CHARACTERS)
    with decoded(file, newline="") as text:
        yield from _rows(path, _csv_lines(text), columns)


def read_tsv(path: Any, file: Any, columns: Sequence[str], *, unescape: bool) -> Iterator[Row]:
    r"""Fields between tabs, without quotes; `unescape` reads \n, \t, \r and \\ in them."""
    check_text(path, file.peek(HEAD_BYTES)[:HEAD_BYTES])
    with decoded(file, newline="\n") as text:
        yield from _rows(path, _tsv_lines(text, _unescaped if unescape else str), columns)


def _csv_lines(text: Iterable[str]) -> _Lines:
    reader = csv.reader(text, strict=True)
    while True:
        first = reader.line_num + 1
        try:
            yield first, next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield first, BadRow("bad CSV", f'{error}; write " inside quotes as ""')


def _tsv_lines(text: Iterable[str], clean: Callable[[str], str]) -> _Lines:
    for number, line in enumerate(text, 1):
        fields = line.rstrip("\r\n")
        yield number, [clean(field) for field in fields.split("\t")] if fields else []


def _unescaped(text: str) -> str:
    return re.sub(r"\\([ntr\\])", lambda match: _ESCAPES[match[1]], text)


def _rows(path: Any, lines: _Lines, columns: Sequence[str]) -> Iterator[Row]:
    names = list(columns)
    for number, (line, values) in enumerate(lines):
        if values == []:
            continue
        if not names:
            names = _header(path, values)
            continue
        yield Row(number, f"line {line}", _fields(names, values))


def _header(path: Any, values: list[str] | BadRow) -> list[str]:
    if isinstance(values, BadRow):
        raise InputError(f"{path}: its first line is no header: {values.detail}")
    if len(values) == 1 and any(mark in values[0] for mark in ",;|\t"):
        raise InputError(
            f"{path}: its first line {shorten(values[0])} is one field; separate fields by commas "
            "in csv and by tabs in tsv, and set data.source to the one that it is"
        )
    twice = next((name for name in values if values.count(name) > 1), None)
    if twice is not None:
        raise InputError(
            f"{path}: its first line {shorten(values)} names {twice!r} twice; rename one, or set "
            "data.columns for a file without a header"
        )
    return values


def _fields(names: Sequence[str], values: list[str] | BadRow) -> dict | BadRow:
    if isinstance(values, BadRow):
        return values
    if len(values) != len(names):
        return BadRow(
            "ragged row",
            f"{shorten(values)} has {len(values)} fields, and there are {len(names)} columns "
            f"({shorten(', '.join(names))}); quote the fields, or correct data.columns",
        )
    if values == list(names):
        return BadRow("header among the rows", f"{shorten(values)} are the columns; drop the line")
    text = "\t".join(values)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = shorten(text[error.start : error.start + 8].encode("utf-8", "surrogateescape"))
        return BadRow("not UTF-8", f"has the bytes {shown}; save the file as UTF-8")
    return dict(zip(names, values, strict=True))
