"""Writes that leave a usable file behind when the process is killed or the disk is full."""

import io
import os
from pathlib import Path

PART_SUFFIX = ".part"


def write_atomically(path: Path, content: bytes | memoryview, part: Path | None = None) -> None:
    """Write a file so that no reader, and no restart after a crash, ever sees a part of it.

    `part` is the name that it has until it is whole. Raises OSError with the name of the file.
    """
    part = part or path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_to_append(path: Path) -> io.FileIO:
    """Open without a buffer, so that closing the file writes nothing and cannot fail."""
    return io.FileIO(path, "a")


def append(file: io.FileIO, content: bytes) -> None:
    """Write all of `content`; on a full disk a part may be written before OSError is raised."""
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        # The system's error does not name the file.
        raise OSError(error.errno, error.strerror, str(file.name)) from error
