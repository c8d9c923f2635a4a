"""RUN/references: what each evaluation found on the tokens of the reference answers, in Parquet.

A file per evaluated step holds a row per held-out question: its texts, the model's trace and
answer, and per token of y* the logprobs after the contexts that are compared.
"""

import io
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from nrt_jax.atomic_files import write_atomically
from nrt_jax.errors import InputError

if TYPE_CHECKING:
    import pyarrow as pa

REFERENCES = "references"
"""The folder in a run directory."""


@dataclass(frozen=True, kw_only=True)
class ReferenceRow:
    """One held-out question under the weights of one step; logprobs and entropies in nats."""

    row: int
    """Number of the question's row, as in samples.jsonl."""
    source: str
    question: str
    reference: str
    trace: str | None
    """None for a model that answers directly."""
    trace_end: str | None
    answer: str
    correct: bool
    tokens: Sequence[int]
    """Ids of y*, eos included; A of them."""
    texts: Sequence[str]
    """Text of each token, and the name of eos."""
    logprobs: Float[np.ndarray, "A"]
    """log c: of y* where the model answers, after its trace or directly after x."""
    entropies: Float[np.ndarray, "A"]
    """Of the distribution that each of these is of."""
    direct_logprobs: Float[np.ndarray, "A"]
    """Of y* directly after x."""
    empty_logprobs: Float[np.ndarray, "A"] | None = None
    """log c_base: of y* after the empty trace; None for a model that answers directly."""
    shuffled_logprobs: Float[np.ndarray, "A"] | None = None
    """Of y* after another question's trace; None where all questions are the same."""
    weights: Float[np.ndarray, "A"] | None = None
    """w of a weighted scheme; None for others."""

    @property
    def key(self) -> tuple[str, int, tuple[int, ...]]:
        """The same for every run that was asked this question and has this answer, by tokens."""
        return self.source, self.row, tuple(self.tokens)

    @property
    def own_gain(self) -> float | None:
        """log P(y*|x, z) - log P(y*|x, empty trace) in nats per token; None without traces."""
        return self._gain(self.logprobs)

    @property
    def shuffled_gain(self) -> float | None:
        """The same after another question's trace; None also where there is no other question."""
        return self._gain(self.shuffled_logprobs)

    def _gain(self, logprobs: Float[np.ndarray, "A"] | None) -> float | None:
        if logprobs is None or self.empty_logprobs is None:
            return None
        return float(np.mean(logprobs - self.empty_logprobs))


_ARRAYS = (
    *("logprobs", "entropies", "direct_logprobs"),
    *("empty_logprobs", "shuffled_logprobs", "weights"),
)


def write_references(folder: Path, step: int, rows: Sequence[ReferenceRow]) -> None:
    """Write the file of a step, whole; raises OSError with its name."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(exist_ok=True)
    file = io.BytesIO()
    table = pa.Table.from_pylist([asdict(row) for row in rows], schema=_schema())
    pq.write_table(table, file, compression="zstd")
    write_atomically(_file(folder, step), file.getbuffer())


def read_references(run: Path, step: int) -> list[ReferenceRow]:
    """The rows of a step, in the order of the questions; none where the run kept none.

    Raises InputError for a file that cannot be read or has other columns.
    """
    file = _file(run / REFERENCES, step)
    if not file.exists():
        return []
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        rows = pq.read_table(file, schema=_schema(), partitioning=None).to_pylist()
    except (pa.ArrowException, OSError) as error:
        problem = " ".join(str(error).split())
        raise InputError(
            f"{file}: cannot be read ({problem}); copy it again, or delete it to report without "
            "the tokens of its answers"
        ) from error
    for row in rows:
        lengths = {name: len(row[name]) for name in (*_ARRAYS, "texts") if row[name] is not None}
        wrong = next((name for name, n in lengths.items() if n != len(row["tokens"])), None)
        if wrong:
            raise InputError(
                f"{file}: row {row['row']}: has {lengths[wrong]} {wrong} of {len(row['tokens'])} "
                "tokens; copy the file again, or delete it"
            )
        row |= {name: np.asarray(row[name]) for name in _ARRAYS if row[name] is not None}
    return [ReferenceRow(**row) for row in rows]


def drop_references_after(folder: Path, step: int) -> None:
    """Delete the files of later steps: a killed process wrote them, and they are taken again."""
    for file in folder.glob("*.parquet"):
        with suppress(ValueError):
            if int(file.stem) > step:
                file.unlink()


def _file(folder: Path, step: int) -> Path:
    return folder / f"{step}.parquet"


def _schema() -> "pa.Schema":
    import pyarrow as pa

    text, numbers = pa.string(), pa.list_(pa.float32())
    types = {
        "row": pa.int64(),
        "source": text,
        "question": text,
        "reference": text,
        "trace": text,
        "trace_end": text,
        "answer": text,
        "correct": pa.bool_(),
        "tokens": pa.list_(pa.int32()),
        "texts": pa.list_(text),
        **dict.fromkeys(_ARRAYS, numbers),
    }
    return pa.schema(list(types.items()))
