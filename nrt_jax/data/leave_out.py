"""The list of training rows to leave out that `data.leave_out` names.

{"file": "/data/rows.jsonl", "row": "line 3", "reason": "near-duplicate", "excerpt": "{...}"}

`nrt-jax data deduplicate` writes such a list, and `rejected.jsonl` of a run is one. `reason` and
`excerpt` may be missing.
"""

from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.data.bad_rows import BadRow, LeftOut, excerpt, shorten
from nrt_jax.data.rows import Row
from nrt_jax.data.sources import read_rows
from nrt_jax.errors import InputError

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
        self._unmet: dict[tuple[str, str], _Entry] = {}
        for row in read_rows("jsonl", path, tuple):
            key, entry = _entry(f"{path} {row.place}", row)
            self._unmet[key] = entry

    def find(self, row: Row) -> LeftOut | None:
        """Why to leave out a row; InputError where the list means another row of that place."""
        entry = self._unmet.pop((row.file, row.place_in_file), None)
        if entry is None:
            return None
        if entry.excerpt is not None and entry.excerpt != excerpt(row.fields):
            raise InputError(
                f"{self._path} {entry.place}: {row.file} {row.place_in_file} is no longer the row "
                f"that was listed ({shorten(entry.excerpt)}); {_AGAIN}"
            )
        return LeftOut(entry.reason, f"{self._path} {entry.place} names it")

    def check_all_met(self) -> None:
        """InputError when a listed row was not among the rows."""
        for (file, row), entry in self._unmet.items():
            raise InputError(
                f"{self._path} {entry.place}: names {file} {row}, which is not among the training "
                f"rows ({len(self._unmet)} such lines); {_AGAIN}"
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
