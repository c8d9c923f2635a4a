"""OUT/answers: every answer of an evaluation, in Parquet files, as it comes.

A row is found again by a digest of what decides it, so that the same command asks nothing twice.
The newest file is written again as it grows; a kill loses the answers of the last seconds.
"""

import hashlib
import io
import json
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from nrt_jax.atomic_files import write_atomically
from nrt_jax.checkpoints.json_files import read_json
from nrt_jax.errors import InputError

ANSWERS, IDENTITY_FILE = "answers", "identity.json"
SHARD_ROWS = 2000
"""Rows of a full file."""
FLUSH_S = 10.0
"""Seconds between two writes of the newest file."""
CLOSED = "closed"
"""`trace_end` of a trace that t_end ended."""

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("task", pa.string()),
        ("document", pa.int32()),
        ("choice", pa.int32()),
        ("repeat", pa.int32()),
        ("trace", pa.string()),
        ("trace_end", pa.string()),
        ("trace_tokens", pa.int32()),
        ("trace_ids", pa.list_(pa.int32())),
        ("trace_logprob", pa.float64()),
        ("answer", pa.string()),
        ("answer_end", pa.string()),
        ("answer_tokens", pa.int32()),
        ("answer_logprob", pa.float64()),
        ("is_greedy", pa.bool_()),
    ]
)
"""Columns; docs/evaluation.md says what each holds."""


class AnswerRow(NamedTuple):
    """One answer, trace, or score of a given answer."""

    key: str
    """`answer_key` of what was asked."""
    task: str
    document: int
    """Number of the document in the task."""
    choice: int
    """Number of the given answer that is scored; 0 for an answer that is sampled."""
    repeat: int
    """Number of the sample, from 0."""
    trace: str | None = None
    trace_end: str | None = None
    """"closed", "length", or the name of another token that ended it; None without a trace."""
    trace_tokens: int = 0
    trace_ids: list[int] | None = None
    """Of a trace after which given answers are scored."""
    trace_logprob: float = 0.0
    """In nats, of the distribution that was sampled from, as `answer_logprob`."""
    answer: str | None = None
    """None for a trace alone; "" after a trace that never closed."""
    answer_end: str | None = None
    """"stop", "until" or "length"; None where nothing was sampled."""
    answer_tokens: int = 0
    answer_logprob: float = 0.0
    """Of a given answer: its log-likelihood."""
    is_greedy: bool | None = None
    """Of a given answer: whether greedy decoding writes it."""

    @property
    def unclosed(self) -> bool:
        """Whether the trace never closed."""
        return self.trace_end not in (None, CLOSED)

    @property
    def truncated(self) -> bool:
        """Whether the answer was cut at its limit."""
        return self.answer_end == "length"


def answer_key(*parts: Any) -> str:
    """A digest of JSON values that decide an answer: 32 hexadecimal digits."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def seed_of(key: str) -> int:
    """A signed 64-bit seed for the draws of an answer, which no order of the requests changes."""
    return int.from_bytes(bytes.fromhex(key)[:8], "big", signed=True)


def is_of_another(folder: Path, identity: dict[str, Any]) -> bool:
    """Whether answers in the folder depend on something else than these."""
    file = folder / IDENTITY_FILE
    return file.exists() and read_json(file) != identity


def check_identity(folder: Path, identity: dict[str, Any]) -> None:
    """Write what answers in the folder depend on, or compare with what earlier ones depended on.

    Raises InputError for a folder with answers of another model, or under other settings.
    """
    if is_of_another(folder, identity):
        before = read_json(folder / IDENTITY_FILE)
        names = {**before, **identity}
        name = next(name for name in names if before.get(name) != identity.get(name))
        raise InputError(
            f"{folder}: holds answers with {name} {before.get(name)!r:.80}, and now it is "
            f"{identity.get(name)!r:.80}; name another --out, or restore it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(identity, indent=1, ensure_ascii=False) + "\n"
    write_atomically(folder / IDENTITY_FILE, text.encode())


class AnswerLog:
    """The answers in a folder; on leaving, those that no file has yet are written.

    Raises InputError for a file that cannot be read, and OSError for a full disk.
    """

    def __init__(self, folder: Path, *, writable: bool = True, flush_s: float = FLUSH_S):
        self._folder, self._writable, self._flush_s = folder, writable, flush_s
        self._rows: dict[str, AnswerRow] = {}
        self._open: list[AnswerRow] = []
        """Rows of the newest file."""
        self._number, self._unwritten, self._flushed_at = 0, 0, time.monotonic()
        if not writable:
            return
        folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(folder.glob("[0-9]*.parquet")):
            self._number, self._open = int(path.stem), list(_read(path))
            self._rows |= {row.key: row for row in self._open}

    def __contains__(self, key: str) -> bool:
        return key in self._rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, key: str) -> AnswerRow:
        return self._rows[key]

    def add(self, *rows: AnswerRow) -> None:
        """Keep new rows; those of one call reach the disk together."""
        for row in rows:
            self._rows[row.key] = row
        if not self._writable:
            return
        if len(self._open) >= SHARD_ROWS:
            self.flush()
            self._number, self._open = self._number + 1, []
        self._open += rows
        self._unwritten += len(rows)
        if time.monotonic() - self._flushed_at >= self._flush_s:
            self.flush()

    def flush(self) -> None:
        """Write what no file has yet."""
        if self._unwritten:
            table = pa.Table.from_pylist([row._asdict() for row in self._open], schema=SCHEMA)
            file = io.BytesIO()
            pq.write_table(table, file, compression="zstd")
            write_atomically(self._folder / f"{self._number:05}.parquet", file.getbuffer())
        self._unwritten, self._flushed_at = 0, time.monotonic()

    def __enter__(self) -> "AnswerLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.flush()


def read_answers(folder: Path) -> Iterator[AnswerRow]:
    """All rows of OUT/answers, in the order in which they came."""
    for path in sorted((folder / ANSWERS).glob("[0-9]*.parquet")):
        yield from _read(path)


def _read(path: Path) -> Iterable[AnswerRow]:
    try:
        table = pq.read_table(path, schema=SCHEMA)
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise InputError(
            f"{path}: cannot be read ({problem}); delete it, and its answers are asked again"
        ) from error
    return [AnswerRow(**row) for row in table.to_pylist()]
