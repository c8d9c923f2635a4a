"""Continuous batching over an engine: when sequences start, decode, move and are read.

Every decision follows from the requests and from what the engine returned, which all hosts read
alike, so processes that submit the same requests take the same decisions.

Letters: B slots, K samples of one prompt.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from nrt_jax.engine.decode_state import (
    Sampled,
    SlotRequests,
    bucket,
    padded,
    sample_keys,
    sizes_of,
)
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.engine.prefill import Prefix
from nrt_jax.engine.requests import (
    Event,
    Job,
    Request,
    RequestFailed,
    first_sizes,
    make_job,
)
from nrt_jax.engine.slot_table import Placement, SequenceId, SlotTable
from nrt_jax.types import SuffixLogprobs

PROMPT_SLOT_GROWTH = 4
"""Prompt slots start as many as full groups need, and grow by this factor where slots stay free."""
TOKENS_WORTH_A_MOVE = 64
"""Decode fewer slots only if some sequence may still get this many tokens."""


class _Dispatch(NamedTuple):
    """Decode steps whose results are not read yet, and the slots' sequences when they began."""

    sampled: Sampled
    sequences: list[SequenceId | None]


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
        self._waiting: deque[Job] = deque()
        self._jobs: dict[int, Job] = {}
        self._enough = max(1, engine.max_concurrent_decodes // 8) if enough is None else enough
        self._table = SlotTable(
            engine.max_concurrent_decodes,
            sizes.prompts,
            shards=engine.shards,
            num_samples=engine.num_samples,
        )
        self._unread: _Dispatch | None = None
        self._tickets = 0
        self.decode_steps = 0
        """Decode steps run so far."""

    @property
    def busy(self) -> bool:
        """Whether a sequence waits, runs, or has results that are not read yet."""
        return bool(self._waiting or self._unread or self.slots_in_use)

    @property
    def slots_in_use(self) -> int:
        """Slots with a sequence."""
        return self._table.in_use

    @property
    def waiting(self) -> int:
        """Sequences that have not started."""
        return sum(job.request.num_samples - job.started for job in self._waiting)

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
            self._waiting.append(job)
            self._jobs[job.ticket] = job
        return job.ticket

    def cancel(self, ticket: int, sample: int | None = None) -> None:
        """Stop a request, or one sample of it that has started, and free its slots at once.

        No further events of it follow.
        """
        job = self._jobs.get(ticket)
        if job is None:
            return
        released_B = np.zeros(len(self._table), bool)
        for slot, sequence in enumerate(self._table.sequences):
            if sequence is not None and sequence.ticket == ticket:
                released_B[slot] = sample in (None, sequence.sample)
        if released_B.any():
            self._state = self._engine.release(self._state, released_B)
        for slot in np.nonzero(released_B)[0]:
            self._free(int(slot))
        if sample is None:
            self._jobs.pop(ticket, None)
            if job in self._waiting:
                self._waiting.remove(job)

    def step(self) -> list[Event]:
        """Start waiting sequences, dispatch decode steps, and read the previous dispatch.

        Raises RequestFailed for a request whose prompt cannot be run. It is dropped, and the next
        step goes on with the others.
        """
        self._fit_slots()
        self._fill()
        unread, self._unread = self._unread, None
        if self.slots_in_use:
            self._fit_own_tokens(in_flight=0 if unread is None else self._steps)
            self._state, sampled = self._engine.generate(
                self._params, self._state, self._steps, self._enough if self._waiting else None
            )
            jax.tree.map(lambda x: x.copy_to_host_async(), sampled)
            self._unread = _Dispatch(sampled, self._table.sequences)
        return [] if unread is None else self._read(unread)

    def suffix_logprobs(self, ticket: int) -> SuffixLogprobs:
        """Logprobs of a finished request's suffix; each can be taken once."""
        logprobs = self._jobs.pop(ticket).suffix_logprobs
        assert logprobs is not None, "the request has no suffix_tokens"
        return logprobs

    # Starting

    def _fill(self) -> None:
        """Start waiting sequences in order, a prompt's samples in as few shards as possible."""
        while self._waiting:
            job = self._waiting[0]
            placement = self._place(job)
            if placement is None or not self._try_prefill(job):
                return
            self._start(job, placement)
            if job.started == job.request.num_samples:
                self._waiting.popleft()
                job.prefix = None

    def _place(self, job: Job) -> Placement | None:
        """Where as many of a job's samples as possible start together."""
        wanted = job.request.num_samples - job.started
        placement = self._table.find(job.ticket, wanted)
        if placement is None and self.slots_in_use < len(self._table) and self._grow_prompt_slots():
            return self._place(job)
        return placement

    def _grow_prompt_slots(self) -> bool:
        """Add prompt slots, for single samples or when few long samples occupy those of groups."""
        sizes = sizes_of(self._state)
        prompts = min(self._engine.largest_sizes.prompts, PROMPT_SLOT_GROWTH * sizes.prompts)
        if sizes.prompts == prompts:
            return False
        self._table.grow_prompt_slots(prompts)
        self._state = self._engine.resize(self._state, sizes._replace(prompts=prompts))
        return True

    def _try_prefill(self, job: Job) -> bool:
        try:
            return self._prefill(job)
        except Exception as error:
            # Nothing of it is in the decode state yet.
            self._waiting.remove(job)
            del self._jobs[job.ticket]
            raise RequestFailed(job.ticket) from error

    def _prefill(self, job: Job) -> bool:
        """Run the prompt, or only its next part while others decode; return whether it is done."""
        tokens, chunk = job.request.prompt_tokens, self._engine.prefill_chunk
        if chunk is None or len(tokens) <= chunk:
            if job.prefix is None:
                job.prefix, job.prefilled = self._run_part(None, tokens), len(tokens)
            return True
        if job.prefix is None:
            job.prefix = self._engine.empty_prefix(bucket(len(tokens)))
        while job.prefilled < len(tokens):
            part = tokens[job.prefilled : job.prefilled + chunk]
            job.prefix = self._run_part(job.prefix, part)
            job.prefilled += len(part)
            if self.slots_in_use:
                break
        return job.prefilled == len(tokens)

    def _run_part(self, prefix: Prefix | None, tokens: np.ndarray) -> Prefix:
        return self._engine.prefill(
            params=self._params,
            existing_prefix=prefix,
            padded_tokens=padded(tokens, self._engine.prompt_capacity(len(tokens))),
            true_length=len(tokens),
        )

    def _start(self, job: Job, placement: Placement) -> None:
        assert job.prefix is not None
        self._fit_prompt_tokens(job.prefix.k_LSHd.shape[1])
        samples = job.started + np.arange(len(placement.slots))
        requests = self._slot_requests(job, placement, samples)
        self._state = self._engine.insert(job.prefix, self._state, requests)
        self._table.occupy(
            placement, [SequenceId(job.ticket, sample) for sample in samples.tolist()]
        )
        if job.request.suffix_tokens is not None and job.suffix_logprobs is None:
            (empty_A,) = self._score(placement.slots[:1], [0], job.request.suffix_tokens)
            rest = np.zeros((job.request.num_samples, len(empty_A)), np.float32)
            job.suffix_logprobs = SuffixLogprobs(rest, empty_A)
        job.started += len(placement.slots)
        job.running += len(placement.slots)

    def _slot_requests(
        self, job: Job, placement: Placement, sample_K: Int[np.ndarray, "K"]
    ) -> SlotRequests:
        """Requests padded to the engine's `num_samples`, so that one program is compiled."""
        width, request = self._engine.num_samples, job.request
        unused = (0, width - len(sample_K))
        return SlotRequests(
            slot_K=np.pad(np.asarray(placement.slots, np.int32), unused, constant_values=-1),
            row_K=np.pad(np.asarray(placement.rows, np.int32), unused),
            prompt=placement.prompt_slot,
            key_K=sample_keys(job.key, request.stream, np.pad(sample_K, unused)),
            limit_K=np.pad(job.limits[sample_K], unused),
            sampling=job.sampling,
        )

    # Sizes

    def _fit_slots(self) -> None:
        """Decode in a quarter of the slots, or fewer, when few sequences are left.

        All slots are used again when more sequences wait. A decode step computes every slot,
        whether it holds a sequence or not.
        """
        shards, most = self._engine.shards, self._engine.max_concurrent_decodes
        free = len(self._table) - self.slots_in_use
        if self.waiting > free and len(self._table) < most:
            self._move_to(most // shards)
        elif not self._waiting and not self._engine.one_size:
            busiest, wanted = self._table.most_in_a_shard, most // shards
            while wanted > 1 and wanted // 4 >= busiest:
                wanted = max(1, wanted // 4)
            if wanted < self._table.per_shard and self._tokens_left() >= TOKENS_WORTH_A_MOVE:
                self._move_to(wanted)

    def _move_to(self, per_shard: int) -> None:
        self._state = self._engine.move_slots(self._state, self._table.move(per_shard))

    def _running(self) -> list[tuple[int, int]]:
        """Tokens read and limit of each running sequence."""
        jobs = ((self._jobs[ticket], sample) for ticket, sample in self._table.running)
        return [(int(job.lengths[sample]), int(job.limits[sample])) for job, sample in jobs]

    def _tokens_left(self) -> int:
        """Most tokens that any running sequence may still get."""
        return max((limit - length for length, limit in self._running()), default=0)

    def _fit_prompt_tokens(self, tokens: int) -> None:
        """Let prompt slots hold `tokens` tokens."""
        sizes = sizes_of(self._state)
        if tokens > sizes.prompt_tokens:
            self._state = self._engine.resize(self._state, sizes._replace(prompt_tokens=tokens))

    def _fit_own_tokens(self, in_flight: int) -> None:
        """Let slots hold the longest sequence after the next dispatch, and not four times as much.

        Up to `in_flight` tokens per slot may be written but not read yet.
        """
        longest = max(
            min(limit, length + in_flight + self._steps) for length, limit in self._running()
        )
        wanted = min(
            max(self._engine.smallest_own_tokens, bucket(longest)),
            self._engine.largest_sizes.own_tokens,
        )
        sizes = sizes_of(self._state)
        if wanted > sizes.own_tokens or 4 * wanted <= sizes.own_tokens:
            self._state = self._engine.resize(self._state, sizes._replace(own_tokens=wanted))

    # Reading

    def _read(self, dispatch: _Dispatch) -> list[Event]:
        """Events of a dispatch; sequences that are done free their slots."""
        sampled = Sampled(*(np.asarray(x) for x in dispatch.sampled))
        self.decode_steps += int(sampled.steps)
        events, done = [], []
        for slot in np.nonzero(sampled.count_B)[0]:
            sequence = dispatch.sequences[slot]
            assert sequence is not None, "only a slot with a sequence is active"
            # Since then it may have been cancelled or moved to another slot.
            slot_now = self._table.slot_of(sequence)
            if slot_now is None:
                continue
            event = self._event(sequence, sampled, int(slot))
            events.append(event)
            self._jobs[event.ticket].lengths[event.sample] += len(event.tokens)
            if event.finished is not None:
                done.append((slot_now, event))
        self._score_done(done)
        for slot, _ in done:
            self._free(slot)
        return events

    def _event(self, sequence: SequenceId, sampled: Sampled, slot: int) -> Event:
        n = int(sampled.count_B[slot])
        tokens = np.asarray(sampled.tokens[:n, slot])
        stopped = int(tokens[-1]) in self._jobs[sequence.ticket].stop_ids
        finished = None
        if sampled.done_B[slot]:
            finished = "stop" if stopped else "length"
        return Event(
            *sequence,
            tokens,
            np.asarray(sampled.logprobs[:n, slot]),
            np.asarray(sampled.top_ids[:n, slot]),
            np.asarray(sampled.top_logprobs[:n, slot]),
            finished,
        )

    def _score_done(self, done: Sequence[tuple[int, Event]]) -> None:
        """Score the suffixes of sequences that ended, job by job."""
        for ticket in dict.fromkeys(event.ticket for _, event in done):
            job = self._jobs[ticket]
            if job.suffix_logprobs is None or job.request.suffix_tokens is None:
                continue
            if not job.request.score_samples:
                continue
            of_job = [(slot, event) for slot, event in done if event.ticket == ticket]
            lengths = [
                int(job.lengths[event.sample]) - (event.finished == "stop") for _, event in of_job
            ]
            slots = [slot for slot, _ in of_job]
            logprobs = self._score(slots, lengths, job.request.suffix_tokens)
            job.suffix_logprobs.samples_KA[[event.sample for _, event in of_job]] = logprobs

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
        job = self._jobs[self._table.free(slot).ticket]
        job.running -= 1
        ended = not job.running and job.started == job.request.num_samples
        if ended and job.request.suffix_tokens is None:
            del self._jobs[job.ticket]
