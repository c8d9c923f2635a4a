"""Read the log of rollouts of a run: every trace that it sampled, step by step or by question.

for trace in read_traces(Path("runs/quickstart/nrt"), first_step=90):
    print(trace.step, trace.row, trace.finish, trace.reward - trace.baseline)
"""

from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from nrt_jax.errors import InputError
from nrt_jax.training.logger import ROLLOUTS
from nrt_jax.training.rollout_shards import read_shard, shards


class LoggedTrace(NamedTuple):
    """One row of the log. Logprobs are in nats, of the sampling temperature for the trace."""

    step: int
    group: int
    """Place of the question in the batch of the step."""
    sample: int
    """k: which of the question's traces this is."""
    source: str
    """Source of the question in a mixture; empty where there is one source."""
    row: int
    """Number of the question's row, as in samples.jsonl."""
    weights_step: int
    """Step whose update made the weights that drew the trace; 0: those before the first."""
    tokens: Int[np.ndarray, "T"]
    """Without the special token that ended the trace."""
    num_tokens: int
    finish: str
    """Name of that token, or "length"."""
    end_logprob: float | None
    """Of that token when it was sampled; None for "length"."""
    logprobs: Float[np.ndarray, "T"]
    """When the trace was sampled."""
    trained_logprobs: Float[np.ndarray, "T"] | None
    """Under the weights of the update; None where drop_zero_std_groups left the group out of it."""
    answer_logprobs: Float[np.ndarray, "A"]
    """Of the reference answer after the trace: log c under the weights of the update, or of the
    sampler where the group was left out."""
    baseline_logprobs: Float[np.ndarray, "A"]
    """The same after the empty trace."""
    reward: float
    baseline: float
    """Reward of the empty trace."""
    advantage: float
    """NaN where the group was left out of the update."""


def read_batches(
    run: Path,
    *,
    first_step: int = 1,
    last_step: int | None = None,
    columns: Sequence[str] | None = None,
) -> Iterator[pa.RecordBatch]:
    """The rows of these steps, file by file, in order; only `columns` are read where given.

    Raises InputError for a directory without a log and for a file that cannot be read.
    """
    files = shards(run / ROLLOUTS)
    if not files:
        raise InputError(
            f"{run}: has no {ROLLOUTS}/*.parquet; train an NRT run with logging.rollouts=true"
        )
    bounds = [("step", ">=", first_step)]
    bounds += [] if last_step is None else [("step", "<=", last_step)]
    remedy = "copy the file again, or delete it to read the other steps"
    for path in files:
        table = read_shard(path, remedy, columns=columns, filters=bounds)
        yield from table.to_batches()


def read_traces(
    run: Path, *, first_step: int = 1, last_step: int | None = None
) -> Iterator[LoggedTrace]:
    """The traces of these steps, in the order of their batches.

    Raises InputError as `read_batches` does.
    """
    for batch in read_batches(run, first_step=first_step, last_step=last_step):
        columns = [_values(batch[name]) for name in LoggedTrace._fields]
        yield from map(LoggedTrace._make, zip(*columns, strict=True))


def by_group(traces: Iterable[LoggedTrace]) -> Iterator[list[LoggedTrace]]:
    """The K traces of each question of each step, which the log has side by side."""
    for _, group in groupby(traces, key=lambda trace: (trace.step, trace.group)):
        yield list(group)


def by_prompt(traces: Iterable[LoggedTrace]) -> dict[tuple[str, int], list[LoggedTrace]]:
    """All traces of each question, by its source and row, in the order of their steps."""
    found: dict[tuple[str, int], list[LoggedTrace]] = {}
    for trace in traces:
        found.setdefault((trace.source, trace.row), []).append(trace)
    return found


def _values(column: pa.Array) -> list:
    """Of lists NumPy arrays, which share the memory of the column."""
    if not pa.types.is_list(column.type):
        return column.to_pylist()
    offsets, flat = column.offsets.to_pylist(), column.values.to_numpy()
    rows = zip(column.is_valid().to_pylist(), offsets, offsets[1:], strict=False)
    return [flat[start:end] if known else None for known, start, end in rows]
