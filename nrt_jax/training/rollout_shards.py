"""RUN/rollouts: the traces that a run sampled, in Parquet files of bounded size.

A step is one table of rows, a row per trace. Rows wait in memory until their file is full, a
checkpoint is saved or the run ends; the newest file is then written again as it grows. A file ends
where its rows and steps say so and not where the run stopped, so a run that continues leaves the
same files as one that never stopped.
"""

import io
import logging
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nrt_jax.atomic_files import PART_SUFFIX, write_atomically
from nrt_jax.errors import InputError

log = logging.getLogger(__name__)

SHARD_BYTES = 64 * 2**20
"""Most bytes of the values in a file, before compression."""
SHARD_STEPS = 100
"""Most steps of a file."""
_ROW_BYTES = 128
"""What a row counts besides the values of its lists: more than its numbers and names take."""

SCHEMA = pa.schema(
    [
        ("step", pa.int32()),
        ("group", pa.int32()),
        ("sample", pa.int32()),
        ("source", pa.string()),
        ("row", pa.int64()),
        ("weights_step", pa.int32()),
        ("tokens", pa.list_(pa.int32())),
        ("num_tokens", pa.int32()),
        ("finish", pa.string()),
        ("end_logprob", pa.float32()),
        ("logprobs", pa.list_(pa.float32())),
        ("trained_logprobs", pa.list_(pa.float32())),
        ("answer_logprobs", pa.list_(pa.float32())),
        ("baseline_logprobs", pa.list_(pa.float32())),
        ("reward", pa.float32()),
        ("baseline", pa.float32()),
        ("advantage", pa.float32()),
    ]
)
"""Columns; docs/training.md says what each holds."""
_CUT = "delete this file and those of higher numbers, and the log goes on without their steps"
_NAMES = ["source", "finish"]
_LISTS = [field.name for field in SCHEMA if pa.types.is_list(field.type)]


def shards(folder: Path) -> list[Path]:
    """The files of a folder, in the order of their steps."""
    return sorted(folder.glob("[0-9]*.parquet"))


def read_shard(path: Path, remedy: str, **options: Any) -> pa.Table:
    """The rows of a file; `options` are those of `pyarrow.parquet.read_table`.

    Raises InputError, with the remedy, for a file that cannot be read.
    """
    try:
        return pq.read_table(path, schema=SCHEMA, **options)
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise InputError(f"{path}: cannot be read ({problem}); {remedy}") from error


class RolloutShards:
    """Appends steps to the files of a folder, which it makes.

    Rows after step `after` are dropped first: a killed process wrote them, and these steps are
    taken again. Raises InputError for a file that cannot be read.
    """

    def __init__(self, folder: Path, *, after: int, shard_bytes: int = SHARD_BYTES):
        folder.mkdir(exist_ok=True)
        self._folder, self._shard_bytes = folder, shard_bytes
        self._number, kept = keep_rows_up_to(folder, after)
        self._tables = [kept] if kept.num_rows else []
        self._written = True

    def add(self, table: pa.Table) -> None:
        """Append the rows of a step; files that become full are written."""
        while table.num_rows:
            count = self._fitting(table)
            if count:
                self._tables.append(table.slice(0, count))
                self._written = False
            table = table.slice(count)
            if table.num_rows:
                self.sync()
                self._number, self._tables = self._number + 1, []

    def sync(self) -> None:
        """Write what no file has yet; raises OSError with the name of the file."""
        if not self._written:
            _write(self._folder, self._number, self._tables)
            self._written = True

    def __enter__(self) -> "RolloutShards":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        try:
            self.sync()
        except OSError as problem:
            # The error that ends the run says more.
            if error is None:
                raise
            log.warning("%s: %s; the newest rollouts are lost", problem.filename, problem.strerror)

    def _fitting(self, table: pa.Table) -> int:
        """How many rows the open file takes; at least one where it has none."""
        if not self._tables:
            return max(1, _rows_within(table, self._shard_bytes))
        first = self._tables[0]["step"][0].as_py()
        if table["step"][0].as_py() >= first + SHARD_STEPS:
            return 0
        return _rows_within(table, self._shard_bytes - sum(map(_size, self._tables)))


def keep_rows_up_to(folder: Path, step: int) -> tuple[int, pa.Table]:
    """Drop the rows of later steps; the number of the newest file that is left, and its rows.

    Raises InputError for a file that cannot be read.
    """
    # A process that was killed may have left one.
    _part(folder).unlink(missing_ok=True)
    for path in reversed(shards(folder)):
        table = read_shard(path, _CUT)
        kept = table.slice(0, int(np.searchsorted(table["step"].to_numpy(), step, side="right")))
        if kept.num_rows:
            if kept.num_rows < table.num_rows:
                _write(folder, int(path.stem), [kept])
            return int(path.stem), kept
        path.unlink()
    return 0, SCHEMA.empty_table()


def _write(folder: Path, number: int, tables: Iterable[pa.Table]) -> None:
    file = io.BytesIO()
    # In one piece, so that the bytes do not depend on how the rows came.
    table = pa.concat_tables(tables).combine_chunks()
    pq.write_table(table, file, compression="zstd", use_dictionary=_NAMES)
    write_atomically(folder / f"{number:05}.parquet", file.getbuffer(), _part(folder))


def _part(folder: Path) -> Path:
    """Beside the folder: a reader of the folder takes every file in it."""
    return folder.with_name(folder.name + PART_SUFFIX)


def _row_sizes(table: pa.Table) -> np.ndarray:
    """Bytes of each row."""
    nbytes = np.full(len(table), _ROW_BYTES)
    for name in _LISTS:
        lengths = pc.call_function("list_value_length", [table[name]])
        nbytes += 4 * pc.fill_null(lengths, 0).to_numpy()
    return nbytes


def _size(table: pa.Table) -> int:
    return int(_row_sizes(table).sum())


def _rows_within(table: pa.Table, size: int) -> int:
    """How many of the first rows take at most `size` bytes."""
    return int(np.searchsorted(np.cumsum(_row_sizes(table)), size, side="right"))
