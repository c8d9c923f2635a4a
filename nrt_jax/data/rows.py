"""What every format gives: rows, and text in which bytes that are not UTF-8 spoil one row alone."""

import io
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from nrt_jax.data.bad_rows import BadRow

FieldsOf = Callable[[Sequence[str]], Sequence[str]]
"""From the names of all fields to those that are read."""
Keep = Callable[[int], bool]
"""Whether the row of a number is read; those that are not come without fields, or not at all."""


def every_row(number: int) -> bool:
    """All rows are read."""
    return True


class Row(NamedTuple):
    """One row of a file: its fields, or why they cannot be read."""

    number: int
    """Counted from 0, blank lines included; over all files where there are several."""
    place: str
    """Name of the row in messages, such as "line 3"."""
    fields: dict | BadRow
    file: str = ""
    """Path of the file."""

    @property
    def place_in_file(self) -> str:
        """Its place without the name of the file, such as "line 3"."""
        return self.place.removeprefix(f"{self.file} ")


@contextmanager
def decoded(file: Any, newline: str) -> Iterator[io.TextIOWrapper]:
    """The text of a file without byte order mark; a surrogate stands for a byte that is not UTF-8.

    The file stays open.
    """
    text = io.TextIOWrapper(file, "utf-8-sig", errors="surrogateescape", newline=newline)
    try:
        yield text
    finally:
        text.detach()
