"""Lines at the end of a file, which stays usable when the process is killed or the disk is full."""

import io
from pathlib import Path


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
