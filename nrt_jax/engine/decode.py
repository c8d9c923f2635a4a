"""Transitions of the decode state: sequences start in slots, tokens are drawn and run.

Pure functions, which the engine compiles. Letters: those of decode_state.py, and G query heads per
key/value head.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.engine.decode_state import DecodeState, Sampled, SlotRequests, sizes_of
from nrt_jax.engine.kv_cache import KVCache, SlotMap
from nrt_jax.engine.packed_requests import unpacked
from nrt_jax.engine.paged_kv_cache import PagedCache
from nrt_jax.engine.prefill import Prefix
from nrt_jax.engine.sampling import fit_vocab, most_probable, sample
from nrt_jax.models.decoder import Decoder


class TokenSets(NamedTuple):
    """Tokens with a meaning of their own; arguments, so that engines with others share programs."""

    is_stop_V: Bool[Array | np.ndarray, "V"]
    """The tokens that end any sequence."""
    is_banned_V: Bool[Array | np.ndarray, "V"]
    """The tokens that are never drawn; the others share their probability."""


def token_sets(vocab_size: int, stop_ids: frozenset[int], banned_ids: frozenset[int]) -> TokenSets:
    """The sets as masks over the vocabulary; a tokenizer may have more tokens than the model."""
    ids_V = np.arange(vocab_size)
    return TokenSets(np.isin(ids_V, sorted(stop_ids)), np.isin(ids_V, sorted(banned_ids)))


class Decoding(NamedTuple):
    """What is the same in every step."""

    cache: KVCache | PagedCache
    shards: int
    num_samples: int
    """K: most slots that share one prompt slot."""
    top_logprobs: int
    """Most probable tokens that are reported for each token drawn."""
    dtype: DTypeLike
    unstacks_once: bool
    """Slice the stacked weights once before the steps: on a CPU each slice copies them."""
    mesh: Mesh


def insert_samples(
    prefix: Prefix,
    state: DecodeState,
    prompts: list[Any],
    requests: SlotRequests,
    decoding: Decoding,
) -> tuple[DecodeState, list[Any]]:
    """Start up to K sequences in each shard after the shard's row of `prefix`.

    `prompts` holds the part of each layer's cache that this changes; it is returned with the
    prompts' keys and values written.
    """
    slots = len(state.active_B) // decoding.shards
    slot_RK = jnp.where(requests.slot_K < 0, slots, requests.slot_K)
    prompt_R = jnp.asarray(requests.prompt)
    prompts = [
        decoding.cache.insert(layer, k, v, prompt_R, prefix.length_R, slot_RK)
        for layer, k, v in zip(prompts, prefix.k_LRHSd, prefix.v_LRHSd, strict=True)
    ]
    by_shard = jax.tree.map(lambda x: x.reshape(decoding.shards, -1, *x.shape[1:]), state)
    started = jax.vmap(_start_in_shard)(
        by_shard, prefix.logits_RV, prefix.seen_RV, prefix.length_R, requests
    )
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), started), prompts


def insert_packed(
    prefix: Prefix,
    state: DecodeState,
    prompts: list[Any],
    data_RC: Int[Array, "R columns"],
    samples: int,
    decoding: Decoding,
) -> tuple[DecodeState, list[Any]]:
    """`insert_samples` of the data of packed requests, for K samples in each shard."""
    return insert_samples(prefix, state, prompts, unpacked(data_RC, samples), decoding)


def _start_in_shard(
    state: DecodeState,
    logits_V: Float[Array, "V"],
    seen_V: Bool[Array, "V"],
    length: Int[Array, ""],
    requests: SlotRequests,
) -> DecodeState:
    """The state of one shard without its caches, with sequences after a prompt of `length`."""
    slot_map, prompt = state.slot_map, requests.prompt
    B, K = len(state.active_B), slot_map.slots_PK.shape[1]
    # Indices out of range, which the updates below drop.
    slot_K = jnp.where(requests.slot_K < 0, B, requests.slot_K)
    row_K = jnp.where(requests.slot_K < 0, K, requests.row_K)

    def put(all_slots: Array, value: Array | int | bool) -> Array:
        return all_slots.at[slot_K].set(value, mode="drop")

    return state._replace(
        slot_map=SlotMap(
            prompt_length_P=slot_map.prompt_length_P.at[prompt].set(length, mode="drop"),
            slots_PK=slot_map.slots_PK.at[prompt, row_K].set(slot_K, mode="drop"),
            prompt_row_B=put(slot_map.prompt_row_B, prompt * K + row_K),
            own_length_B=put(slot_map.own_length_B, 0),
        ),
        logits_BV=put(state.logits_BV, logits_V[None]),
        seen_BV=put(state.seen_BV, seen_V[None]),
        position_B=put(state.position_B, length),
        generated_B=put(state.generated_B, 0),
        limit_B=put(state.limit_B, requests.limit_K),
        active_B=put(state.active_B, requests.limit_K > 0),
        key_B=put(state.key_B, requests.key_K),
        sampling=jax.tree.map(put, state.sampling, requests.sampling),
    )


@jax.named_scope("decode")
def decode_steps(
    decoder: Decoder,
    state: DecodeState,
    enough: Int[Array, ""],
    token_sets: TokenSets,
    steps: int,
    decoding: Decoding,
) -> tuple[DecodeState, Sampled]:
    """Up to `steps` tokens in every slot, until none is active or `enough` sequences ended."""
    layers = decoder.split_layers() if decoding.unstacks_once else None
    started_B = state.active_B
    # Those of the later steps are among those of the first.
    any_early = jnp.any(_early(state))

    def goes_on(carry: tuple[DecodeState, Sampled]) -> Array:
        state, sampled = carry
        # One sum over the devices per step, instead of one for each.
        ended, active = jnp.sum(jnp.stack([started_B & ~state.active_B, state.active_B]), axis=1)
        return (sampled.steps < steps) & (ended < enough) & (active > 0)

    def step(carry: tuple[DecodeState, Sampled]) -> tuple[DecodeState, Sampled]:
        state, sampled = carry
        token_B, sampled = _draw(state, sampled, token_sets, any_early, decoding)
        weights = decoder.split_layers() if layers is None else layers
        return _run(decoder, weights, state, token_B, sampled.done_B, decoding), sampled

    empty = _nothing_sampled(steps, len(started_B), decoding.top_logprobs)
    return jax.lax.while_loop(goes_on, step, (state, empty))


def _nothing_sampled(steps: int, slots: int, top: int) -> Sampled:
    return Sampled(
        tokens=jnp.zeros((steps, slots), jnp.int32),
        logprobs=jnp.zeros((steps, slots), jnp.float32),
        top_ids=jnp.zeros((steps, slots, top), jnp.int32),
        top_logprobs=jnp.zeros((steps, slots, top), jnp.float32),
        count_B=jnp.zeros(slots, jnp.int32),
        done_B=jnp.zeros(slots, bool),
        steps=jnp.int32(0),
    )


def _draw(
    state: DecodeState,
    sampled: Sampled,
    token_sets: TokenSets,
    any_early: Bool[Array, ""],
    decoding: Decoding,
) -> tuple[Int[Array, "B"], Sampled]:
    """A token for every slot, and whether it ends the sequence."""
    keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.generated_B)
    logits_BV = _without_early_stops(state, token_sets.is_stop_V, any_early)
    is_banned_BV = token_sets.is_banned_V[None] & state.sampling.obeys_bans_B[:, None]
    logits_BV = jnp.where(is_banned_BV, -jnp.inf, logits_BV)
    token_B, logprob_B = sample(logits_BV, state.seen_BV, keys_B, state.sampling, decoding.mesh)
    stopped_B = token_sets.is_stop_V[token_B] & ~state.sampling.ignores_eos_B
    stopped_B |= jnp.any(state.sampling.stop_ids == token_B[:, None], axis=1)
    stopped_B |= state.generated_B + 1 >= state.limit_B
    i = sampled.steps
    if decoding.top_logprobs:
        top_ids, top_logprobs = most_probable(state.logits_BV, decoding.top_logprobs)
        sampled = sampled._replace(
            top_ids=sampled.top_ids.at[i].set(top_ids),
            top_logprobs=sampled.top_logprobs.at[i].set(top_logprobs),
        )
    return token_B, sampled._replace(
        tokens=sampled.tokens.at[i].set(token_B),
        logprobs=sampled.logprobs.at[i].set(logprob_B),
        count_B=sampled.count_B + state.active_B,
        done_B=sampled.done_B | (state.active_B & stopped_B),
        steps=i + 1,
    )


def _early(state: DecodeState) -> Bool[Array, "B"]:
    """Sequences that have fewer tokens than min_tokens."""
    return state.generated_B < state.sampling.min_tokens_B


def _without_early_stops(
    state: DecodeState, is_stop_V: Bool[Array, "V"], any_early: Bool[Array, ""]
) -> Float[Array, "B V"]:
    """The logits, -inf for stop tokens of sequences that have fewer tokens than min_tokens."""
    sampling = state.sampling

    def remove(logits_BV: Float[Array, "B V"]) -> Float[Array, "B V"]:
        is_stop_BV = is_stop_V[None] & ~sampling.ignores_eos_B[:, None]
        # A stop id of -1 stands for none; indices out of range are dropped.
        own_ids = jnp.where(sampling.stop_ids < 0, logits_BV.shape[1], sampling.stop_ids)
        is_stop_BV = _mark(is_stop_BV, own_ids)
        return jnp.where(_early(state)[:, None] & is_stop_BV, -jnp.inf, logits_BV)

    return jax.lax.cond(any_early, remove, lambda logits_BV: logits_BV, state.logits_BV)


def _mark(is_in_BV: Bool[Array, "B V"], ids: Int[Array, "B ids"]) -> Bool[Array, "B V"]:
    """True for the ids of each row; by vmap, so that no device needs the rows of another."""
    return jax.vmap(lambda is_in_V, ids: is_in_V.at[ids].set(True, mode="drop"))(is_in_BV, ids)


def _run(
    decoder: Decoder,
    layers: list[nnx.State],
    state: DecodeState,
    token_B: Int[Array, "B"],
    done_B: Bool[Array, "B"],
    decoding: Decoding,
) -> DecodeState:
    """Run the token of every slot; slots that are not active stay as they are."""
    logits_BV, caches = _next_logits(decoder, layers, state, token_B, decoding)
    own_length_B = state.slot_map.own_length_B + state.active_B
    return state._replace(
        layers=caches,
        slot_map=state.slot_map._replace(own_length_B=own_length_B),
        logits_BV=logits_BV,
        seen_BV=_mark(state.seen_BV, token_B[:, None]),
        position_B=state.position_B + state.active_B,
        generated_B=state.generated_B + state.active_B,
        active_B=state.active_B & ~done_B,
    )


def _next_logits(
    decoder: Decoder,
    layers: list[nnx.State],
    state: DecodeState,
    token_B: Int[Array, "B"],
    decoding: Decoding,
) -> tuple[Float[Array, "B V"], tuple[Any, ...]]:
    """Logits after one token per slot, and the caches with its keys and values."""
    cache_step = decoding.cache.begin_step(state.slot_map, sizes_of(state), state.active_B)

    def attend(layer, q_B1HGd, k_B1Hd, v_B1Hd):
        out_BHGd, layer = decoding.cache.attend(
            layer, q_B1HGd[:, 0], k_B1Hd[:, 0], v_B1Hd[:, 0], cache_step
        )
        return out_BHGd[:, None].astype(decoding.dtype), layer

    hidden_BD, caches = decoder.next_hidden(token_B, state.position_B, layers, state.layers, attend)
    return fit_vocab(decoder.logits(hidden_BD), state.logits_BV.shape[1]), caches
