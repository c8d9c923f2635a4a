"""TensorBoard's event files, written synchronously.

tensorboardX's own writer hands events to a thread, where a killed run loses them and the error of a
full disk is lost with the thread.
"""

import os
import socket
import struct
import time
from collections.abc import Mapping
from pathlib import Path

from tensorboardX.proto.event_pb2 import Event, SessionLog  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.proto.summary_pb2 import Summary  # pyright: ignore[reportAttributeAccessIssue]
from tensorboardX.record_writer import masked_crc32c

from nrt_jax.checkpoints.files import append, open_to_append


class EventFile:
    """The event file of one process; TensorBoard ignores earlier files' events from `step` on."""

    def __init__(self, directory: Path, step: int):
        directory.mkdir(exist_ok=True)
        name = f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open_to_append(directory / name)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        start = SessionLog(status=SessionLog.START)
        self._write(Event(wall_time=time.time(), step=step, session_log=start))

    def write(self, step: int, scalars: Mapping[str, float | int]) -> None:
        """Write the scalars of one step; raises OSError with the name of the file."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()]
        self._write(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, event: Event) -> None:
        """Write a record: length, checksum of the length, data, checksum of the data."""
        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        append(self._file, length + _checksum(length) + data + _checksum(data))


def _checksum(data: bytes) -> bytes:
    return struct.pack("<I", masked_crc32c(data))
