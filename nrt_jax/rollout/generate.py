"""Prompts to traces: our own loop around the engine, the same on every host."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from nrt_jax.errors import InputError
from nrt_jax.records import Trace
from nrt_jax.rollout.engine import DecoderEngine, DecodeState, SampledTokens, SlotRequests, bucket


class Request(NamedTuple):
    """Sample `copies` sequences after one prompt."""

    prompt_tokens: np.ndarray
    stream: int
    """Names the prompt's random stream: with the run's key it fixes every draw."""
    copies: int
    max_tokens: int


@dataclass
class _Sequence:
    """One sequence that is being decoded."""

    request: int
    copy: int
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


def generate(
    engine: DecoderEngine,
    params: Any,
    requests: Sequence[Request],
    key: jax.Array,
    *,
    stop_ids: frozenset[int],
    temperature: float,
    top_p: float,
) -> list[tuple[Trace, ...]]:
    """Traces of every request, in order.

    A trace depends on (key, request.stream, copy) and the weights alone: not on the slot, the
    neighbours or the order. Slots are refilled while others decode; host reads lag one step, so
    the device is never waited for. Raises InputError for a prompt longer than the engine takes.
    """
    _check_lengths(engine, requests)
    scheduler = _Scheduler(engine, params, requests, key, temperature, top_p)
    state = engine.init_decode_state()
    unread: tuple[SampledTokens, list[_Sequence | None]] | None = None
    finished: dict[tuple[int, int], Trace] = {}
    while True:
        state = scheduler.fill(state)
        running = list(scheduler.slots)
        result = None
        if any(sequence is not None for sequence in running):
            state, result = engine.generate(params, state)
            result.copy_to_host_async()
        if unread is not None:
            for slot, sequence in _read(*unread):
                finished[sequence.request, sequence.copy] = _trace(sequence, stop_ids)
                scheduler.slots[slot] = None
        if result is None and not scheduler.waiting and not any(scheduler.slots):
            break
        unread = None if result is None else (result, running)
    return [
        tuple(finished[index, copy] for copy in range(request.copies))
        for index, request in enumerate(requests)
    ]


def _check_lengths(engine: DecoderEngine, requests: Sequence[Request]) -> None:
    for index, request in enumerate(requests):
        length = len(request.prompt_tokens)
        if not 1 <= length <= engine.max_prefill_length:
            raise InputError(
                f"prompt {index}: {length} tokens; the engine takes 1 to "
                f"{engine.max_prefill_length} (data.max_prompt_tokens)"
            )


class _Scheduler:
    """Which sequence sits in which slot, and who waits."""

    def __init__(self, engine, params, requests, key, temperature, top_p):
        self.slots: list[_Sequence | None] = [None] * engine.max_concurrent_decodes
        self.waiting = deque(
            (index, copy) for index, request in enumerate(requests) for copy in range(request.copies)
        )
        self._engine, self._params, self._requests, self._key = engine, params, requests, key
        self._temperature, self._top_p = temperature, top_p
        self._width = max((request.copies for request in requests), default=1)
        self._prefilled: tuple[int, Any] = (-1, None)

    def fill(self, state: DecodeState) -> DecodeState:
        """Start waiting sequences in the free slots, all copies of one prompt together."""
        free = deque(slot for slot, sequence in enumerate(self.slots) if sequence is None)
        while free and self.waiting:
            index = self.waiting[0][0]
            placed: list[tuple[int, int]] = []
            while free and self.waiting and self.waiting[0][0] == index:
                slot, (_, copy) = free.popleft(), self.waiting.popleft()
                self.slots[slot] = _Sequence(index, copy)
                placed.append((slot, copy))
            state = self._engine.insert_copies(
                self._prefix(index), state, self._slot_requests(index, placed)
            )
        return state

    def _prefix(self, index: int):
        """The prompt's prefill, kept until the next prompt's, so that all copies share it."""
        if self._prefilled[0] != index:
            tokens = self._requests[index].prompt_tokens
            padded = np.zeros(bucket(len(tokens)), np.int32)
            padded[: len(tokens)] = tokens
            prefix = self._engine.prefill(
                params=self._params, padded_tokens=padded, true_length=len(tokens)
            )
            self._prefilled = (index, prefix)
        return self._prefilled[1]

    def _slot_requests(self, index: int, placed: list[tuple[int, int]]) -> SlotRequests:
        """The widest request's shape for all, so that one program is compiled."""
        request = self._requests[index]
        rows = placed + [(-1, 0)] * (self._width - len(placed))
        slot_K, copy_K = np.asarray(rows, np.int32).T
        return SlotRequests(
            slot_K=slot_K,
            key_K=_copy_keys(self._key, request.stream, copy_K),
            limit_K=np.full(self._width, request.max_tokens, np.int32),
            temperature_K=np.full(self._width, self._temperature, np.float32),
            top_p_K=np.full(self._width, self._top_p, np.float32),
        )


@jax.jit
def _copy_keys(key: jax.Array, stream: int, copy_K: jax.Array) -> jax.Array:
    prompt_key = jax.random.fold_in(key, stream)
    return jax.vmap(lambda copy: jax.random.fold_in(prompt_key, copy))(copy_K)


def _read(result: SampledTokens, running: list[_Sequence | None]):
    """Append a step's tokens to their sequences; yield the slots that are done."""
    host = result.convert_to_numpy()
    columns = zip(host.token_B, host.valid_B, host.log_prob_B, host.done_B, strict=True)
    for slot, (token, valid, log_prob, done) in enumerate(columns):
        sequence = running[slot]
        if sequence is None or not valid:
            continue
        sequence.tokens.append(int(token))
        sequence.log_probs.append(float(log_prob))
        if done:
            yield slot, sequence


def _trace(sequence: _Sequence, stop_ids: frozenset[int]) -> Trace:
    """Split the special token that ended a sequence from the tokens before it."""
    stopped = bool(sequence.tokens) and sequence.tokens[-1] in stop_ids
    kept = len(sequence.tokens) - stopped
    return Trace(
        tokens=np.asarray(sequence.tokens[:kept], np.int32),
        log_probs=np.asarray(sequence.log_probs[:kept], np.float32),
        end_token=sequence.tokens[-1] if stopped else None,
        end_log_prob=sequence.log_probs[-1] if stopped else 0.0,
    )
