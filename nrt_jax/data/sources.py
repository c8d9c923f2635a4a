"""Open a data file, unpack it, and read it as rows in the format that it has."""

import gzip
import io
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from nrt_jax.config.rows import FileFormat
from nrt_jax.data.column_rows import read_arrow, read_parquet
from nrt_jax.data.json_rows import read_json, read_jsonl
from nrt_jax.data.rows import FieldsOf, Keep, Row, every_row
from nrt_jax.data.table_rows import read_csv, read_tsv
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import GZIP_MAGIC, HEAD_BYTES, ZSTD_MAGIC, why_missing

_NAMED = "set data.path or data.eval_path to a file"


def read_rows(
    source: FileFormat,
    path: Any,
    fields_of: FieldsOf,
    *,
    columns: Sequence[str] = (),
    unescape: bool = False,
    keep: Keep = every_row,
) -> Iterator[Row]:
    """The rows of a file in order, a few of them in memory at a time.

    `path` is a Path, or an epath.Path of another place. Text formats may be packed with gzip or
    zstd. Of Parquet and Arrow files only the columns `fields_of(names of all columns)` are read.
    `columns` and `unescape` are those of `DataConfig`. Of rows that are not kept the fields may be
    missing. Raises InputError when the file cannot be
    read, is of another kind, or has one of the columns twice or not.
    """
    if source in ("parquet", "arrow"):
        reader = read_parquet if source == "parquet" else read_arrow
        yield from _opened(path, partial(reader, path, fields_of=fields_of, keep=keep))
        return
    readers: dict[str, Callable[[Any], Iterator[Row]]] = {
        "jsonl": lambda file: read_jsonl(path, file),
        "json": lambda file: read_json(path, file),
        "csv": lambda file: read_csv(path, file, columns),
        "tsv": lambda file: read_tsv(path, file, columns, unescape=unescape),
    }
    yield from _opened(path, lambda file: _unpacked(path, file, readers[source]))


def _opened(path: Any, read: Callable[[Any], Iterator[Row]]) -> Iterator[Row]:
    try:
        with path.open("rb") as file:
            yield from read(file)
    except FileNotFoundError:
        reason = why_missing(path) if isinstance(path, Path) else "no such file"
        reason = reason.replace("no such file", "No such file or directory")
        raise InputError(f"{path}: {reason}; {_NAMED}") from None
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {_NAMED}") from error


def _unpacked(path: Any, file: Any, read: Callable[[Any], Iterator[Row]]) -> Iterator[Row]:
    """The rows of a text file; of a packed one InputError, with the row, where it is damaged."""
    buffered = file if isinstance(file, io.BufferedReader) else io.BufferedReader(file)
    head = buffered.peek(HEAD_BYTES)
    if not head.startswith((GZIP_MAGIC, ZSTD_MAGIC)):
        yield from read(buffered)
        return
    packing = "gzip" if head.startswith(GZIP_MAGIC) else "zstd"
    unpacked = io.BufferedReader(_unpack(packing, buffered))
    place = "at its beginning"
    try:
        for row in read(unpacked):
            yield row
            place = f"after {row.place}"
    except (EOFError, OSError, zlib.error) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"{path}: its {packing} packing is cut or damaged {place} ({reason}); copy or download "
            "it again"
        ) from error


def _unpack(packing: str, file: Any) -> Any:
    if packing == "gzip":
        return gzip.GzipFile(fileobj=file)
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(file, "r"), "zstd")
