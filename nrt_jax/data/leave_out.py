"""The list of training rows to leave out that `data.leave_out` names.

{"file": "/data/rows.jsonl", "row": "line 3", "reason": "near-duplicate", "excerpt": "{...}"}

`nrt-jax data deduplicate` writes such a list, and `rejected.jsonl` of a run is one. `reason` and
`excerpt` may be missing.
"""

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.data.bad_rows import BadRow, LeftOut, excerpt, shorten
from nrt_jax.data.rows import Row
from nrt_jax.data.sources import read_rows
from nrt_jax.errors import InputError

log = logging.getLogger(__name__)

_AGAIN = "make the list again from this data"


class _Entry(NamedTuple):
    place: str
    """In the list, such as "line 3"."""
    reason: str
    excerpt: str | None


class LeaveOut:
    """The rows of a list, by file and row. Raises InputError for a list that cannot be read."""

    def __init__(self, path: Path):
        self._path = path
        self._listed: dict[tuple[str, str], _Entry] = {}
        self._met: set[tuple[str, str]] = set()
        for row in read_rows("jsonl", path, tuple):
            key, entry = _entry(f"{path} {row.place}", row)
            self._listed[key] = entry

    def find(self, row: Row) -> LeftOut | None:
        """Why to leave out a row; InputError where the list means another row of that place."""
        key = row.file, row.place_in_file
        entry = self._listed.get(key)
        if entry is None:
            return None
        if entry.excerpt is not None and entry.excerpt != excerpt(row.fields):
            raise InputError(
                f"{self._path} {entry.place}: {row.file} {row.place_in_file} is no longer the row "
                f"that was listed ({shorten(entry.excerpt)}); {_AGAIN}"
            )
        self._met.add(key)
        return LeftOut(entry.reason, f"{self._path} {entry.place} names it")

    def meet(self, rows: Iterable[tuple[str, str]]) -> None:
        """Take in the file and row of rows that other processes have left out."""
        self._met.update(rows)

    def check_all_met(self, *, every_row: bool) -> None:
        """InputError when a listed row was not among the rows, unless not every row is read."""
        unmet = {key: entry for key, entry in self._listed.items() if key not in self._met}
        if unmet and not every_row:
            log.info(
                "data: %d of %d rows in data.leave_out=%s are not among those that are read",
                len(unmet),
                len(self._listed),
                self._path,
            )
            return
        for (file, row), entry in unmet.items():
            raise InputError(
                f"{self._path} {entry.place}: names {file} {row}, which is not among the training "
                f"rows ({len(unmet)} such lines); {_AGAIN}"
            )


def _entry(where: str, row: Row) -> tuple[tuple[str, str], _Entry]:
    if isinstance(row.fields, BadRow):
        raise InputError(f"{where}: {row.fields.detail}")
    file, place = (_text(where, row.fields, name) for name in ("file", "row"))
    reason = row.fields.get("reason") or "named by data.leave_out"
    return (file, place), _Entry(row.place, str(reason), row.fields.get("excerpt"))


def _text(where: str, fields: dict[str, Any], name: str) -> str:
    value = fields.get(name)
    if not isinstance(value, str):
        raise InputError(
            f"{where}: '{name}' is {shorten(value)}; give file and row as in rejected.jsonl"
        )
    return value
