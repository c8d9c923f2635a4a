"""Prompts that wait to be run: one row per shard of the slots, so that no device runs another's.

A row is a prompt with the samples that start after it in one shard. Rows of one width run together:

    waiting     a b c d e        of three shards
    round 1     a b c            one prefill; keys and values stay with the devices that made them
    ready       [a] [b] [c]      until all samples of each have started
    round 2     d e -            when a shard has free slots and nothing ready

The width of a prompt follows from its length alone, so a trace does not depend on its neighbours.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int

from nrt_jax.engine.decode_state import bucket
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.packed_requests import PackedRequests, no_requests
from nrt_jax.engine.prefill import Prefix
from nrt_jax.engine.requests import Job, RequestFailed
from nrt_jax.engine.slot_table import Placement


@dataclass(eq=False)
class Row:
    """Samples `first` to `end - 1` of a job, which start in one shard."""

    job: Job
    first: int
    end: int
    widths: tuple[int, ...]
    """Sizes of the parts that its prompt is run in."""
    prefix: Prefix | None = None
    """The prompts of its round, when they have run; this one is in the row of the shard."""

    @property
    def left(self) -> int:
        """Samples that have not started."""
        return self.end - self.first


class Start(NamedTuple):
    """Samples of one row that start together."""

    job: Job
    prefix: Prefix
    shard: int
    prompt: int
    """Prompt slot, counted within the shard."""
    placement: Placement
    first: int
    """The first of the samples; one for each slot of the placement."""


def shard_requests(
    starts: Sequence[Start], *, shards: int, num_samples: int, prompt_slots: int, slots: int
) -> PackedRequests:
    """The requests of all shards, padded to `num_samples`, so that one program is compiled."""
    key_words, none = len(starts[0].job.key_data), prompt_slots // shards
    requests = no_requests(shards, num_samples, key_words, prompt=none)
    for start in starts:
        job, placement = start.job, start.placement
        requests.fill(
            start.shard,
            slots=np.asarray(placement.slots) % (slots // shards),
            rows=placement.rows,
            first=start.first,
            limits=job.limits[start.first : start.first + len(placement.slots)],
            prompt=start.prompt,
            stream=job.request.stream,
            key_data=job.key_data,
            sampling=job.sampling,
        )
    return requests


@dataclass(eq=False)
class _Round:
    """Rows that run together, by shard, and how many of the widths are done."""

    rows: dict[int, Row]
    widths: tuple[int, ...]
    prefix: Prefix | None = None
    done: int = 0


class PromptQueue:
    """Runs the prompts of waiting rows, and holds them until their samples have started."""

    def __init__(self, engine: Engine, params: Any):
        self._engine, self._params = engine, params
        self._waiting: deque[Row] = deque()
        self._round: _Round | None = None
        self._ready: list[deque[Row]] = [deque() for _ in range(engine.shards)]
        self.samples = 0
        """Sequences that have not started."""

    def add(self, job: Job) -> None:
        """Queue a job as rows of `num_samples`, or of its share of the shards if that is more."""
        samples = job.request.num_samples
        self.samples += samples
        size = max(self._engine.num_samples, -(-samples // self._engine.shards))
        widths = self._widths(len(job.request.prompt_tokens))
        for first in range(0, samples, size):
            self._waiting.append(Row(job, first, min(first + size, samples), widths))

    def remove(self, ticket: int) -> None:
        """Forget the samples of a job that have not started."""
        in_round = () if self._round is None else self._round.rows.values()
        for row in (*self._waiting, *in_round, *(row for rows in self._ready for row in rows)):
            if row.job.ticket == ticket:
                self.started(row, row.left)
        self._waiting = deque(row for row in self._waiting if row.left)
        if not any(row.left for row in in_round):
            self._round = None

    def started(self, row: Row, count: int) -> None:
        """Take the first `count` samples from a row."""
        row.first += count
        self.samples -= count

    def ready(self, shard: int) -> Row | None:
        """The row whose samples start next in this shard; None while no prompt has run."""
        rows = self._ready[shard]
        while rows and not rows[0].left:
            rows.popleft()
        return rows[0] if rows else None

    def run(self, shards: Sequence[int], *, pauses: bool) -> bool:
        """Run a row for each of `shards`, which have nothing ready; whether any became ready.

        Others take a row too where as many wait. With `pauses` only the next part of long prompts.
        Raises RequestFailed for the first job when the program cannot run; all rows wait again, and
        the caller removes that job.
        """
        if self._round is None:
            self._round = self._next_round(shards)
        if self._round is None:
            return False
        try:
            while not self._run_part(self._round):
                if pauses:
                    return False
        except Exception as error:
            rows = [row for row in self._round.rows.values() if row.left]
            self._round = None
            self._waiting.extendleft(reversed(rows))
            raise RequestFailed(rows[0].job.ticket) from error
        for shard, row in self._round.rows.items():
            row.prefix = self._round.prefix
            self._ready[shard].append(row)
        self._round = None
        return True

    def _next_round(self, shards: Sequence[int]) -> _Round | None:
        if not self._waiting or not shards:
            return None
        widths = self._waiting[0].widths
        alike = [row for row in self._waiting if row.widths == widths]
        if len(alike) >= self._engine.shards:
            others = set(range(self._engine.shards)) - set(shards)
            shards = [*shards, *(shard for shard in sorted(others) if not self.ready(shard))]
        rows = dict(zip(shards, alike, strict=False))
        taken = set(map(id, rows.values()))
        self._waiting = deque(row for row in self._waiting if id(row) not in taken)
        return _Round(rows, widths)

    def _widths(self, tokens: int) -> tuple[int, ...]:
        chunk = self._engine.prefill_chunk
        if chunk is None or tokens <= chunk:
            return (self._engine.prompt_capacity(tokens),)
        whole, rest = divmod(tokens - 1, chunk)
        return (*[chunk] * whole, self._engine.prompt_capacity(rest + 1))

    def _run_part(self, turn: _Round) -> bool:
        """Run the next part of every row; whether it was the last."""
        prompts = {s: row.job.request.prompt_tokens for s, row in turn.rows.items()}
        if turn.prefix is None and len(turn.widths) > 1:
            longest = max(map(len, prompts.values()))
            turn.prefix = self._engine.empty_prefix(bucket(longest))
        start, width = sum(turn.widths[: turn.done]), turn.widths[turn.done]
        parts = {shard: tokens[start : start + width] for shard, tokens in prompts.items()}
        tokens_RS, length_R = self._rows(parts, width)
        turn.prefix = self._engine.prefill_rows(self._params, turn.prefix, tokens_RS, length_R)
        turn.done += 1
        return turn.done == len(turn.widths)

    def _rows(
        self, parts: dict[int, np.ndarray], width: int
    ) -> tuple[Int[np.ndarray, "R S"], Int[np.ndarray, "R"]]:
        """The parts as rows, in which shards without one repeat another's."""
        first = next(iter(parts.values()))
        tokens_RS = np.zeros((self._engine.shards, width), np.int32)
        length_R = np.zeros(self._engine.shards, np.int32)
        for shard in range(self._engine.shards):
            part = parts.get(shard, first)
            tokens_RS[shard, : len(part)], length_R[shard] = part, len(part)
        return tokens_RS, length_R
