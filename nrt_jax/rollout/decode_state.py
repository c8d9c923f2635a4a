"""What the engine holds between calls: prompts after prefill, and every slot's sequence.

Letters: L layers, B slots, N prompts, K copies of one prompt, S prompt tokens, H key/value heads,
d head dim, V vocabulary, C decode steps, R most probable tokens that are reported.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from nrt_jax.models.sharding import partition_spec
from nrt_jax.rollout.cache import LayerCache, Places, Sizes
from nrt_jax.rollout.sampler import MAX_STOP_IDS, Sampling, SlotSampling

SMALLEST_BUCKET = 16


def bucket(length: int) -> int:
    """Smallest power of two, 16 or more, that holds `length` tokens."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class Prefix(NamedTuple):
    """A prompt after prefill, or its first part: keys and values, and the logits of what follows.

    Entries from `length` on are room for a later part.
    """

    k_LSHd: Float[Array, "L S H d"]
    v_LSHd: Float[Array, "L S H d"]
    logits_V: Float[Array, "V"]
    seen_V: Bool[Array, "V"]
    """Tokens of the prompt, for the repetition penalty."""
    length: Int[Array, ""]


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

    layers: tuple[LayerCache, ...]
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

    token_CB: Int[Array | np.ndarray, "C B"]
    log_prob_CB: Float[Array | np.ndarray, "C B"]
    top_id_CBR: Int[Array | np.ndarray, "C B R"]
    top_log_prob_CBR: Float[Array | np.ndarray, "C B R"]
    count_B: Int[Array | np.ndarray, "B"]
    done_B: Bool[Array | np.ndarray, "B"]
    """The last token ended the sequence, by itself or by the limit."""
    steps: Int[Array | np.ndarray, ""]


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
    layer = state.layers[0]
    N, _, S, _ = layer.prompt_k_NHSd.values.shape
    return Sizes(N, S, layer.own_v_BHTd.values.shape[2])


def empty_state(
    layers: tuple[LayerCache, ...], slots: int, copies: int, vocab_size: int
) -> DecodeState:
    """No slot is active."""
    N, B = layers[0].prompt_k_NHSd.values.shape[0], slots
    zeros_B = jnp.zeros(B, jnp.int32)
    return DecodeState(
        layers=layers,
        places=Places(
            jnp.zeros(N, jnp.int32), jnp.zeros((N, copies), jnp.int32), zeros_B, zeros_B
        ),
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
    heads = NamedSharding(mesh, partition_spec(("batch", "kv_heads")))
    everywhere_rows = jax.tree.map(lambda _: rows, shapes)
    return everywhere_rows._replace(layers=jax.tree.map(lambda _: heads, shapes.layers))
