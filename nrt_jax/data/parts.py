"""Tokenised rows on their way to the shards: one file per slice of rows.

length of the header, 8 bytes | header, JSON | table | records, one after another
"""

import json
import os
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int64

from nrt_jax.errors import InputError

KEY_BYTES = 16
TABLE = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("index", "<i8"),
        ("nbytes", "<i4"),
        ("crc", "<u4"),
        ("prompt_tokens", "<i4"),
        ("answer_tokens", "<i4"),
        ("source", "<u4"),
    ]
)
"""Of each record a digest of its question, the number of its row, its length in bytes and its
checksum, the lengths of x and y* in tokens, and the place of its source's name in the part's
list."""


class Part(NamedTuple):
    """What is known of a slice of a source's rows after it is tokenised."""

    rows: int
    """Those of the file, unusable ones included."""
    usable: int
    bad: dict[str, Any]
    """The unusable rows, from `BadRows.to_json`."""
    source_names: list[str]
    """Those that its examples have, in the order of their first."""


def write_part(path: Path, part: Part, table: np.ndarray, records: Iterable[bytes]) -> None:
    """Write a whole part or none; the table has an entry of `TABLE` per record."""
    header = json.dumps(part._asdict()).encode()
    size = len(header).to_bytes(8, "little")
    write_whole(path, b"".join([size, header, table.tobytes(), *records]))


def read_part(path: Path) -> Part:
    """The header alone; InputError for a part that is damaged, here and below."""
    with _opened(path) as file:
        return _read_header(file)


def read_table(path: Path) -> np.ndarray:
    """The table."""
    with _opened(path) as file:
        return _read_table(file)


def read_records(path: Path, places: Int64[np.ndarray, "rows"]) -> Iterator[bytes]:
    """The records at `places`, which count from 0."""
    with _opened(path) as file:
        table = _read_table(file)
        starts = file.tell() + np.cumsum(table["nbytes"], dtype=np.int64) - table["nbytes"]
        for place in places:
            file.seek(starts[place])
            record = file.read(table["nbytes"][place])
            if zlib.crc32(record) != table["crc"][place]:
                raise ValueError(f"the checksum of record {place} differs")
            yield record


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        try:
            yield file
        except (ValueError, TypeError) as error:
            raise InputError(
                f"{path}: is damaged ({error}); remove it and run nrt-jax data prepare again"
            ) from error


def _read_header(file: BinaryIO) -> Part:
    return Part(**json.loads(file.read(int.from_bytes(file.read(8), "little"))))


def _read_table(file: BinaryIO) -> np.ndarray:
    usable = _read_header(file).usable
    return np.frombuffer(file.read(usable * TABLE.itemsize), TABLE, usable)


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that no reader sees a part of it, though several processes write it.

    Raises OSError with the name of the file.
    """
    try:
        number, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(number, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            os.unlink(name)
            raise
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
