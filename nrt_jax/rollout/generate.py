"""Prompts to traces: our own loop around the engine, the same on every host.

Letters: N sequences of all requests, T tokens, B slots, K copies that start together.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Float, Int, Key

from nrt_jax.errors import InputError
from nrt_jax.records import Trace
from nrt_jax.rollout.engine import (
    DecoderEngine,
    DecodeState,
    Prefix,
    SampledTokens,
    SlotRequests,
    bucket,
)


class Request(NamedTuple):
    """Sample `copies` sequences after one prompt."""

    prompt_tokens: np.ndarray
    stream: int
    """Names the prompt's random stream: with the run's key it fixes every draw."""
    copies: int
    max_tokens: int


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
    """Traces of every request, in order; `stop_ids` are those of the engine.

    A trace depends on (key, request.stream, copy) and the weights alone: not on the slot, the
    neighbours or the order. Slots are refilled while others decode; host reads lag one step, so
    the device is never waited for. Raises InputError for a prompt longer than the engine takes,
    and for a limit that is not positive or beyond its cache.
    """
    assert stop_ids == engine.stop_ids, "the engine was built to stop at other tokens"
    _check(engine, requests)
    scheduler = _Scheduler(engine, params, requests, key, temperature, top_p)
    state = engine.init_decode_state()
    unread: SampledTokens | None = None
    while True:
        state = scheduler.fill(state)
        sampled = None
        if scheduler.busy:
            state, sampled = engine.generate(params, state)
            sampled.copy_to_host_async()
        if unread is not None:
            scheduler.read(unread)
        if sampled is None:
            return scheduler.traces(stop_ids)
        unread = sampled


def _check(engine: DecoderEngine, requests: Sequence[Request]) -> None:
    for index, request in enumerate(requests):
        length = len(request.prompt_tokens)
        if not 1 <= length <= engine.max_prefill_length:
            raise InputError(
                f"prompt {index}: {length} tokens; the engine takes 1 to "
                f"{engine.max_prefill_length} (data.max_prompt_tokens)"
            )
        if not 1 <= request.max_tokens <= engine.max_new_tokens:
            raise InputError(
                f"prompt {index}: a limit of {request.max_tokens} new tokens; the engine takes 1 "
                f"to {engine.max_new_tokens}"
            )


class _Scheduler:
    """Which sequence sits in which slot, who waits, and what has been sampled so far.

    The copies of all requests are numbered one after the other: with copies (2, 3), sequence 3 is
    copy 1 of request 1. Sequences start in this order.
    """

    def __init__(
        self,
        engine: DecoderEngine,
        params: Any,
        requests: Sequence[Request],
        key: jax.Array,
        temperature: float,
        top_p: float,
    ):
        self._engine, self._params, self._requests, self._key = engine, params, requests, key
        self._temperature, self._top_p = temperature, top_p
        copies = [request.copies for request in requests]
        self._request_N = np.repeat(np.arange(len(requests)), copies)
        self._copy_N = np.concatenate([np.arange(count) for count in [0, *copies]])
        self._width = max(copies, default=1)
        longest = max((request.max_tokens for request in requests), default=1)
        self._token_NT = np.zeros((len(self._request_N), longest), np.int32)
        self._log_prob_NT = np.zeros(self._token_NT.shape, np.float32)
        self._length_N = np.zeros(len(self._request_N), np.int32)
        self._started = 0
        self._prefilled: tuple[int, Prefix] | None = None
        # The sequence in each slot; -1 in a free one.
        self._sequence_B = np.full(engine.max_concurrent_decodes, -1)

    @property
    def busy(self) -> bool:
        """Whether any slot is taken."""
        return bool((self._sequence_B >= 0).any())

    def fill(self, state: DecodeState) -> DecodeState:
        """Start waiting sequences in the free slots, all copies of one prompt together."""
        (free,) = np.nonzero(self._sequence_B < 0)
        while free.size and self._started < len(self._request_N):
            index = int(self._request_N[self._started])
            waiting = np.searchsorted(self._request_N, index, side="right") - self._started
            slot_K, free = np.split(free, [min(waiting, free.size)])
            sequence_K = self._started + np.arange(slot_K.size)
            self._sequence_B[slot_K] = sequence_K
            self._started += slot_K.size
            state = self._engine.insert_copies(
                self._prefix(index), state, self._slot_requests(index, slot_K, sequence_K)
            )
        return state

    def read(self, result: SampledTokens) -> None:
        """Store a step's tokens with their sequences, and free the slots that are done.

        A slot keeps its sequence until its last token is read here, and those that started since
        the step have no token in it: the slots' sequences are right for a step that is read late.
        """
        host = result.convert_to_numpy()
        (slots,) = np.nonzero(host.valid_B)
        sequences, lengths = self._sequence_B[slots], host.length_B[slots]
        self._token_NT[sequences, lengths - 1] = host.token_B[slots]
        self._log_prob_NT[sequences, lengths - 1] = host.log_prob_B[slots]
        self._length_N[sequences] = lengths
        self._sequence_B[host.done_B] = -1

    def traces(self, stop_ids: frozenset[int]) -> list[tuple[Trace, ...]]:
        """What was sampled, request by request."""
        rows = zip(self._token_NT, self._log_prob_NT, self._length_N, strict=True)
        traces = (_trace(token_T[:n], log_prob_T[:n], stop_ids) for token_T, log_prob_T, n in rows)
        return [tuple(next(traces) for _ in range(r.copies)) for r in self._requests]

    def _prefix(self, index: int) -> Prefix:
        """The prompt's prefill, kept until the next prompt's, so that all copies share it."""
        if self._prefilled is None or self._prefilled[0] != index:
            tokens = self._requests[index].prompt_tokens
            padded = np.zeros(bucket(len(tokens)), np.int32)
            padded[: len(tokens)] = tokens
            prefix = self._engine.prefill(
                params=self._params, padded_tokens=padded, true_length=len(tokens)
            )
            self._prefilled = index, prefix
        return self._prefilled[1]

    def _slot_requests(
        self, index: int, slot_K: Int[np.ndarray, "K"], sequence_K: Int[np.ndarray, "K"]
    ) -> SlotRequests:
        """The widest request's shape for all, so that one program is compiled."""
        request, width = self._requests[index], self._width
        unused = (0, width - slot_K.size)
        copy_K = np.pad(self._copy_N[sequence_K], unused)
        return SlotRequests(
            slot_K=np.pad(slot_K, unused, constant_values=-1).astype(np.int32),
            key_K=_copy_keys(self._key, request.stream, copy_K),
            limit_K=np.full(width, request.max_tokens, np.int32),
            temperature_K=np.full(width, self._temperature, np.float32),
            top_p_K=np.full(width, self._top_p, np.float32),
        )


@jax.jit
def _copy_keys(
    key: Key[Array, ""], stream: int | Int[Array, ""], copy_K: Int[Array | np.ndarray, "K"]
) -> Key[Array, "K"]:
    prompt_key = jax.random.fold_in(key, stream)
    return jax.vmap(lambda copy: jax.random.fold_in(prompt_key, copy))(copy_K)


def _trace(
    token_T: Int[np.ndarray, "T"], log_prob_T: Float[np.ndarray, "T"], stop_ids: frozenset[int]
) -> Trace:
    """Split the special token that ended a sequence from the tokens before it."""
    stopped = int(token_T[-1]) in stop_ids
    kept = len(token_T) - stopped
    return Trace(
        # Copies, so that a short trace does not keep the room of the longest in memory.
        tokens=token_T[:kept].copy(),
        log_probs=log_prob_T[:kept].copy(),
        end_token=int(token_T[-1]) if stopped else None,
        end_log_prob=float(log_prob_T[-1]) if stopped else 0.0,
    )
