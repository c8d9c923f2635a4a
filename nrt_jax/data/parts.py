"""Tokenised rows on their way to the shards: one file per slice of rows.

length of the header, 8 bytes | header, JSON | table | notes, one after another | records
"""

import json
import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from jaxtyping import Int32, Int64, UInt32

from nrt_jax.atomic_files import write_atomically
from nrt_jax.data.bad_rows import Discarded, Rejected
from nrt_jax.data.duplicates import DIGEST_BYTES
from nrt_jax.errors import InputError

KEY_BYTES = 16
TABLE = np.dtype(
    [
        ("key", f"V{KEY_BYTES}"),
        ("digest", f"V{DIGEST_BYTES}"),
        ("position", "<i4"),
        ("note_bytes", "<i4"),
        ("note_crc", "<u4"),
        ("index", "<i8"),
        ("nbytes", "<i4"),
        ("crc", "<u4"),
        ("prompt_tokens", "<i4"),
        ("answer_tokens", "<i4"),
        ("source", "<u4"),
    ]
)
"""Of each record a digest of its question, one of question and answer, the position of its row in
the part, its note's length in bytes and checksum, the number of its row, its own length in bytes
and checksum, the lengths in tokens of x, with what a template writes after t_start, and of y*, and
the place of its source's name in the part's list."""


class Part(NamedTuple):
    """What is known of a slice of a source's rows after it is tokenised."""

    rows: int
    """Those of the file, unusable ones included."""
    usable: int
    bad: list[Any]
    """Position in the part and `Discarded` of each row that is left out, for `discarded_rows`."""
    source_names: list[str]
    """Those that its examples have, in the order of their first."""

    def discarded_rows(self) -> list[tuple[int, Discarded]]:
        """The position in the part of each row that is left out, and the row."""
        return [
            (position, Discarded(place, usable, Rejected(*rejected)))
            for position, (place, usable, rejected) in self.bad
        ]


class Note(NamedTuple):
    """What `rejected.jsonl` has of a row, should it be left out after all."""

    place: str
    file: str
    excerpt: str

    def encode(self) -> bytes:
        """The note as a part has it."""
        return json.dumps(self).encode()


def write_part(
    path: Path, part: Part, table: np.ndarray, records: Iterable[bytes], notes: Iterable[bytes]
) -> None:
    """Write a whole part or none; the table has an entry of `TABLE` per record and note."""
    header = json.dumps(part._asdict()).encode()
    size = len(header).to_bytes(8, "little")
    content = b"".join([size, header, table.tobytes(), *notes, *records])
    write_atomically(path, content, shared=True)


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
        file.seek(int(table["note_bytes"].sum(dtype=np.int64)), os.SEEK_CUR)
        yield from _checked(file, table["nbytes"], table["crc"], places, "record")


def read_notes(path: Path, places: Int64[np.ndarray, "rows"]) -> Iterator[tuple[int, Note]]:
    """The position in the part of the rows at `places`, which count its records, and their
    notes."""
    with _opened(path) as file:
        table = _read_table(file)
        notes = _checked(file, table["note_bytes"], table["note_crc"], places, "note")
        for place, note in zip(places, notes, strict=True):
            yield int(table["position"][place]), Note(*json.loads(note))


def _checked(
    file: BinaryIO,
    sizes: Int32[np.ndarray, "all"],
    sums: UInt32[np.ndarray, "all"],
    places: Int64[np.ndarray, "rows"],
    what: str,
) -> Iterator[bytes]:
    """What stands at `places` of values of these sizes, which begin here."""
    starts = file.tell() + np.cumsum(sizes, dtype=np.int64) - sizes
    for place in places:
        file.seek(starts[place])
        value = file.read(sizes[place])
        if zlib.crc32(value) != sums[place]:
            raise ValueError(f"the checksum of {what} {place} differs")
        yield value


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
