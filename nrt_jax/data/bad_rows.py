"""Unusable rows: counted by reason, and tolerated up to a share of the file."""

from collections import Counter

from nrt_jax.errors import InputError

SHOWN_CHARACTERS = 60


class BadRow(ValueError):
    """One unusable row: `reason` is counted, `detail` names field, value and remedy."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def shorten(value: object) -> str:
    """A value on one line, short enough for a message."""
    text = repr(value)
    return text if len(text) <= SHOWN_CHARACTERS else text[: SHOWN_CHARACTERS - 3] + "..."


class BadRows:
    """Counts of the unusable rows of one file."""

    def __init__(self, name: str):
        self.name = name
        self.counts: Counter[str] = Counter()
        self._first: tuple[str, BadRow] | None = None

    def add(self, place: str, bad: BadRow) -> None:
        """Count the next bad row; messages name it by its `place`, such as "line 3"."""
        self.counts[bad.reason] += 1
        if self._first is None:
            self._first = (place, bad)

    def check(self, good_rows: int, max_bad_share: float) -> None:
        """InputError when too many rows were bad, or none was good."""
        bad_rows = self.counts.total()
        total = bad_rows + good_rows
        if total == 0:
            raise InputError(f"{self.name}: holds no rows; give a file with at least one")
        if self._first is None or (good_rows and bad_rows <= max_bad_share * total):
            return
        reasons = ", ".join(f"{count} {reason}" for reason, count in self.counts.most_common())
        place, bad = self._first
        limit = f"more than data.max_bad_share={max_bad_share:g}" if good_rows else "none is left"
        raise InputError(
            f"{self.name}: {bad_rows} of {total} rows are unusable ({reasons}), {limit}; "
            f"first {place}: {bad.detail}"
        )
