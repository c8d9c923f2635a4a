"""Training rows that repeat the prompt and the answer of an earlier row."""

import hashlib
import logging
from array import array

import numpy as np
from jaxtyping import Int64, UInt64

from nrt_jax.data.bad_rows import LeftOut
from nrt_jax.data.rows import Row
from nrt_jax.types import Example

log = logging.getLogger(__name__)

DIGEST_BYTES = 16


def digest_of(example: Example) -> bytes:
    """Digest of x as text and of y*, without the white space at their ends; 16 bytes.

    Nothing else is made alike: rows that differ in case or punctuation are no duplicates.
    """
    question, answer = (text.strip().encode() for text in (example.question, example.answer))
    length = len(question).to_bytes(8, "little")
    return hashlib.blake2b(length + question + answer, digest_size=DIGEST_BYTES).digest()


def repeats(first: str) -> LeftOut:
    """Why to leave out a row that repeats the one at `first`, such as "rows.jsonl line 3"."""
    return LeftOut(
        "duplicate",
        f"has the prompt and the answer of {first}; set data.duplicates=keep to train on both",
    )


def log_kept(count: int) -> None:
    """Log the number of duplicates that data.duplicates=keep trains on."""
    if count:
        log.info("data: %d duplicates are kept (data.duplicates=keep)", count)


class Duplicates:
    """The duplicates among rows that arrive in order, over all sources, and their number."""

    def __init__(self):
        self.count = 0
        self._seen = _FirstPlaces()
        self._prefixes: dict[str, int] = {}

    def find(self, row: Row, digest: bytes) -> LeftOut | None:
        """Why to leave out a row whose digest an earlier one had; None for the first."""
        kind, _, number = row.place_in_file.rpartition(" ")
        prefix = f"{row.file} {kind}"
        code = self._prefixes.setdefault(prefix, len(self._prefixes))
        first = self._seen.first(digest, code << _NUMBER_BITS | int(number))
        if first is None:
            return None
        self.count += 1
        prefix = list(self._prefixes)[first >> _NUMBER_BITS]
        return repeats(f"{prefix} {first & _MOST_ROWS}")


def first_of_equal(digests: np.ndarray) -> Int64[np.ndarray, "rows"]:
    """The place of the first row with the digest of each; digests are of the dtype V16."""
    halves = np.ascontiguousarray(digests).view("<u8").reshape(-1, 2)
    first = np.arange(len(halves))
    # Most rows are alone with half of their digest, and need no memory for more.
    rows = _not_alone(halves[:, 0])
    first[rows] = rows[_first_of_equal(halves[rows])]
    return first


def _not_alone(values: UInt64[np.ndarray, "rows"]) -> Int64[np.ndarray, "some"]:
    """The places of values that stand more than once."""
    repeated = _repeated(values)
    if not len(repeated):
        return np.zeros(0, np.int64)
    at = np.searchsorted(repeated, values)
    np.minimum(at, len(repeated) - 1, out=at)
    return np.flatnonzero(repeated[at] == values)


def _repeated(values: UInt64[np.ndarray, "rows"]) -> UInt64[np.ndarray, "different"]:
    ordered = np.sort(values)
    return np.unique(ordered[1:][ordered[1:] == ordered[:-1]])


def _first_of_equal(halves: UInt64[np.ndarray, "rows 2"]) -> Int64[np.ndarray, "rows"]:
    # Equal rows stay in their order.
    order = np.lexsort((halves[:, 0], halves[:, 1]))
    ordered = halves[order]
    begins = np.ones(len(order), bool)
    begins[1:] = (ordered[1:] != ordered[:-1]).any(axis=1)
    first = np.empty(len(order), np.int64)
    first[order] = order[np.flatnonzero(begins)][np.cumsum(begins) - 1]
    return first


_NUMBER_BITS = 40
_MOST_ROWS = 2**_NUMBER_BITS - 1
_EMPTY = -1


class _FirstPlaces:
    """The place at which each digest was first seen: a hash table of 24 bytes per slot.

    At most two of three slots are taken. A dict of Python objects takes five times the memory.
    """

    def __init__(self):
        self._allocate(2**10)

    def first(self, digest: bytes, place: int) -> int | None:
        """The place of an earlier row with the digest; None, and `place` is kept, without one."""
        slot = self._slot(digest)
        if self._places[slot] != _EMPTY:
            return self._places[slot]
        self._put(slot, digest, place)
        if 3 * self._taken > 2 * len(self._places):
            self._grow()
        return None

    def _allocate(self, slots: int) -> None:
        self._taken = 0
        self._places = array("q", [_EMPTY]) * slots
        self._digests = bytearray(DIGEST_BYTES * slots)

    def _slot(self, digest: bytes) -> int:
        """The slot of the digest, or the empty one that it belongs into."""
        slots = len(self._places)
        slot = int.from_bytes(digest[:8], "little") % slots
        while self._places[slot] != _EMPTY and self._at(slot) != digest:
            slot = (slot + 1) % slots
        return slot

    def _at(self, slot: int) -> bytearray:
        return self._digests[DIGEST_BYTES * slot : DIGEST_BYTES * (slot + 1)]

    def _put(self, slot: int, digest: bytes | bytearray, place: int) -> None:
        self._places[slot] = place
        self._digests[DIGEST_BYTES * slot : DIGEST_BYTES * (slot + 1)] = digest
        self._taken += 1

    def _grow(self) -> None:
        places, digests = self._places, self._digests
        self._allocate(2 * len(places))
        for slot, place in enumerate(places):
            if place != _EMPTY:
                digest = bytes(digests[DIGEST_BYTES * slot : DIGEST_BYTES * (slot + 1)])
                self._put(self._slot(digest), digest, place)
