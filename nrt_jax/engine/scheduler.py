"""Continuous batching over an engine: when sequences start, decode, move and are read.

Every decision follows from the requests and from what the engine returned, which all hosts read
alike, so processes that submit the same requests take the same decisions.

Letters: B slots, K samples of one prompt.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from nrt_jax.engine.decode_state import Sampled, bucket, sizes_of
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.engine.prompt_queue import PromptQueue, Row, Start, shard_requests
from nrt_jax.engine.requests import (
    Event,
    Job,
    Read,
    Request,
    RequestFailed,
    first_sizes,
    make_job,
)
from nrt_jax.engine.slot_progress import SlotProgress
from nrt_jax.engine.slot_table import SequenceId, SlotTable
from nrt_jax.types import SuffixLogprobs

PROMPT_SLOT_GROWTH = 4
"""Prompt slots start as many as full groups need, and grow by this factor where slots stay free."""
SLOT_STEPS_WORTH_A_MOVE = 2048
"""Decode fewer slots only if that may save this many steps of one slot: a number of slots that was
not used before is compiled first."""


class _Dispatch(NamedTuple):
    """Decode steps whose results are not read yet, and the slots' sequences when they began."""

    sampled: Sampled
    sequences: list[SequenceId | None]
    slot_now_B: Int[np.ndarray, "B"]
    """Where the sequence of each slot is now; -1 for one that was cancelled."""
    layout: int


