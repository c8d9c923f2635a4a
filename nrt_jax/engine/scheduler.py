"""Continuous batching over an engine: what starts, runs, moves and is read when.

Every decision follows from the requests and from what the engine returned, which all hosts read
alike, so processes that submit the same requests take the same decisions.

Letters: B slots, K copies that start together, C decode steps of a dispatch, R most probable
tokens.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from nrt_jax.engine.decode_state import (
    Sampled,
    SlotRequests,
    bucket,
    padded,
    sizes_of,
    slot_sampling,
)
from nrt_jax.engine.engine import DecoderEngine
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.engine.prefill import Prefix
from nrt_jax.engine.sampling import MAX_STOP_IDS, Sampling
from nrt_jax.engine.slot_table import Place, SequenceId, SlotTable
from nrt_jax.errors import InputError
from nrt_jax.types import SuffixLogprobs

SMALLEST_ROOM = 32
"""Own tokens that a slot's cache has room for at first."""
GROWTH = 4
"""Rooms for prompts start as what full groups need, and grow by this where slots stay free."""
WORTH_A_MOVE = 64
"""Tokens that some sequence may still get, for it to be worth to decode fewer slots."""


class Request(NamedTuple):
    """Sample `copies` sequences after one prompt."""

    prompt_tokens: np.ndarray
    stream: int
    """Names the prompt's random stream: with the key it fixes every draw."""
    copies: int
    max_tokens: int | tuple[int, ...]
    """Limit of every copy, or one for each."""
    sampling: Sampling = Sampling()
    suffix_tokens: np.ndarray | None = None
    """Scored after each finished sequence (t_end y*), and after none; None: nothing is."""


class Event(NamedTuple):
    """What one sequence got since it was last heard of."""

    ticket: int
    copy: int
    tokens: Int[np.ndarray, "C"]
    """A token that stopped it included."""
    logprobs: Float[np.ndarray, "C"]
    top_ids: Int[np.ndarray, "C R"]
    top_logprobs: Float[np.ndarray, "C R"]
    finished: Literal["stop", "length"] | None


@dataclass(eq=False)
class _Job:
    """A request under way."""

    ticket: int
    request: Request
    key: Key[Array, ""]
    limits: Int[np.ndarray, "K"]
    lengths: Int[np.ndarray, "K"]
    """Tokens of each copy that were read."""
    stop_ids: frozenset[int]
    started: int = 0
    running: int = 0
    prefix: Prefix | None = None
    prefilled: int = 0
    scores: SuffixLogprobs | None = None


class _Dispatch(NamedTuple):
    """Decode steps whose results were not read, and the slots' sequences when they began."""

    sampled: Sampled
    sequences: list[SequenceId | None]


