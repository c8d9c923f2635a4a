"""What every dispatch drew, until a sequence ends and is cut out of it as a trace.

The arrays of the dispatches are kept as they are, so a dispatch costs the host nothing for each
running sequence:

    slot        0  1        sequence A was in slot 0 from dispatch 0 to 2, and ended there
    dispatch 0  a  b
    dispatch 1  a  b
    dispatch 2  a  b

Letters: B slots, T tokens.
"""

from collections.abc import Iterator

import numpy as np
from jaxtyping import Float, Int

from nrt_jax.engine.requests import Read
from nrt_jax.engine.slot_table import SequenceId
from nrt_jax.types import Trace


class TraceLog:
    """Collects the traces of one scheduler from its reads."""

    def __init__(self):
        self._reads: list[Read] = []
        """Of one layout of the slots, so that a sequence has one column in all of them."""
        self._dropped = 0
        self._first_B = np.zeros(0, np.int64)
        """The read in which each slot's sequence began, counted from the first ever."""
        self._parts: dict[SequenceId | None, tuple[np.ndarray, np.ndarray]] = {}
        """Tokens and logprobs of sequences from before their slots moved."""

    def add(self, read: Read) -> Iterator[tuple[SequenceId, Trace]]:
        """The sequences that ended in this read."""
        if self._reads and self._reads[-1].layout != read.layout:
            self._cut_all()
        if not self._reads:
            self._first_B = np.full(len(read.live_B), self._dropped)
        self._first_B[read.live_B & (read.before_B == 0)] = self._dropped + len(self._reads)
        self._reads.append(read)
        ended = list(read.finished)
        for slot, drawn in zip(ended, self._cut(ended), strict=True):
            sequence = read.sequences[slot]
            assert sequence is not None
            yield sequence, make_trace(*drawn, stopped=read.finished[slot] == "stop")
        self._drop_old()

    def _cut(self, slots: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
        """All tokens and logprobs of the sequences that are in these slots."""
        if not slots:
            return []
        firsts, last = self._first_B[slots] - self._dropped, self._reads[-1]
        reads = self._reads[int(firsts.min()) :]
        steps = [int(read.sampled.steps) for read in reads]
        # One gather per read for all of the slots, not one per slot.
        tokens, logprobs = (
            np.concatenate(
                [getattr(r.sampled, name)[:n, slots] for r, n in zip(reads, steps, strict=True)]
            )
            for name in ("tokens", "logprobs")
        )
        starts = np.cumsum([0, *steps])
        drawn = []
        for column, (slot, first) in enumerate(zip(slots, firsts - firsts.min(), strict=True)):
            end = starts[-2] + last.sampled.count_B[slot]
            part = tokens[starts[first] : end, column], logprobs[starts[first] : end, column]
            before = self._parts.pop(last.sequences[slot], None)
            if before is None:
                drawn.append(tuple(np.ascontiguousarray(x) for x in part))
            else:
                drawn.append(tuple(np.concatenate(x) for x in zip(before, part, strict=True)))
        return drawn

    def _cut_all(self) -> None:
        """Set apart what the running sequences have, whose slots move."""
        last = self._reads[-1]
        slots = np.nonzero(last.live_B & ~last.sampled.done_B)[0].tolist()
        for slot, drawn in zip(slots, self._cut(slots), strict=True):
            self._parts[last.sequences[slot]] = drawn
        self._dropped += len(self._reads)
        self._reads = []

    def _drop_old(self) -> None:
        """Forget reads in which no running sequence has tokens."""
        last = self._reads[-1]
        running_B = last.live_B & ~last.sampled.done_B
        count = len(self._reads)
        if running_B.any():
            count = int(self._first_B[running_B].min()) - self._dropped
        self._reads, self._dropped = self._reads[count:], self._dropped + count


def make_trace(
    token_T: Int[np.ndarray, "T"], logprob_T: Float[np.ndarray, "T"], *, stopped: bool
) -> Trace:
    """The trace of one sequence; the last token is set apart where it `stopped` the sequence."""
    kept = len(token_T) - stopped
    return Trace(
        tokens=token_T[:kept],
        logprobs=logprob_T[:kept],
        end_token=int(token_T[-1]) if stopped else None,
        end_logprob=float(logprob_T[-1]) if stopped else 0.0,
    )