class Scheduler:
    """Starts waiting sequences in free slots, decodes, and reads results one dispatch late.

    A sequence depends on (key, request.stream, sample), its request and the weights alone: not on
    its slot, the other sequences or the order. A prompt longer than the engine's prefill_chunk is
    run part by part between dispatches. A dispatch decodes `steps` tokens per slot, or ends early
    when `enough` sequences ended while others wait (by default an eighth of the slots).
    """

    def __init__(
        self,
        engine: Engine,
        params: Any,
        *,
        steps: int = 16,
        enough: int | None = None,
        sizes: Sizes | None = None,
    ):
        self._engine, self._params, self._steps = engine, params, steps
        sizes = first_sizes(engine, ()) if sizes is None else sizes
        self._state = engine.init_decode_state(sizes)
        self._prompts = PromptQueue(engine, params)
        self._jobs: dict[int, Job] = {}
        self._enough = max(1, engine.max_concurrent_decodes // 8) if enough is None else enough
        self._table = SlotTable(
            engine.max_concurrent_decodes,
            sizes.prompts,
            shards=engine.shards,
            num_samples=engine.num_samples,
        )
        self._prompts_of_all = sizes.prompts
        """Prompt slots while all slots are used."""
        # A step's cost grows with the slots on a CPU; elsewhere reading the weights costs more.
        self._shrinks_by = 2 if engine.mesh.devices.flat[0].platform == "cpu" else 4
        self._progress = SlotProgress(engine.max_concurrent_decodes)
        self._unread: _Dispatch | None = None
        self._layout = 0
        self._tickets = 0
        self.decode_steps = 0
        """Decode steps run so far."""

    @property
    def busy(self) -> bool:
        """Whether a sequence waits, runs, or has results that are not read yet."""
        return bool(self.waiting or self._unread or self.slots_in_use)

    @property
    def slots_in_use(self) -> int:
        """Slots with a sequence."""
        return self._table.in_use

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""
        return self._prompts.samples

    @property
    def cache_bytes(self) -> int:
        """Bytes of keys and values, summed over all devices."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.layers))

    def submit(self, request: Request, key: Key[Array, ""]) -> int:
        """Queue a request and return its ticket.

        Raises InputError for a prompt that is longer than the engine takes, for a limit that is not
        positive or exceeds the cache, and for more stop tokens than a slot can hold.
        """
        job = make_job(self._engine, self._tickets, request, key)
        self._tickets += 1
        if request.num_samples:
            self._prompts.add(job)
            self._jobs[job.ticket] = job
        return job.ticket

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        """Stop a request, or one sample of it that has started, and free its slots at once.

        No further events of it follow.
        """
        if ticket not in self._jobs:
            return
        released_B = np.zeros(len(self._table), bool)
        for slot, sequence in enumerate(self._table.sequences):
            if sequence is not None and sequence.ticket == ticket:
                released_B[slot] = sample in (None, sequence.sample)
        if released_B.any():
            self._state = self._engine.release(self._state, released_B)
        for slot in np.nonzero(released_B)[0]:
            self._free(int(slot))
        if self._unread is not None:
            now_B = self._unread.slot_now_B
            now_B[released_B[now_B] & (now_B >= 0)] = -1
        if sample is None:
            self._jobs.pop(ticket, None)
            self._prompts.remove(ticket)

    def step(self) -> list[Event]:
        """`advance`, with what was read as events."""
        read = self.advance()
        return [] if read is None else read.events()

    def advance(self) -> Read | None:
        """Start waiting sequences, dispatch decode steps, and read the previous dispatch.

        Raises RequestFailed for a request whose prompt cannot be run. It is dropped, and the next
        call goes on with the others.
        """
        self._fit_slots()
        self._fill()
        unread, self._unread = self._unread, None
        if self.slots_in_use:
            self._fit_own_tokens(in_flight=0 if unread is None else self._steps)
            self._state, sampled = self._engine.generate(
                self._params, self._state, self._steps, self._enough if self.waiting else None
            )
            jax.tree.map(lambda x: x.copy_to_host_async(), sampled)
            slots = np.arange(len(self._table))
            self._unread = _Dispatch(sampled, self._table.sequences, slots, self._layout)
        return None if unread is None else self._read(unread)

    def suffix_logprobs(self, ticket: int) -> SuffixLogprobs:
        """Logprobs of a finished request's suffix; each can be taken once."""
        logprobs = self._jobs.pop(ticket).suffix_logprobs
        assert logprobs is not None, "the request has no suffix_tokens"
        return logprobs

    # Starting

    def _fill(self) -> None:
        """Start waiting sequences in every shard, until slots or prompts run out."""
        while True:
            self._start_ready()
            idle = [s for s in self._table.with_free_slots() if self._prompts.ready(s) is None]
            if not idle or not self._run_prompts(idle):
                return

    def _run_prompts(self, shards: list[int]) -> bool:
        try:
            return self._prompts.run(shards, pauses=self.slots_in_use > 0)
        except RequestFailed as failed:
            self.cancel(failed.ticket)
            raise

    def _start_ready(self) -> None:
        """Start the samples of prompts that have run, those of one prefill in one dispatch."""
        while True:
            by_prefix: dict[int, list[Start]] = {}
            for shard in self._table.with_free_slots():
                row = self._prompts.ready(shard)
                start = None if row is None else self._place(row, shard)
                if start is not None:
                    by_prefix.setdefault(id(start.prefix), []).append(start)
            if not by_prefix:
                return
            for starts in by_prefix.values():
                self._start(starts)

    def _place(self, row: Row, shard: int) -> Start | None:
        """Take slots for as many of a row's samples as possible."""
        assert row.prefix is not None
        placement = self._table.find(row.job.ticket, row.left, [shard])
        if placement is None:
            return self._place(row, shard) if self._grow_prompt_slots() else None
        first, count = row.first, len(placement.slots)
        ids = [SequenceId(row.job.ticket, first + i) for i in range(count)]
        self._table.occupy(placement, ids)
        self._progress.start(placement.slots, row.job.limits[first : first + count])
        self._prompts.started(row, count)
        prompts = sizes_of(self._state).prompts // self._engine.shards
        return Start(
            job=row.job,
            prefix=row.prefix,
            shard=shard,
            prompt=placement.prompt_slot % prompts,
            placement=placement,
            first=first,
        )

    def _grow_prompt_slots(self) -> bool:
        """Add prompt slots, for single samples or when few long samples occupy those of groups."""
        sizes = sizes_of(self._state)
        prompts = min(self._engine.largest_sizes.prompts, PROMPT_SLOT_GROWTH * sizes.prompts)
        if sizes.prompts == prompts:
            return False
        self._table.grow_prompt_slots(prompts)
        self._prompts_of_all = max(prompts, self._prompts_of_all)
        self._state = self._engine.resize(self._state, sizes._replace(prompts=prompts))
        return True

    def _start(self, starts: Sequence[Start]) -> None:
        prefix = starts[0].prefix
        self._fit_prompt_tokens(prefix.capacity)
        requests = shard_requests(
            starts,
            shards=self._engine.shards,
            num_samples=self._engine.num_samples,
            prompt_slots=sizes_of(self._state).prompts,
            slots=len(self._table),
        )
        self._state = self._engine.insert_rows(prefix, self._state, requests)
        for start in starts:
            job, slots = start.job, start.placement.slots
            job.started += len(slots)
            job.running += len(slots)
            if job.request.suffix_tokens is not None and job.suffix_logprobs is None:
                (empty_A,) = self._score(slots[:1], [0], job.request.suffix_tokens)
                rest = np.zeros((job.request.num_samples, len(empty_A)), np.float32)
                job.suffix_logprobs = SuffixLogprobs(rest, empty_A)

    # Sizes

    def _fit_slots(self) -> None:
        """Decode in half of the slots or a quarter, or fewer, when few sequences are left.

        All slots are used again when more sequences wait. A decode step computes every slot,
        whether it holds a sequence or not.
        """
        shards, most = self._engine.shards, self._engine.max_concurrent_decodes
        free = len(self._table) - self.slots_in_use
        if self.waiting > free and len(self._table) < most:
            self._move_to(most // shards)
        elif not self.waiting and not self._engine.one_size:
            busiest, wanted = self._table.most_in_a_shard, most // shards
            while wanted // self._shrinks_by >= max(1, busiest):
                wanted //= self._shrinks_by
            saved = (self._table.per_shard - wanted) * shards * self._progress.tokens_left
            if saved >= SLOT_STEPS_WORTH_A_MOVE:
                self._move_to(wanted)

    def _move_to(self, per_shard: int) -> None:
        """As many prompt slots as before, but no more than slots: a step reads all of them."""
        most_prompts = self._prompts_of_all // self._engine.shards
        moves = self._table.move(per_shard, min(per_shard, most_prompts))
        to_B = self._progress.move(moves, self._engine.shards)
        if self._unread is not None:
            now_B = self._unread.slot_now_B
            now_B[:] = np.where(now_B < 0, -1, to_B[now_B])
        self._state = self._engine.move_slots(self._state, moves)
        self._layout += 1

    def _fit_prompt_tokens(self, tokens: int) -> None:
        """Let prompt slots hold `tokens` tokens."""
        sizes = sizes_of(self._state)
        if tokens > sizes.prompt_tokens:
            self._state = self._engine.resize(self._state, sizes._replace(prompt_tokens=tokens))

    def _fit_own_tokens(self, in_flight: int) -> None:
        """Let slots hold the longest sequence after the next dispatch, and not four times as much.

        Up to `in_flight` tokens per slot may be written but not read yet.
        """
        longest = self._progress.longest(in_flight + self._steps)
        wanted = min(
            max(self._engine.smallest_own_tokens, bucket(longest)),
            self._engine.largest_sizes.own_tokens,
        )
        sizes = sizes_of(self._state)
        if wanted > sizes.own_tokens or 4 * wanted <= sizes.own_tokens:
            self._state = self._engine.resize(self._state, sizes._replace(own_tokens=wanted))

    # Reading

    def _read(self, dispatch: _Dispatch) -> Read:
        """What a dispatch drew; sequences that are done free their slots."""
        sampled = Sampled(*(np.asarray(x) for x in dispatch.sampled))
        self.decode_steps += int(sampled.steps)
        now_B = dispatch.slot_now_B
        live_B = (sampled.count_B > 0) & (now_B >= 0)
        before_B = np.where(live_B, self._progress.length_B[now_B], 0)
        self._progress.length_B[now_B[live_B]] += sampled.count_B[live_B]
        read = Read(
            sampled=sampled,
            sequences=dispatch.sequences,
            live_B=live_B,
            before_B=before_B,
            finished={
                slot: self._how_ended(dispatch.sequences[slot], sampled, slot)
                for slot in np.nonzero(live_B & sampled.done_B)[0].tolist()
            },
            layout=dispatch.layout,
        )
        self._score_done(read, now_B)
        for slot in read.finished:
            self._free(int(now_B[slot]))
        return read

    def _how_ended(
        self, sequence: SequenceId | None, sampled: Sampled, slot: int
    ) -> Literal["stop", "length"]:
        assert sequence is not None, "only a slot with a sequence is active"
        last = int(sampled.tokens[sampled.count_B[slot] - 1, slot])
        return "stop" if last in self._jobs[sequence.ticket].stop_ids else "length"

    def _score_done(self, read: Read, slot_now_B: Int[np.ndarray, "B"]) -> None:
        """Score the suffixes of sequences that ended, job by job."""
        by_job: dict[int, list[tuple[int, int, int]]] = {}
        for slot, how in read.finished.items():
            ticket, sample = read.sequences[slot] or (-1, -1)
            job, now = self._jobs[ticket], int(slot_now_B[slot])
            if job.suffix_logprobs is not None and job.request.score_samples:
                length = int(self._progress.length_B[now]) - (how == "stop")
                by_job.setdefault(ticket, []).append((now, length, sample))
        for ticket, ended in by_job.items():
            job = self._jobs[ticket]
            slots, lengths, samples = map(list, zip(*ended, strict=True))
            assert job.request.suffix_tokens is not None
            assert job.suffix_logprobs is not None
            logprobs = self._score(slots, lengths, job.request.suffix_tokens)
            job.suffix_logprobs.samples_KA[samples] = logprobs

    def _score(
        self, slots: list[int], lengths: list[int], suffix: np.ndarray
    ) -> Float[np.ndarray, "rows A"]:
        """Logprobs of suffix[1:], in batches of the engine's `num_samples` rows."""
        rows, width = self._engine.num_samples, bucket(len(suffix))
        padded_A = np.pad(suffix.astype(np.int32), (0, width - len(suffix)))
        logprobs = []
        for first in range(0, len(slots), rows):
            slot_rows = np.asarray(slots[first : first + rows], np.int32)
            length_rows = np.asarray(lengths[first : first + rows], np.int32)
            padding = (0, rows - len(slot_rows))
            batch = self._engine.suffix_logprobs(
                self._params,
                self._state,
                np.pad(slot_rows, padding, mode="edge"),
                np.pad(length_rows, padding),
                np.tile(padded_A, (rows, 1)),
            )
            logprobs.append(np.asarray(batch)[: len(slot_rows), : len(suffix) - 1])
        return np.concatenate(logprobs)

    def _free(self, slot: int) -> None:
        """Free a slot; forget its job after the last sequence, unless its suffix was scored."""
        self._progress.free(slot)
        job = self._jobs[self._table.free(slot).ticket]
        job.running -= 1
        ended = not job.running and job.started == job.request.num_samples
        if ended and job.request.suffix_tokens is None:
            del self._jobs[job.ticket]
