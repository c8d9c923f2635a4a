"""Read data files as rows: JSON Lines and Parquet."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.errors import InputError


class Row(NamedTuple):
    """One row of a file: its fields, or why they cannot be read."""

    number: int
    """Counted from 0, blank lines included."""
    place: str
    """Name of the row in messages, such as "line 3"."""
    fields: dict | BadRow


def read_rows(source: str, path: Path) -> Iterator[Row]:
    """The rows of a "jsonl" or "parquet" file in order; InputError when it cannot be read."""
    try:
        yield from _READERS[source](path)
    except OSError as error:
        reason = error.strerror or error
        raise InputError(f"{path}: {reason}; set data.path or data.eval_path to a file") from error


def _read_jsonl(path: Path) -> Iterator[Row]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines):
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Row(number, f"line {number + 1}", _parse_line(line.rstrip(b"\r\n")))


def _parse_line(line: bytes) -> dict | BadRow:
    try:
        fields = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        value = shorten(line[error.start : error.start + 8])
        return BadRow("not UTF-8", f"has the bytes {value}; save the file as UTF-8")
    except (ValueError, RecursionError) as error:
        shown = shorten(line.decode("utf-8"))
        return BadRow("bad JSON", f"{shown} is not JSON ({error}); write one JSON object a line")
    if not isinstance(fields, dict):
        return BadRow("not an object", f"{shorten(fields)} is no JSON object; write {{...}}")
    return fields


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file, pyarrow.parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches(batch_size=1024):
                for fields in batch.to_pylist():
                    yield Row(number, f"row {number}", fields)
                    number += 1
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: not a readable Parquet file ({reason}); check data.source"
        ) from error


_READERS = {"jsonl": _read_jsonl, "parquet": _read_parquet}
