"""Silence Orbax's messages about errors that we report in one line."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_messages() -> Iterator[None]:
    """Mute the errors that Orbax logs with a traceback and also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def silence_abandoned_io() -> None:
    """Mute the reads and writes that go on after one array has failed.

    They fail later, in threads that nobody waits for, and each would print a traceback.
    """
    sys.unraisablehook = _show_unless_abandoned
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _show_unless_abandoned(unraisable: Any) -> None:
    reader = "_read_array_index_and_device_put" in repr(unraisable.object)
    if not reader and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
