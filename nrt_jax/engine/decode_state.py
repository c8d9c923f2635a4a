"""The engine's state between calls: the caches, and what every slot draws from next.

Letters: L layers, B slots, P prompt slots, K samples of one prompt, S prompt tokens, H key/value
heads, d head dim, V vocabulary.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key, UInt

from nrt_jax.engine.kv_cache import Sizes, SlotMap, fit_in_shards, gather_in_shards
from nrt_jax.engine.sampling import MAX_STOP_IDS, Sampling, SlotSampling
from nrt_jax.models.sharding import partition_spec

SMALLEST_BUCKET = 16
SMALLEST_OWN_TOKENS = 128
"""Capacity of a slot for tokens of its own at first: a smaller one saves less than it costs to
compile."""


def bucket(length: int) -> int:
    """Smallest power of two, 16 or more, that is at least `length`."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def quarter_bucket(length: int) -> int:
    """Smallest multiple of a quarter of the bucket that is at least `length`: 192 for 161."""
    step = max(SMALLEST_BUCKET, bucket(length) // 4)
    return -(-length // step) * step


def padded(tokens: np.ndarray, capacity: int | None = None) -> Int[np.ndarray, "S"]:
    """The tokens as int32, followed by zeros up to a capacity, or to a bucket without one."""
    capacity = bucket(len(tokens)) if capacity is None else capacity
    return np.pad(tokens.astype(np.int32), (0, capacity - len(tokens)))


class SlotRequests(NamedTuple):
    """What K samples of one prompt are to do; an entry whose slot is -1 is unused.

    Those of all shards have a leading dim of shards, and slots and prompt slots counted within the
    shard.
    """

    slot_K: Int[Array | np.ndarray, "K"]
    row_K: Int[Array | np.ndarray, "K"]
    """The sample's row among those of its prompt slot."""
    prompt: Int[Array | np.ndarray, ""] | int
    """Prompt slot that the keys and values go to, in the shard of the slots."""
    key_K: Key[Array, "K"]
    limit_K: Int[Array | np.ndarray, "K"]
    sampling: SlotSampling


class DecodeState(NamedTuple):
    """Every slot's cache and the logits its next token will be drawn from."""

    layers: tuple[Any, ...]
    """Caches, in the form of the engine's attention."""
    slot_map: SlotMap
    logits_BV: Float[Array, "B V"]
    seen_BV: Bool[Array, "B V"]
    """Tokens of the slot's prompt and sample, for the repetition penalty."""
    position_B: Int[Array, "B"]
    generated_B: Int[Array, "B"]
    limit_B: Int[Array, "B"]
    active_B: Bool[Array, "B"]
    key_B: Key[Array, "B"]
    sampling: SlotSampling


class Sampled(NamedTuple):
    """Tokens of one dispatch: slot b drew the first `count_B[b]` tokens of its column."""

    tokens: Int[Array, "max_steps B"]
    logprobs: Float[Array, "max_steps B"]
    top_ids: Int[Array, "max_steps B top"]
    top_logprobs: Float[Array, "max_steps B top"]
    count_B: Int[Array, "B"]
    done_B: Bool[Array, "B"]
    """The last token ended the sequence, as a stop token or at the limit."""
    steps: Int[Array, ""]
    """Decode steps that were run."""


class SlotMoves(NamedTuple):
    """Where every slot's sequence and every prompt come from when the number of slots changes."""

    from_B: Int[Array | np.ndarray, "B"]
    """The old slot of each new one, counted within the shard; any value for one that is free."""
    free_B: Bool[Array | np.ndarray, "B"]
    from_P: Int[Array | np.ndarray, "P"]
    """The old prompt slot of each new one, counted within the shard; any value for a free one."""
    slots_PK: Int[Array | np.ndarray, "P K"]
    prompt_row_B: Int[Array | np.ndarray, "B"]


def slot_sampling(settings: Sequence[Sampling]) -> SlotSampling:
    """One row for each of `settings`."""
    stop_rows = np.full((len(settings), MAX_STOP_IDS), -1, np.int32)
    for row, sampling in zip(stop_rows, settings, strict=True):
        row[: len(sampling.stop_ids)] = sorted(sampling.stop_ids)

    def column(name: str, dtype: type) -> np.ndarray:
        return np.asarray([getattr(sampling, name) for sampling in settings], dtype)

    return SlotSampling(
        temperature_B=column("temperature", np.float32),
        top_p_B=column("top_p", np.float32),
        top_k_B=column("top_k", np.int32),
        min_p_B=column("min_p", np.float32),
        penalty_B=column("repetition_penalty", np.float32),
        stop_ids=stop_rows,
        ignores_eos_B=column("ignores_eos", np.bool_),
        min_tokens_B=column("min_tokens", np.int32),
        obeys_bans_B=column("obeys_bans", np.bool_),
    )


@jax.jit
def sample_keys(
    key: Key[Array, ""], stream: int | Int[Array, ""], sample_K: Int[Array | np.ndarray, "K"]
) -> Key[Array, "K"]:
    """Keys of samples `sample_K` of the prompt that `stream` names; `key` is that of the step."""
    prompt_key = jax.random.fold_in(key, stream)
    return jax.vmap(lambda sample: jax.random.fold_in(prompt_key, sample))(sample_K)


@jax.jit
def sample_keys_of_rows(
    key_data_R: UInt[Array | np.ndarray, "R words"],
    stream_R: Int[Array | np.ndarray, "R"],
    sample_RK: Int[Array | np.ndarray, "R K"],
) -> Key[Array, "R K"]:
    """`sample_keys` of a prompt per row, from the data of its key."""
    return jax.vmap(sample_keys)(jax.random.wrap_key_data(key_data_R), stream_R, sample_RK)


def sizes_of(state: DecodeState) -> Sizes:
    """Capacity of the caches."""
    return state.layers[0].sizes


def by_shard(requests: SlotRequests, shards: int, state: DecodeState) -> SlotRequests:
    """Requests of one prompt as those of all shards, where the others start nothing."""
    slots, prompts = len(state.active_B) // shards, sizes_of(state).prompts // shards
    shard, prompt = divmod(jnp.asarray(requests.prompt), prompts)
    slot_K = jnp.asarray(requests.slot_K)
    rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (shards, *jnp.shape(x))), requests)
    here_R = jnp.arange(shards) == shard
    return rows._replace(
        slot_K=jnp.where(here_R[:, None] & (slot_K >= 0)[None], (slot_K % slots)[None], -1),
        prompt=jnp.where(here_R, prompt, prompts),
    )


