"""Rows that are left out, counted by reason; unusable ones are tolerated up to a share."""

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
        return type(self), (self.reason, self.detail)


class LeftOut(BadRow):
    """A usable row that a filter leaves out; it does not count towards data.max_bad_share."""


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


class Discarded(NamedTuple):
    """A row that is left out, as it is counted."""

    place: str
    """For messages, such as "line 3"; where there are several files, with the file."""
    usable: bool
    """Whether a filter left it out."""
    rejected: Rejected


def discarded(place: str, bad: BadRow, *, file: str, fields: Any) -> Discarded:
    """A row that is left out because of `bad`."""
    row = place.removeprefix(f"{file} ")
    rejected = Rejected(file, row, bad.reason, bad.detail, excerpt(fields))
    return Discarded(place, isinstance(bad, LeftOut), rejected)


class BadRows:
    """The rows of one source that are left out, counted and kept in order."""

    def __init__(self, name: str):
        self.name = name
        self.counts: Counter[str] = Counter()
        self.rejected: list[Rejected] = []
        self._unusable: Counter[str] = Counter()
        self._first: tuple[str, str] | None = None
        self._first_unusable: tuple[str, str] | None = None

    def add(self, place: str, bad: BadRow, *, file: str, fields: Any) -> None:
        """Count the next bad row; messages name it by its `place`, such as "line 3"."""
        self.add_discarded(discarded(place, bad, file=file, fields=fields))

    def add_discarded(self, row: Discarded) -> None:
        """Count the next row that is left out."""
        reason, detail = row.rejected.reason, row.rejected.detail
        self.counts[reason] += 1
        self.rejected.append(row.rejected)
        self._first = self._first or (row.place, detail)
        if not row.usable:
            self._unusable[reason] += 1
            self._first_unusable = self._first_unusable or (row.place, detail)

    def check(self, good_rows: int, max_bad_share: float) -> None:
        """InputError when too many rows were unusable, or none is left."""
        total = self.counts.total() + good_rows
        if total == 0:
            raise InputError(f"{self.name}: holds no rows; give a file with at least one")
        # Where none is left, what the filters left out is part of the reason.
        counts = self._unusable if good_rows else self.counts
        first = self._first_unusable if good_rows else self._first
        bad_rows = counts.total()
        if first is None or (good_rows and bad_rows <= max_bad_share * total):
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in counts.most_common())
        place, detail = first
        what = "unusable" if counts == self._unusable else "left out"
        limit = f"more than data.max_bad_share={max_bad_share:g}" if good_rows else "none is left"
        raise InputError(
            f"{self.name}: {bad_rows} of {total} rows are {what} ({reasons}), {limit}; "
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


def excerpt(fields: Any) -> str:
    """The beginning of a row's fields as JSON; "" of a row that cannot be read."""
    if not isinstance(fields, dict):
        return ""
    return _EXCERPT.encode(_beginning(fields))[:EXCERPT_CHARACTERS]


_EXCERPT = json.JSONEncoder(ensure_ascii=False, default=repr)


def _beginning(value: Any) -> Any:
    """A value whose JSON begins as that of the whole one, without the rest of long texts."""
    if isinstance(value, str):
        return value[:EXCERPT_CHARACTERS]
    if isinstance(value, list):
        return [_beginning(one) for one in value[:EXCERPT_CHARACTERS]]
    if isinstance(value, dict):
        return {key: _beginning(one) for key, one in value.items()}
    return value
