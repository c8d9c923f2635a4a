"""Files that are whole or not there, when the process is killed or the disk is full."""

import os
import uuid
from contextlib import suppress
from pathlib import Path

PART_SUFFIX = ".part"


def write_atomically(
    path: Path, content: bytes | memoryview, part: Path | None = None, *, shared: bool = False
) -> None:
    """Write a file so that no reader, and no restart after a crash, ever sees a part of it.

    `part` is the name that it has until it is whole. `shared` is for a file that several processes
    may write at once: each has a part of its own. Raises OSError with the name of the file.
    """
    if shared:
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    part = part or path.with_name(path.name + PART_SUFFIX)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise OSError(error.errno, error.strerror, str(path)) from error
