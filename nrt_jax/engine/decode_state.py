"""What the engine holds between calls: prompts after prefill, and every slot's sequence.

Letters: L layers, B slots, N prompts, K copies of one prompt, S prompt tokens, H key/value heads,
d head dim, V vocabulary, C decode steps, R most probable tokens that are reported.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from nrt_jax.engine.kv_cache import Places, Sizes, fit_in_shards, gather_in_shards
from nrt_jax.engine.sampling import MAX_STOP_IDS, Sampling, SlotSampling
from nrt_jax.models.sharding import partition_spec

SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """Smallest power of two, 16 or more, that holds `length` tokens."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def padded(tokens: np.ndarray) -> Int[np.ndarray, "S"]:
    """The tokens, int32, with zeros behind them up to a bucket."""
    return np.pad(tokens.astype(np.int32), (0, bucket(len(tokens)) - len(tokens)))


class SlotRequests(NamedTuple):
    """What each of K copies of one prompt is to do; a slot of -1 is no copy."""

    slot_K: Int[Array | np.ndarray, "K"]
    row_K: Int[Array | np.ndarray, "K"]
    """The copy's row among those of its prompt."""
    prompt: Int[Array | np.ndarray, ""] | int
    """Where the prompt's keys and values lie, 0 to N - 1, in the shard of the slots."""
    key_K: Key[Array, "K"]
    limit_K: Int[Array | np.ndarray, "K"]
    sampling: SlotSampling


class DecodeState(NamedTuple):
    """Every slot's cache and the logits its next token will be drawn from."""

    layers: tuple[Any, ...]
    """In the form of the engine's cache."""
    places: Places
    logits_BV: Float[Array, "B V"]
    seen_BV: Bool[Array, "B V"]
    position_B: Int[Array, "B"]
    generated_B: Int[Array, "B"]
    limit_B: Int[Array, "B"]
    active_B: Bool[Array, "B"]
    key_B: Key[Array, "B"]
    sampling: SlotSampling


class Sampled(NamedTuple):
    """What some decode steps wrote: slot b's tokens are the first `count_B[b]` of its column."""

    token_CB: Int[Array, "C B"]
    logprob_CB: Float[Array, "C B"]
    top_id_CBR: Int[Array, "C B R"]
    top_logprob_CBR: Float[Array, "C B R"]
    count_B: Int[Array, "B"]
    done_B: Bool[Array, "B"]
    """The last token ended the sequence, by itself or by the limit."""
    steps: Int[Array, ""]


class Moves(NamedTuple):
    """More slots or fewer; who knows all sequences says where each of them is to be."""

    from_B: Int[Array | np.ndarray, "B"]
    """The old slot of each, counted within the shard; any for one that is free."""
    free_B: Bool[Array | np.ndarray, "B"]
    slots_NK: Int[Array | np.ndarray, "N K"]
    place_B: Int[Array | np.ndarray, "B"]


def slot_sampling(settings: Sequence[Sampling]) -> SlotSampling:
    """One row for each of `settings`."""
    stop_BX = np.full((len(settings), MAX_STOP_IDS), -1, np.int32)
    for row, sampling in zip(stop_BX, settings, strict=True):
        row[: len(sampling.stop_ids)] = sorted(sampling.stop_ids)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(sampling, name) for sampling in settings], dtype)

    return SlotSampling(
        temperature_B=column("temperature", np.float32),
        top_p_B=column("top_p", np.float32),
        top_k_B=column("top_k", np.int32),
        min_p_B=column("min_p", np.float32),
        penalty_B=column("repetition_penalty", np.float32),
        stop_BX=stop_BX,
    )


def sizes_of(state: DecodeState) -> Sizes:
    """Room of the caches."""
    return state.layers[0].sizes


def empty_state(layers: tuple[Any, ...], slots: int, copies: int, vocab_size: int) -> DecodeState:
    """No slot is active."""
    N, B = layers[0].sizes.prompts, slots
    zeros_B = jnp.zeros(B, jnp.int32)
    return DecodeState(
        layers=layers,
        places=Places(jnp.zeros(N, jnp.int32), jnp.zeros((N, copies), jnp.int32), zeros_B, zeros_B),
        logits_BV=jnp.zeros((B, vocab_size), jnp.float32),
        seen_BV=jnp.zeros((B, vocab_size), bool),
        position_B=zeros_B,
        generated_B=zeros_B,
        limit_B=zeros_B,
        active_B=jnp.zeros(B, bool),
        key_B=jax.random.split(jax.random.key(0), B),
        sampling=jax.tree.map(jnp.asarray, slot_sampling([Sampling()] * B)),
    )


def state_shardings(mesh: Mesh, shapes: DecodeState) -> DecodeState:
    """Slots and prompts over the batch axes, key/value heads over the tensor axis."""
    rows = NamedSharding(mesh, partition_spec(("batch",)))
    heads = NamedSharding(mesh, partition_spec(shapes.layers[0].logical_axes))
    everywhere_rows = jax.tree.map(lambda _: rows, shapes)
    return everywhere_rows._replace(layers=jax.tree.map(lambda _: heads, shapes.layers))


def resized(places: Places, sizes: Sizes, shards: int) -> Places:
    """More rooms for prompts."""
    return places._replace(
        prompt_length_N=fit_in_shards(places.prompt_length_N, sizes.prompts, shards),
        slots_NK=fit_in_shards(places.slots_NK, sizes.prompts, shards),
    )


def moved(rest: DecodeState, moves: Moves, shards: int) -> DecodeState:
    """All but the layers' caches, with the sequences in other slots."""
    from_UI = moves.from_B.reshape(shards, -1)
    places = rest.places
    rest = rest._replace(places=places.own_length_B)
    rest = jax.tree.map(lambda x_B: gather_in_shards(x_B, from_UI), rest)
    return rest._replace(
        places=Places(places.prompt_length_N, moves.slots_NK, moves.place_B, rest.places),
        active_B=rest.active_B & ~moves.free_B,
    )
