"""Usable training rows that a run leaves out: listed ones, those of benchmarks, and duplicates."""

from collections.abc import Iterable, Iterator

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, LeftOut
from nrt_jax.data.contamination import Contamination
from nrt_jax.data.duplicates import Duplicates, digest_of, log_kept
from nrt_jax.data.leave_out import LeaveOut
from nrt_jax.data.row_tokens import read_conversation
from nrt_jax.data.rows import Row
from nrt_jax.types import TokenizedExample

Tokenized = tuple[Row, TokenizedExample | BadRow]


class RowFilters:
    """The filters of one config's training rows, which must see all sources in order.

    Raises InputError for a list and for benchmarks that cannot be read.
    """

    def __init__(self, config: DataConfig):
        self._every_row = config.reads_every_row
        self._keeps_duplicates = config.duplicates == "keep"
        self._contamination = Contamination(config) if config.contamination else None
        self._leave_out = LeaveOut(config.leave_out) if config.leave_out else None
        self._duplicates = Duplicates()

    def of_rows(self, source: DataConfig, rows: Iterable[Tokenized]) -> Iterator[Tokenized]:
        """Tokenised rows of a source, with a LeftOut in the place of those that a filter finds."""
        for row, tokenized in rows:
            found = self.find(source, row, tokenized) or self._repeated(row, tokenized)
            yield row, found or tokenized

    def find(
        self, source: DataConfig, row: Row, tokenized: TokenizedExample | BadRow
    ) -> LeftOut | None:
        """Why the list or a benchmark leaves a row out; this needs no other row."""
        listed = None if self._leave_out is None else self._leave_out.find(row)
        if listed is not None or isinstance(tokenized, BadRow) or self._contamination is None:
            return listed
        assert isinstance(row.fields, dict), "a tokenised row has fields"
        messages, _ = read_conversation(source, row.fields)
        return self._contamination.find(messages)

    def finish(self) -> None:
        """After the last row: InputError for listed rows that were not met; log kept duplicates."""
        if self._leave_out is not None:
            self._leave_out.check_all_met(every_row=self._every_row)
        if self._keeps_duplicates:
            log_kept(self._duplicates.count)

    def _repeated(self, row: Row, tokenized: TokenizedExample | BadRow) -> LeftOut | None:
        if isinstance(tokenized, BadRow):
            return None
        repeated = self._duplicates.find(row, digest_of(tokenized.example))
        return None if self._keeps_duplicates else repeated
