"""Unusable rows: counted by reason, and tolerated up to a share of the file."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from nrt_jax.errors import InputError

SHOWN_CHARACTERS, EXCERPT_CHARACTERS = 60, 200


class BadRow(ValueError):
    """One unusable row: `reason` is counted, `detail` names field, value and remedy."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        """For pickle, which would call the class with the one message."""
        return BadRow, (self.reason, self.detail)


def shorten(value: object) -> str:
    """A value on one line, short enough for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


class Rejected(NamedTuple):
    """One row that was left out, for people to read."""

    file: str
    row: str
    """Its place in the file, such as "line 3"."""
    reason: str
    detail: str
    """Field, value and remedy."""
    excerpt: str
    """The beginning of its fields as JSON; "" where the row cannot be read."""


class BadRows:
    """The unusable rows of one source, counted and kept in order."""

    def __init__(self, name: str):
        self.name = name
        self.counts: Counter[str] = Counter()
        self.rejected: list[Rejected] = []
        self._first: tuple[str, str] | None = None

    def add(self, place: str, bad: BadRow, *, file: str, fields: Any) -> None:
        """Count the next bad row; messages name it by its `place`, such as "line 3"."""
        self.counts[bad.reason] += 1
        row = place.removeprefix(f"{file} ")
        self.rejected.append(Rejected(file, row, bad.reason, bad.detail, _excerpt(fields)))
        if self._first is None:
            self._first = (place, bad.detail)

    def to_json(self) -> dict[str, Any]:
        """All but the name, for `add_all`."""
        return {
            "counts": dict(self.counts),
            "rejected": [list(row) for row in self.rejected],
            "first": self._first,
        }

    def add_all(self, saved: Mapping[str, Any]) -> None:
        """Add the rows of a later part of the source, which `to_json` has given."""
        self.counts.update(saved["counts"])
        self.rejected += [Rejected(*row) for row in saved["rejected"]]
        if self._first is None and saved["first"] is not None:
            place, detail = saved["first"]
            self._first = (place, detail)

    def check(self, good_rows: int, max_bad_share: float) -> None:
        """InputError when too many rows were bad, or none was good."""
        bad_rows = self.counts.total()
        total = bad_rows + good_rows
        if total == 0:
            raise InputError(f"{self.name}: holds no rows; give a file with at least one")
        if self._first is None or (good_rows and bad_rows <= max_bad_share * total):
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        place, detail = self._first
        limit = f"more than data.max_bad_share={max_bad_share:g}" if good_rows else "none is left"
        raise InputError(
            f"{self.name}: {bad_rows} of {total} rows are unusable ({reasons}), {limit}; "
            f"first {place}: {detail}"
        )


def rejected_lines(rejected: Iterable[Rejected]) -> bytes:
    """JSON Lines with file, row, reason, detail and excerpt of each row."""
    lines = [json.dumps(row._asdict(), ensure_ascii=False) for row in rejected]
    # A lone surrogate of a row is written as an escape.
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "backslashreplace")


def reasons_table(counts: Mapping[str, int]) -> list[str]:
    """One line per reason with its count, the commonest first."""
    width = max((len(f"{count:,}") for count in counts.values()), default=0)
    ordered = sorted(counts.items(), key=lambda reason: (-reason[1], reason[0]))
    return [f"{count:>{width},}  {reason}" for reason, count in ordered]


def _excerpt(fields: Any) -> str:
    if not isinstance(fields, dict):
        return ""
    return json.dumps(fields, ensure_ascii=False, default=repr)[:EXCERPT_CHARACTERS]
