"""Rows of JSON Lines files and of JSON arrays."""

import csv
import json
from collections.abc import Iterator, Sequence
from itertools import chain, islice
from typing import Any

from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.rows import Row, decoded
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import HEAD_BYTES, check_text
from nrt_jax.strict_json import ROW_DECODER, KeyTwice, parse_row

CHUNK_CHARACTERS = 2**16
MAX_ROW_CHARACTERS = 2**26
"""Longest row of an array; a bracket that is never closed is noticed after so many characters."""
_CONVERT_ARRAY = "convert it: jq -c '.[]' FILE > rows.jsonl, or set data.source=json"


def read_jsonl(path: Any, file: Any) -> Iterator[Row]:
    """One object per line; lines that are none are bad rows."""
    check_text(path, file.peek(HEAD_BYTES)[:HEAD_BYTES])
    lines = ((number, line) for number, line in enumerate(_without_mark(file)) if line.strip())
    first = list(islice(lines, 2))
    told = _other_text([line for _, line in first])
    if told is not None:
        raise InputError(f"{path}: {told}")
    for number, line in chain(first, lines):
        yield Row(number, f"line {number + 1}", _parse_line(line))


def read_json(path: Any, file: Any) -> Iterator[Row]:
    """An array of objects, or else JSON Lines: many files of the name .json are these."""
    head = file.peek(HEAD_BYTES)[:HEAD_BYTES]
    check_text(path, head)
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        with decoded(file, newline="\n") as text:
            yield from _Array(path, text).rows()
    else:
        yield from read_jsonl(path, file)


# --- arrays --------------------------------------------------------------------------------------


class _Array:
    """The rows of an array one by one; no more of the file than a row and a chunk is in memory."""

    def __init__(self, path: Any, file: Any):
        self._path = path
        self._file = file
        self._text, self._at, self._ended = "", 0, False

    def rows(self) -> Iterator[Row]:
        assert self._next_mark() == "[", "read_json sees the bracket first"
        self._at += 1
        number, mark = 0, self._next_mark()
        while mark != "]":
            yield Row(number, f"row {number}", self._element(number))
            mark = self._next_mark()
            if mark not in (",", "]"):
                found = shorten(mark) if mark else "the end of the file, which is cut"
                self._refuse(f"row {number} is followed by {found}, not by ',' or ']'")
            number += 1
            self._at += mark == ","
        self._at += 1
        if mark := self._next_mark():
            self._refuse(f"{shorten(mark)} follows the end of the array")

    def _element(self, number: int) -> dict | BadRow:
        """The next value; InputError where no later row can be found."""
        self._next_mark()
        while True:
            try:
                value, end = self._decode()
            except RecursionError:
                self._refuse(f"row {number} is nested too deeply")
            except json.JSONDecodeError as error:
                value, end, problem = None, len(self._text), error.msg
            else:
                problem = ""
            # A number at the end of the text may go on.
            if end < len(self._text) or (self._ended and not problem):
                break
            if self._ended or end - self._at > MAX_ROW_CHARACTERS:
                self._refuse(f"row {number} is not JSON ({problem or 'too long'})")
            self._read(end - self._at)
        text, self._at = self._text[self._at : end], end
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            return _not_utf8(text.encode("utf-8", "surrogateescape"))
        return value if isinstance(value, BadRow) else _object(value)

    def _decode(self) -> tuple[Any, int]:
        try:
            return ROW_DECODER.raw_decode(self._text, self._at)
        except KeyTwice as error:
            _, end = json.JSONDecoder().raw_decode(self._text, self._at)
            return _key_twice(self._text[self._at : end], error), end

    def _next_mark(self) -> str:
        """The next character that is no white space, "" at the end; the position goes to it."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace():
                    return self._text[self._at]
                self._at += 1
            if self._ended:
                return ""
            self._read(0)

    def _read(self, at_least: int) -> None:
        """Read on, as many characters again as were too few, and forget those before."""
        more = self._file.read(max(CHUNK_CHARACTERS, at_least))
        self._text, self._at, self._ended = self._text[self._at :] + more, 0, not more

    def _refuse(self, problem: str) -> Any:
        raise InputError(f"{self._path}: {problem}; correct the array or write one object a line")


# --- values --------------------------------------------------------------------------------------


def _parse_line(line: bytes) -> dict | BadRow:
    line = line.rstrip(b"\r\n")
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        return _not_utf8(line)
    try:
        return _object(parse_row(text))
    except KeyTwice as error:
        return _key_twice(text, error)
    except ValueError as error:
        reason = f"{shorten(text)} is not JSON ({error})"
        return BadRow("bad JSON", f"{reason}; write one JSON object a line")


def _object(value: Any) -> dict | BadRow:
    if isinstance(value, dict):
        return value
    return BadRow("not an object", f"{shorten(value)} is no JSON object; write {{...}}")


def _key_twice(text: str, error: KeyTwice) -> BadRow:
    return BadRow("key twice", f"in {shorten(text)} {error}")


def _not_utf8(text: bytes) -> BadRow:
    try:
        text.decode("utf-8")
    except UnicodeDecodeError as error:
        value = shorten(text[error.start : error.start + 8])
        return BadRow("not UTF-8", f"has the bytes {value}; save the file as UTF-8")
    raise AssertionError("these bytes are UTF-8")


def _without_mark(lines: Iterator[bytes]) -> Iterator[bytes]:
    """The lines without a byte order mark at their beginning."""
    for line in islice(lines, 1):
        yield line.removeprefix(b"\xef\xbb\xbf")
    yield from lines


# --- other texts ---------------------------------------------------------------------------------


def _other_text(first: Sequence[bytes]) -> str | None:
    """What a text is instead of JSON Lines, and what to do; told from its first two lines."""
    lines = [line.strip().decode("utf-8", "replace") for line in first]
    problems = [_problem(line) for line in lines]
    if lines and lines[0].startswith("[") and (lines[0] == "[" or None not in problems):
        return f"is a JSON array, not one object per line; {_CONVERT_ARRAY}"
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
        remedy = "set data.source=csv, or tsv where tabs separate the fields"
        return f"is no JSON Lines but looks like CSV ({shown}); {remedy}"
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