class Scheduler:
    """Starts waiting sequences in free slots, decodes, and reads one dispatch late.

    A sequence depends on (key, request.stream, copy), its request and the weights alone: not on
    the slot, its neighbours or the order. Prompts longer than the engine's prefill_chunk are run
    part by part, between dispatches. `steps` tokens are decoded a dispatch; a dispatch ends early
    when `enough` sequences ended while others wait (an eighth of the slots unless given).
    """

    def __init__(
        self,
        engine: DecoderEngine,
        params: Any,
        *,
        steps: int = 16,
        enough: int | None = None,
        sizes: Sizes | None = None,
    ):
        self._engine, self._params, self._steps = engine, params, steps
        sizes = first_sizes(engine, ()) if sizes is None else sizes
        self._state = engine.init_decode_state(sizes)
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[int, _Job] = {}
        self._enough = max(1, engine.max_concurrent_decodes // 8) if enough is None else enough
        self._table = SlotTable(
            engine.max_concurrent_decodes,
            sizes.prompts,
            shards=engine.shards,
            copies=engine.copies,
        )
        self._unread: _Dispatch | None = None
        self._tickets = 0
        self.decode_steps = 0
        """Decode steps that were run."""

    @property
    def _largest(self) -> Sizes:
        return self._engine.largest_sizes

    @property
    def busy(self) -> bool:
        """Whether anything waits, runs, or is not read yet."""
        return bool(self._waiting or self._unread or self.slots_in_use)

    @property
    def slots_in_use(self) -> int:
        """Slots with a sequence."""
        return self._table.in_use

    @property
    def waiting(self) -> int:
        """Sequences that did not start yet."""
        return sum(job.request.copies - job.started for job in self._waiting)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the keys and values on all devices together."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self._state.layers))

    def submit(self, request: Request, key: Key[Array, ""]) -> int:
        """Queue a request and return its ticket.

        Raises InputError for a prompt longer than the engine takes, for a limit that is not
        positive or beyond its cache, and for more stop tokens than a slot can hold.
        """
        check(self._engine, request)
        job = _Job(
            self._tickets,
            request,
            key,
            limits=np.broadcast_to(np.asarray(request.max_tokens, np.int32), request.copies),
            lengths=np.zeros(request.copies, np.int32),
            stop_ids=self._engine.stop_ids | request.sampling.stop_ids,
        )
        self._tickets += 1
        if request.copies:
            self._waiting.append(job)
            self._jobs[job.ticket] = job
        return job.ticket

    def cancel(self, ticket: int, copy: int | None = None) -> None:
        """Stop a request, or one copy of it that has started: its slots are free at once.

        No event of it follows.
        """
        job = self._jobs.get(ticket)
        if job is None:
            return
        released_B = np.zeros(len(self._table), bool)
        for slot, sequence in enumerate(self._table.sequences):
            if sequence is not None and sequence.ticket == ticket:
                released_B[slot] = copy in (None, sequence.copy)
        if released_B.any():
            self._state = self._engine.release(self._state, released_B)
        for slot in np.nonzero(released_B)[0]:
            self._free(int(slot))
        if copy is None:
            self._jobs.pop(ticket, None)
            if job in self._waiting:
                self._waiting.remove(job)

    def step(self) -> list[Event]:
        """Start what can start, dispatch some decode steps, and read the dispatch before."""
        self._fit_slots()
        self._fill()
        unread, self._unread = self._unread, None
        if self.slots_in_use:
            self._make_room(in_flight=0 if unread is None else self._steps)
            self._state, sampled = self._engine.generate_steps(
                self._params, self._state, self._steps, self._enough if self._waiting else None
            )
            jax.tree.map(lambda x: x.copy_to_host_async(), sampled)
            self._unread = _Dispatch(sampled, self._table.sequences)
        return [] if unread is None else self._read(unread)

    def scores(self, ticket: int) -> SuffixLogprobs:
        """The scores of a finished request's suffix; asked for once."""
        scores = self._jobs.pop(ticket).scores
        assert scores is not None, "the request has no suffix_tokens"
        return scores

    # Starting

    def _fill(self) -> None:
        """Start waiting sequences, in order, a prompt's copies in as few shards as can be."""
        while self._waiting:
            job = self._waiting[0]
            place = self._place(job)
            if place is None or not self._prefilled(job):
                return
            self._start(job, place)
            if job.started == job.request.copies:
                self._waiting.popleft()
                job.prefix = None

    def _place(self, job: _Job) -> Place | None:
        """Where as many of a job's copies as can be start together."""
        wanted = job.request.copies - job.started
        place = self._table.find(job.ticket, wanted)
        if place is None and self.slots_in_use < len(self._table) and self._grow_prompts():
            return self._place(job)
        return place

    def _grow_prompts(self) -> bool:
        """More rooms for prompts: for single copies, or when stragglers hold those of groups."""
        sizes = sizes_of(self._state)
        prompts = min(self._largest.prompts, GROWTH * sizes.prompts)
        if sizes.prompts == prompts:
            return False
        self._table.grow_rooms(prompts)
        self._state = self._engine.resize(self._state, sizes._replace(prompts=prompts))
        return True

    def _prefilled(self, job: _Job) -> bool:
        """Run the prompt, or its next part while others decode; whether it has been run whole."""
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
            padded_tokens=padded(tokens),
            true_length=len(tokens),
        )

    def _start(self, job: _Job, place: Place) -> None:
        assert job.prefix is not None
        self._make_room_for_prompt(job.prefix.k_LSHd.shape[1])
        copies = job.started + np.arange(len(place.slots))
        requests = self._slot_requests(job, place, copies)
        self._state = self._engine.insert_copies(job.prefix, self._state, requests)
        self._table.occupy(place, [SequenceId(job.ticket, copy) for copy in copies.tolist()])
        if job.request.suffix_tokens is not None and job.scores is None:
            (empty_A,) = self._score(place.slots[:1], [0], job.request.suffix_tokens)
            rest = np.zeros((job.request.copies, len(empty_A)), np.float32)
            job.scores = SuffixLogprobs(rest, empty_A)
        job.started += len(place.slots)
        job.running += len(place.slots)

    def _slot_requests(self, job: _Job, place: Place, copy_K: Int[np.ndarray, "K"]) -> SlotRequests:
        """As wide as the engine's copies for all, so that one program is compiled."""
        width, request = self._engine.copies, job.request
        unused = (0, width - len(copy_K))
        return SlotRequests(
            slot_K=np.pad(np.asarray(place.slots, np.int32), unused, constant_values=-1),
            row_K=np.pad(np.asarray(place.rows, np.int32), unused),
            prompt=place.room,
            key_K=_copy_keys(job.key, request.stream, np.pad(copy_K, unused)),
            limit_K=np.pad(job.limits[copy_K], unused),
            sampling=slot_sampling([request.sampling] * width),
        )

    # Room

    def _fit_slots(self) -> None:
        """A quarter of the slots, or less, when few sequences are left; all when more wait.

        A decode step takes its time for every slot, with a sequence or without.
        """
        shards, most = self._engine.shards, self._engine.max_concurrent_decodes
        free = len(self._table) - self.slots_in_use
        if self.waiting > free and len(self._table) < most:
            self._move_to(most // shards)
        elif not self._waiting:
            busiest, wanted = self._table.most_in_a_shard, most // shards
            while wanted > 1 and wanted // 4 >= busiest:
                wanted = max(1, wanted // 4)
            if wanted < self._table.per_shard and self._tokens_left() >= WORTH_A_MOVE:
                self._move_to(wanted)

    def _move_to(self, per_shard: int) -> None:
        self._state = self._engine.move_slots(self._state, self._table.move(per_shard))

    def _running(self) -> list[tuple[int, int]]:
        """Each running sequence's tokens that were read, and its limit."""
        jobs = ((self._jobs[ticket], copy) for ticket, copy in self._table.running)
        return [(int(job.lengths[copy]), int(job.limits[copy])) for job, copy in jobs]

    def _tokens_left(self) -> int:
        """Most tokens that a running sequence may still get."""
        return max((limit - length for length, limit in self._running()), default=0)

    def _make_room_for_prompt(self, tokens: int) -> None:
        sizes = sizes_of(self._state)
        if tokens > sizes.prompt_tokens:
            self._state = self._engine.resize(self._state, sizes._replace(prompt_tokens=tokens))

    def _make_room(self, in_flight: int) -> None:
        """Room for the longest sequence after the next dispatch, and not four times as much.

        `in_flight` tokens a slot may have been written without having been read.
        """
        longest = max(
            min(limit, length + in_flight + self._steps) for length, limit in self._running()
        )
        wanted = min(max(SMALLEST_ROOM, bucket(longest)), self._largest.own_tokens)
        sizes = sizes_of(self._state)
        if wanted > sizes.own_tokens or 4 * wanted <= sizes.own_tokens:
            self._state = self._engine.resize(self._state, sizes._replace(own_tokens=wanted))

    # Reading

    def _read(self, dispatch: _Dispatch) -> list[Event]:
        """Events of a dispatch; a sequence that is done frees its slot."""
        sampled = Sampled(*(np.asarray(x) for x in dispatch.sampled))
        self.decode_steps += int(sampled.steps)
        events, done = [], []
        for slot in np.nonzero(sampled.count_B)[0]:
            sequence = dispatch.sequences[slot]
            assert sequence is not None, "only a slot with a sequence is active"
            # It may have been cancelled since, or have moved to another slot.
            slot_now = self._table.slot_of(sequence)
            if slot_now is None:
                continue
            event = self._event(sequence, sampled, int(slot))
            events.append(event)
            self._jobs[event.ticket].lengths[event.copy] += len(event.tokens)
            if event.finished is not None:
                done.append((slot_now, event))
        self._score_done(done)
        for slot, _ in done:
            self._free(slot)
        return events

    def _event(self, sequence: SequenceId, sampled: Sampled, slot: int) -> Event:
        n = int(sampled.count_B[slot])
        tokens = np.asarray(sampled.token_CB[:n, slot])
        stopped = int(tokens[-1]) in self._jobs[sequence.ticket].stop_ids
        finished = None
        if sampled.done_B[slot]:
            finished = "stop" if stopped else "length"
        return Event(
            *sequence,
            tokens,
            np.asarray(sampled.logprob_CB[:n, slot]),
            np.asarray(sampled.top_id_CBR[:n, slot]),
            np.asarray(sampled.top_logprob_CBR[:n, slot]),
            finished,
        )

    def _score_done(self, done: Sequence[tuple[int, Event]]) -> None:
        """Score the suffixes of sequences that ended, one job's together."""
        for ticket in dict.fromkeys(event.ticket for _, event in done):
            job = self._jobs[ticket]
            if job.scores is None or job.request.suffix_tokens is None:
                continue
            of_job = [(slot, event) for slot, event in done if event.ticket == ticket]
            lengths = [
                int(job.lengths[event.copy]) - (event.finished == "stop") for _, event in of_job
            ]
            slots = [slot for slot, _ in of_job]
            scores = self._score(slots, lengths, job.request.suffix_tokens)
            job.scores.samples_KA[[event.copy for _, event in of_job]] = scores

    def _score(
        self, slots: list[int], lengths: list[int], suffix: np.ndarray
    ) -> Float[np.ndarray, "R A"]:
        """Logprobs of suffix[1:], as many rows at a time as the engine has copies."""
        rows, width = self._engine.copies, bucket(len(suffix))
        suffix_RA = np.tile(np.pad(suffix.astype(np.int32), (0, width - len(suffix))), (rows, 1))
        scores = []
        for first in range(0, len(slots), rows):
            slot_R = np.asarray(slots[first : first + rows], np.int32)
            length_R = np.asarray(lengths[first : first + rows], np.int32)
            padding = (0, rows - len(slot_R))
            scores_RA = self._engine.score(
                self._params,
                self._state,
                np.pad(slot_R, padding, mode="edge"),
                np.pad(length_R, padding),
                suffix_RA,
            )
            scores.append(np.asarray(scores_RA)[: len(slot_R), : len(suffix) - 1])
        return np.concatenate(scores)

    def _free(self, slot: int) -> None:
        """Empty a slot; a job whose last sequence it was is over, unless its scores are read."""
        job = self._jobs[self._table.free(slot).ticket]
        job.running -= 1
        ended = not job.running and job.started == job.request.copies
        if ended and job.request.suffix_tokens is None:
            del self._jobs[job.ticket]


def first_sizes(engine: DecoderEngine, requests: Sequence[Request]) -> Sizes:
    """Rooms to begin with, for these requests, or for groups of the engine's copies."""
    copies = min([engine.copies, *(max(1, request.copies) for request in requests)])
    longest = max((len(request.prompt_tokens) for request in requests), default=1)
    per_shard = engine.max_concurrent_decodes // engine.shards
    return Sizes(
        -(-per_shard // copies) * engine.shards,
        bucket(longest),
        min(SMALLEST_ROOM, engine.largest_sizes.own_tokens),
    )


def check(engine: DecoderEngine, request: Request, name: str = "prompt") -> None:
    """Raise InputError for what the engine cannot take; `name` says whose request it is."""
    length = len(request.prompt_tokens)
    if not 1 <= length <= engine.max_prefill_length:
        raise InputError(
            f"{name}: {length} tokens; the engine takes 1 to "
            f"{engine.max_prefill_length} (data.max_prompt_tokens)"
        )
    for limit in np.atleast_1d(request.max_tokens).tolist():
        if not 1 <= limit <= engine.max_new_tokens:
            raise InputError(
                f"{name}: a limit of {limit} new tokens; the engine takes 1 "
                f"to {engine.max_new_tokens}"
            )
    if len(request.sampling.stop_ids) > MAX_STOP_IDS:
        raise InputError(
            f"{name}: {len(request.sampling.stop_ids)} stop tokens; a request takes {MAX_STOP_IDS}"
        )


@jax.jit
def _copy_keys(
    key: Key[Array, ""], stream: int | Int[Array, ""], copy_K: Int[Array | np.ndarray, "K"]
) -> Key[Array, "K"]:
    prompt_key = jax.random.fold_in(key, stream)
    return jax.vmap(lambda copy: jax.random.fold_in(prompt_key, copy))(copy_K)
