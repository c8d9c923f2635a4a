"""Duplicates over the parts of a preparation: those that `Duplicates` finds among rows in order."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64

from nrt_jax.data.bad_rows import Discarded, Rejected
from nrt_jax.data.duplicates import first_of_equal, log_kept, repeats
from nrt_jax.data.parts import TABLE, Note, read_notes, read_part, read_table


class Repeated(NamedTuple):
    """Rows that repeat an earlier one."""

    places: Int64[np.ndarray, "repeated"]
    """Among the usable rows of all parts."""
    by_part: dict[Path, list[tuple[int, Discarded]]]
    """Their positions in their parts, and what is told of them."""


def find_repeated(paths: Sequence[Path], *, keep: bool) -> Repeated:
    """The duplicates of parts in their order; with `keep` none, and their number is logged."""
    first, starts = _first_of_equal(paths)
    places = np.flatnonzero(first != np.arange(len(first)))
    if keep:
        log_kept(len(places))
        return Repeated(places[:0], {})
    firsts = np.unique(first[places])
    notes = {
        place: f"{note.file} {_row(note)}"
        for place, (_, _, note) in zip(firsts, _notes(paths, starts, firsts), strict=True)
    }
    by_part: dict[Path, list[tuple[int, Discarded]]] = {}
    for place, (path, position, note) in zip(places, _notes(paths, starts, places), strict=True):
        found = repeats(notes[first[place]])
        rejected = Rejected(
            file=note.file,
            row=_row(note),
            reason=found.reason,
            detail=found.detail,
            excerpt=note.excerpt,
        )
        by_part.setdefault(path, []).append((position, Discarded(note.place, True, rejected)))
    return Repeated(places, by_part)


def _first_of_equal(
    paths: Sequence[Path],
) -> tuple[Int64[np.ndarray, "rows"], Int64[np.ndarray, "parts"]]:
    """Of each row the first that is equal, and of each part its first row."""
    ends = np.cumsum([read_part(path).usable for path in paths])
    digests = np.empty(ends[-1], TABLE["digest"])
    starts = np.concatenate([[0], ends[:-1]])
    for path, start, end in zip(paths, starts, ends, strict=True):
        digests[start:end] = read_table(path)["digest"]
    return first_of_equal(digests), starts


def runs_by_part(
    starts: Int64[np.ndarray, "parts"], places: Int64[np.ndarray, "rows"]
) -> Iterator[tuple[int, Int64[np.ndarray, "run"]]]:
    """Runs of rows of one part: its number, and the places of the rows in it.

    `starts` has the place of each part's first row.
    """
    parts = np.searchsorted(starts, places, side="right") - 1
    ends = np.flatnonzero(np.diff(parts)) + 1
    for of_run, in_run in zip(np.split(parts, ends), np.split(places, ends), strict=True):
        if len(of_run):
            yield int(of_run[0]), in_run - starts[of_run[0]]


def _notes(
    paths: Sequence[Path], starts: Int64[np.ndarray, "parts"], places: Int64[np.ndarray, "rows"]
) -> Iterator[tuple[Path, int, Note]]:
    """The part, the position in it and the note of each row."""
    for part, in_part in runs_by_part(starts, places):
        for position, note in read_notes(paths[part], in_part):
            yield paths[part], position, note


def _row(note: Note) -> str:
    return note.place.removeprefix(f"{note.file} ")
