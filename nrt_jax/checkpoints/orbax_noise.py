"""Keep Orbax's own messages away from a terminal that gets one line of ours instead."""

import logging
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def without_messages() -> Iterator[None]:
    """Orbax logs with a traceback what it also raises."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def silence_abandoned_io() -> None:
    """When one array cannot be read or written, the others under way have nobody to fail to.

    They end at any time later, in threads, and each would print a traceback of its own.
    """
    sys.unraisablehook = _show_unless_abandoned
    warnings.filterwarnings("ignore", message="coroutine .* was never awaited")
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)


def _show_unless_abandoned(unraisable: Any) -> None:
    reader = "_read_array_index_and_device_put" in repr(unraisable.object)
    if not reader and str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)
