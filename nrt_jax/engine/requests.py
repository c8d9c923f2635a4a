"""Requests to a scheduler, their progress, and the events that answer them.

Letters: K samples of one prompt, T tokens.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import jax
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from nrt_jax.engine.decode_state import Sampled
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.engine.packed_requests import packed_sampling
from nrt_jax.engine.sampling import MAX_STOP_IDS, Sampling
from nrt_jax.engine.slot_table import SequenceId
from nrt_jax.errors import InputError
from nrt_jax.types import SuffixLogprobs

LARGEST_FLOAT = float(np.finfo(np.float32).max)


class Request(NamedTuple):
    """Sample `num_samples` sequences after one prompt."""

    prompt_tokens: np.ndarray
    stream: int
    """Names the prompt's random stream, an int32: together with the key it fixes every draw."""
    num_samples: int
    max_tokens: int | tuple[int, ...]
    """Limit of all samples, or one for each."""
    sampling: Sampling = Sampling()
    suffix_tokens: np.ndarray | None = None
    """t_end y*, scored after each finished sequence and after the empty trace; None: no scores."""
    score_samples: bool = True
    """False scores the suffix after the empty trace alone."""

    @property
    def limits_K(self) -> Int[np.ndarray, "K"]:
        """Limit of each sample."""
        return np.broadcast_to(np.asarray(self.max_tokens, np.int32), self.num_samples)


class Event(NamedTuple):
    """New tokens of one sequence since its last event."""

    ticket: int
    sample: int
    tokens: Int[np.ndarray, "T"]
    """A token that stopped the sequence included."""
    logprobs: Float[np.ndarray, "T"]
    top_ids: Int[np.ndarray, "T top"]
    top_logprobs: Float[np.ndarray, "T top"]
    finished: Literal["stop", "length"] | None


class Read(NamedTuple):
    """What a dispatch drew, by the slots that it decoded."""

    sampled: Sampled
    """On the host."""
    sequences: list[SequenceId | None]
    live_B: Bool[np.ndarray, "B"]
    """Slots that drew tokens of a sequence that was not cancelled."""
    before_B: Int[np.ndarray, "B"]
    """Tokens of their sequences that were read before."""
    finished: Mapping[int, Literal["stop", "length"]]
    """How sequences ended, by slot."""
    layout: int
    """Counts the moves of sequences to other slots before the dispatch."""

    def events(self) -> list[Event]:
        """The new tokens, sequence by sequence."""
        return [self._event(slot) for slot in np.nonzero(self.live_B)[0].tolist()]

    def _event(self, slot: int) -> Event:
        n, sequence = int(self.sampled.count_B[slot]), self.sequences[slot]
        assert sequence is not None, "only a slot with a sequence is active"
        return Event(
            *sequence,
            np.asarray(self.sampled.tokens[:n, slot]),
            np.asarray(self.sampled.logprobs[:n, slot]),
            np.asarray(self.sampled.top_ids[:n, slot]),
            np.asarray(self.sampled.top_logprobs[:n, slot]),
            self.finished.get(slot),
        )


class RequestFailed(Exception):
    """One request could not be prepared, from its cause; the others go on."""

    def __init__(self, ticket: int):
        super().__init__(f"the request with ticket {ticket} could not be prepared")
        self.ticket = ticket


@dataclass(eq=False)
class Job:
    """A request in progress."""

    ticket: int
    request: Request
    key_data: UInt[np.ndarray, "words"]
    """Of the key, on the host."""
    limits: Int[np.ndarray, "K"]
    stop_ids: frozenset[int]
    """Tokens that end its sequences."""
    sampling: Int[np.ndarray, "settings"]
    """As `packed_sampling` writes it."""
    started: int = 0
    running: int = 0
    suffix_logprobs: SuffixLogprobs | None = None


def first_sizes(engine: Engine, requests: Sequence[Request]) -> Sizes:
    """Cache sizes to start with, for full groups of these requests or of the engine's samples."""
    samples = engine.num_samples
    if not engine.one_size:
        samples = min([samples, *(max(1, request.num_samples) for request in requests)])
    longest = max((len(request.prompt_tokens) for request in requests), default=1)
    per_shard = engine.max_concurrent_decodes // engine.shards
    return Sizes(
        -(-per_shard // samples) * engine.shards,
        engine.prompt_capacity(longest),
        engine.smallest_own_tokens,
    )


def request_key(seed: int) -> Key[Array, ""]:
    """The key of a seed of -2**63 to 2**63 - 1; jax alone would drop all but 32 bits of it."""
    high, low = divmod(seed % 2**64, 2**32)
    key = jax.random.key(np.uint32(low))
    return jax.random.fold_in(key, np.uint32(high)) if high else key


def make_job(engine: Engine, ticket: int, request: Request, key: Key[Array, ""]) -> Job:
    """A request as what the engine's programs take, so that what cannot be converted fails here.

    Raises InputError for a request beyond the engine's limits.
    """
    check(engine, request)
    sampling = request.sampling
    of_engine = frozenset() if sampling.ignores_eos else engine.stop_ids
    return Job(
        ticket,
        request._replace(prompt_tokens=np.asarray(request.prompt_tokens, np.int32)),
        np.asarray(jax.random.key_data(key)),
        limits=request.limits_K,
        stop_ids=of_engine | sampling.stop_ids,
        sampling=_packed_sampling(sampling),
    )


_packed_sampling = lru_cache(maxsize=64)(packed_sampling)


def check(engine: Engine, request: Request, name: str = "prompt") -> None:
    """Raise InputError for a request beyond the engine's limits; `name` stands for its prompt."""
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
    values = {"stream": request.stream, **request.sampling._asdict()}
    for field, smallest in (("stream", -(2**31)), ("top_k", 0), ("min_tokens", 0)):
        if not smallest <= values[field] < 2**31:
            raise InputError(
                f"{name}: {field} {values[field]}; it must be {smallest} to {2**31 - 1}"
            )
    for field in ("temperature", "top_p", "min_p", "repetition_penalty"):
        if not abs(values[field]) <= LARGEST_FLOAT:  # NaN is not either
            raise InputError(f"{name}: {field} {values[field]}; it must be a finite number")
