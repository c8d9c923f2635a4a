"""Files that a kill or a full disk cannot leave in a state that the next start cannot use."""

import io
import os
from pathlib import Path

PART_SUFFIX = ".part"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that no reader, and no restart after a crash, ever sees half of it.

    Raises OSError with the name of the file.
    """
    part = path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def open_to_append(path: Path) -> io.FileIO:
    """Open without a buffer: nothing is left to write, and to fail, when the file is closed."""
    return io.FileIO(path, "a")


def append(file: io.FileIO, content: bytes) -> None:
    """Write all of `content`; on a full disk part of it may be written before the OSError."""
    rest = memoryview(content)
    try:
        while rest:
            rest = rest[file.write(rest) :]
    except OSError as error:
        # The system does not say which file it was.
        raise OSError(error.errno, error.strerror, str(file.name)) from error
