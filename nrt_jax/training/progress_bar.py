"""The bar of a run on a terminal: steps, metrics, and what is being compiled."""

import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from nrt_jax.compilation import WATCH

_FORMAT = "{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
_COLUMNS, _ROWS, _BAR_COLUMNS = 80, 24, 6
"""Size of a terminal that does not tell its own, and the fewest columns of the bar itself."""


class ProgressBar:
    """While entered, shows a bar that fits the terminal; log lines are printed above it."""

    def __init__(self, total: int, done: int):
        self._texts: Sequence[str] = ()
        self._opened = ExitStack()
        # The size is read at each refresh, since it may change; some terminals do not know theirs.
        known = os.get_terminal_size(sys.stderr.fileno()).columns > 0
        self._bar = tqdm(
            total=total,
            initial=done,
            bar_format=_FORMAT,
            dynamic_ncols=known,
            ncols=None if known else _COLUMNS,
            nrows=None if known else _ROWS,
        )

    def __enter__(self) -> "ProgressBar":
        self._opened.enter_context(logging_redirect_tqdm())
        self._opened.callback(self._bar.close)
        self._opened.callback(setattr, WATCH, "on_change", None)
        WATCH.on_change = self._refresh
        return self

    def __exit__(self, *error: object) -> None:
        self._opened.__exit__(*error)

    def show(self, step: int, texts: Sequence[str]) -> None:
        """Go to a step, and show those of the texts that the terminal has room for."""
        self._bar.update(step - self._bar.n)
        self._texts = texts
        self._refresh()

    def _refresh(self) -> None:
        compiling = [_compiling()] if WATCH.compiling else []
        texts, columns = [*compiling, *self._texts], self._columns_for_text()
        while texts and len("  ".join(texts)) > columns:
            texts.pop()
        self._bar.set_postfix_str("  ".join(texts))

    def _columns_for_text(self) -> int:
        """What the terminal has beside percentage, bar, counts and times."""
        fields = dict(self._bar.format_dict)
        without_bar = {"postfix": "", "ncols": None, "bar_format": _FORMAT.replace("{bar}", "")}
        fixed = tqdm.format_meter(**fields | without_bar)
        return (fields["ncols"] or _COLUMNS) - len(fixed) - _BAR_COLUMNS - len(", ")


def _compiling() -> str:
    more = f", {WATCH.to_come} to come" if WATCH.to_come > 0 else ""
    return f"compiling program {WATCH.programs + 1}{more}"