def empty_state(
    layers: tuple[Any, ...], slots: int, num_samples: int, vocab_size: int
) -> DecodeState:
    """A state in which no slot is active."""
    P, B = layers[0].sizes.prompts, slots
    zeros_B = jnp.zeros(B, jnp.int32)
    return DecodeState(
        layers=layers,
        slot_map=SlotMap(
            prompt_length_P=jnp.zeros(P, jnp.int32),
            slots_PK=jnp.zeros((P, num_samples), jnp.int32),
            prompt_row_B=zeros_B,
            own_length_B=zeros_B,
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
    """Slots and prompt slots over the batch axes, key/value heads and vocabulary over tensor."""
    rows = NamedSharding(mesh, partition_spec(("batch",)))
    heads = NamedSharding(mesh, partition_spec(shapes.layers[0].logical_axes))
    vocab = NamedSharding(mesh, partition_spec(("batch", "vocab")))
    return jax.tree.map(lambda _: rows, shapes)._replace(
        layers=jax.tree.map(lambda _: heads, shapes.layers), logits_BV=vocab, seen_BV=vocab
    )


def resize_slot_map(slot_map: SlotMap, sizes: Sizes, shards: int) -> SlotMap:
    """The same map with `sizes.prompts` prompt slots."""
    return slot_map._replace(
        prompt_length_P=fit_in_shards(slot_map.prompt_length_P, sizes.prompts, shards),
        slots_PK=fit_in_shards(slot_map.slots_PK, sizes.prompts, shards),
    )


def move_slots(rest: DecodeState, moves: SlotMoves, shards: int) -> DecodeState:
    """Everything but the layers' caches, with the sequences in other slots."""
    from_shards = moves.from_B.reshape(shards, -1)
    from_prompts = moves.from_P.reshape(shards, -1)
    slot_map = rest.slot_map
    rest = rest._replace(slot_map=slot_map.own_length_B)
    rest = jax.tree.map(lambda x_B: gather_in_shards(x_B, from_shards), rest)
    return rest._replace(
        slot_map=SlotMap(
            prompt_length_P=gather_in_shards(slot_map.prompt_length_P, from_prompts),
            slots_PK=moves.slots_PK,
            prompt_row_B=moves.prompt_row_B,
            own_length_B=rest.slot_map,
        ),
        active_B=rest.active_B & ~moves.free_B,
    )
