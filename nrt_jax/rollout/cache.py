"""Keys and values of the sequences being decoded, each prompt's stored once for all its copies.

Letters: U shards of the slots (one for each device along the batch axes), I slots and M prompts of
one shard, B = U * I slots, N = U * M prompts, K copies of one prompt at most, S prompt tokens,
T tokens of a slot's own, H key/value heads, G query heads a key/value head, d head dim.

A slot continues a prompt of its own shard. Its query meets the prompt's keys beside the queries of
the prompt's other slots, in one matrix product that reads these keys once, and then its own keys:

    slot          0  1  2  3
    prompt        0  0  -  1        slots_NK   [[0 1] [3 -]]
    place         0  1  -  2        (prompt * K + row: where slots_NK names the slot)

The two softmaxes are merged by their log-sum-exps. Moving the queries to the prompts and the
results back moves one vector a head, not a cache.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

_LOWEST = float(jnp.finfo(jnp.float32).min) / 2


class Stored(NamedTuple):
    """Keys or values; int8 ones have a float32 factor for each token and head."""

    values: Array
    scale: Float[Array, "..."] | None


class LayerCache(NamedTuple):
    """One layer: the prompts' keys and values, and those that the slots wrote themselves."""

    prompt_k_NHSd: Stored
    prompt_v_NHSd: Stored
    own_k_BHdT: Stored
    """Tokens last: a step's scores then come from a product over d with T contiguous."""
    own_v_BHTd: Stored


class Places(NamedTuple):
    """Which prompt each slot continues, and how far prompts and slots are filled."""

    prompt_length_N: Int[Array, "N"]
    slots_NK: Int[Array, "N K"]
    """Slots of each prompt, counted within the shard; rows that are free hold any slot."""
    place_B: Int[Array, "B"]
    """prompt * K + row, counted within the shard."""
    own_length_B: Int[Array, "B"]


class Sizes(NamedTuple):
    """Room of a cache."""

    prompts: int
    """N, of all shards together."""
    prompt_tokens: int
    own_tokens: int


def empty_layer(
    sizes: Sizes, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
) -> LayerCache:
    """A layer's cache without contents."""
    N, S, T = sizes
    H, d = kv_heads, head_dim

    def stored(*shape: int, token_shape: tuple[int, ...]) -> Stored:
        has_scale = jnp.dtype(dtype) == jnp.int8
        scale = jnp.ones(token_shape, jnp.float32) if has_scale else None
        return Stored(jnp.zeros(shape, dtype), scale)

    return LayerCache(
        stored(N, H, S, d, token_shape=(N, H, S)),
        stored(N, H, S, d, token_shape=(N, H, S)),
        stored(slots, H, d, T, token_shape=(slots, H, T)),
        stored(slots, H, T, d, token_shape=(slots, H, T)),
    )


def store(x: Float[Array, "*B d"], like: Stored) -> Stored:
    """`x` in the form of `like`: cast, or rounded to 127 steps of its largest value over d."""
    if like.scale is None:
        return Stored(x.astype(like.values.dtype), None)
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / 127, jnp.finfo(jnp.float32).tiny)
    return Stored(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def insert_prompt(
    prompts_NHSd: Stored, x_SHd: Float[Array, "S H d"], prompt: Int[Array, ""]
) -> Stored:
    """Write one prompt's keys or values; a shorter one leaves the rest of its room as it is."""
    new = store(x_SHd.swapaxes(0, 1), prompts_NHSd)
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice(
            old, new[None], (prompt, *([0] * (old.ndim - 1)))
        ),
        prompts_NHSd,
        new,
    )


def append(
    layer: LayerCache,
    k_BHd: Float[Array, "B H d"],
    v_BHd: Float[Array, "B H d"],
    at_B: Int[Array, "B"],
) -> LayerCache:
    """Write one token a slot at `at_B`; a slot whose place is beyond its room is left alone."""
    slots = jnp.arange(k_BHd.shape[0])
    k, v = store(k_BHd, layer.own_k_BHdT), store(v_BHd, layer.own_v_BHTd)
    own_k, own_v = layer.own_k_BHdT, layer.own_v_BHTd

    def write_scale(old: Array | None, new: Array | None) -> Array | None:
        return None if old is None else old.at[slots, :, at_B].set(new, mode="drop")

    own_k = Stored(
        own_k.values.at[slots, :, :, at_B].set(k.values, mode="drop"),
        write_scale(own_k.scale, k.scale),
    )
    own_v = Stored(
        own_v.values.at[slots, :, at_B].set(v.values, mode="drop"),
        write_scale(own_v.scale, v.scale),
    )
    return layer._replace(own_k_BHdT=own_k, own_v_BHTd=own_v)


class Partial(NamedTuple):
    """Attention over some of the keys: the weighted sum, the weights' sum, and their maximum."""

    out_BHGd: Float[Array, "B H G d"]
    sum_BHG: Float[Array, "B H G"]
    highest_BHG: Float[Array, "B H G"]


def merge(first: Partial, second: Partial) -> Float[Array, "B H G d"]:
    """Attention over both sets of keys together."""
    highest_BHG = jnp.maximum(first.highest_BHG, second.highest_BHG)
    one_BHG = jnp.exp(first.highest_BHG - highest_BHG)
    two_BHG = jnp.exp(second.highest_BHG - highest_BHG)
    total_BHG = first.sum_BHG * one_BHG + second.sum_BHG * two_BHG
    out_BHGd = first.out_BHGd * one_BHG[..., None] + second.out_BHGd * two_BHG[..., None]
    return out_BHGd / total_BHG[..., None]


class Masks(NamedTuple):
    """What the queries of one step may see; the same in every layer."""

    prompt_NKS: Bool[Array, "N #K S"]
    own_BT: Bool[Array, "B T"]


def masks(places: Places, sizes: Sizes, shards: int, window: int | None) -> Masks:
    """Masks of the tokens at `own_length_B`, which see themselves."""
    own_T = jnp.arange(sizes.own_tokens)[None]
    own_BT = own_T <= places.own_length_B[:, None]
    position_S = jnp.arange(sizes.prompt_tokens)[None, None]
    prompt_NKS = position_S < places.prompt_length_N[:, None, None]
    if window is not None:
        own_BT &= places.own_length_B[:, None] - own_T < window
        own_NK = _to_prompts(places.own_length_B, places, shards)
        query_NK1 = (places.prompt_length_N[:, None] + own_NK)[:, :, None]
        prompt_NKS = prompt_NKS & (query_NK1 - position_S < window)
    return Masks(prompt_NKS, own_BT)


def attend(
    layer: LayerCache,
    q_BHGd: Float[Array, "B H G d"],
    places: Places,
    masks: Masks,
    shards: int,
) -> Float[Array, "B H G d"]:
    """softmax(q k / sqrt(d)) v over [prompt ; own tokens], in float32."""
    q_BHGd = q_BHGd.astype(jnp.float32) * q_BHGd.shape[-1] ** -0.5
    own = _attend_own(layer, q_BHGd, masks.own_BT)
    return merge(_attend_prompts(layer, q_BHGd, places, masks.prompt_NKS, shards), own)


def _attend_own(
    layer: LayerCache, q_BHGd: Float[Array, "B H G d"], mask_BT: Bool[Array, "B T"]
) -> Partial:
    k, v = layer.own_k_BHdT, layer.own_v_BHTd
    scores = _product("bhgd,bhdt->bhgt", q_BHGd, k.values)
    scores = scores if k.scale is None else scores * k.scale[:, :, None]
    weights, partial = _softmax(scores, mask_BT[:, None, None])
    weights = weights if v.scale is None else weights * v.scale[:, :, None]
    return partial(_product("bhgt,bhtd->bhgd", weights, v.values))


def _attend_prompts(
    layer: LayerCache,
    q_BHGd: Float[Array, "B H G d"],
    places: Places,
    mask_NKS: Bool[Array, "N #K S"],
    shards: int,
) -> Partial:
    k, v = layer.prompt_k_NHSd, layer.prompt_v_NHSd
    q_NKHGd = _to_prompts(q_BHGd, places, shards)
    scores = _product("nrhgd,nhsd->nhrgs", q_NKHGd, k.values)
    scores = scores if k.scale is None else scores * k.scale[:, :, None, None]
    weights, partial = _softmax(scores, mask_NKS[:, None, :, None])
    weights = weights if v.scale is None else weights * v.scale[:, :, None, None]
    of_prompts = partial(_product("nhrgs,nhsd->nhrgd", weights, v.values))
    return jax.tree.map(lambda x: _to_slots(x.swapaxes(1, 2), places, shards), of_prompts)


def _product(equation: str, x: Float[Array, "..."], stored: Array) -> Float[Array, "..."]:
    """A product in the cache's own floating dtype, summed in float32."""
    dtype = stored.dtype if jnp.issubdtype(stored.dtype, jnp.floating) else jnp.float32
    return jnp.einsum(
        equation, x.astype(dtype), stored.astype(dtype), preferred_element_type=jnp.float32
    )


def _softmax(scores: Float[Array, "..."], mask: Bool[Array, "..."]):
    """Weights before they are divided by their sum, and what makes a Partial of their product."""
    scores = jnp.where(mask, scores, _LOWEST)
    highest = jnp.max(scores, axis=-1)
    # Where nothing is seen, the weights are 0 and not exp(0).
    weights = jnp.where(mask, jnp.exp(scores - highest[..., None]), 0.0)
    return weights, lambda out: Partial(out, jnp.sum(weights, axis=-1), highest)


def _to_prompts(x: Array, places: Places, shards: int) -> Array:
    """[B, ...] to [N, K, ...]: the values of each prompt's slots."""
    return _gather_in_shards(x, places.slots_NK.reshape(shards, -1)).reshape(
        *places.slots_NK.shape, *x.shape[1:]
    )


def _to_slots(x: Array, places: Places, shards: int) -> Array:
    """[N, K, ...] to [B, ...]."""
    rows = x.reshape(-1, *x.shape[2:])
    return _gather_in_shards(rows, places.place_B.reshape(shards, -1))


def _gather_in_shards(x: Array, index_UJ: Int[Array, "U J"]) -> Array:
    """Rows of each shard's part of `x`, so that none crosses a device."""
    U, J = index_UJ.shape
    x_U = x.reshape(U, -1, *x.shape[1:])
    index = index_UJ.reshape(U, J, *([1] * (x.ndim - 1)))
    return jnp.take_along_axis(x_U, index, axis=1).reshape(U * J, *x.shape[1:])


def resize_layer(layer: LayerCache, old: Sizes, new: Sizes, shards: int) -> LayerCache:
    """The same contents in another room; what does not fit is cut off."""

    def fit(x: Array, axis: int, size: int) -> Array:
        if size <= x.shape[axis]:
            return jax.lax.slice_in_dim(x, 0, size, axis=axis)
        return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])

    def prompts(x: Array) -> Array:
        x_U = x.reshape(shards, old.prompts // shards, *x.shape[1:])
        x = fit(x_U, 1, new.prompts // shards).reshape(new.prompts, *x.shape[1:])
        return fit(x, 2, new.prompt_tokens)

    return LayerCache(
        jax.tree.map(prompts, layer.prompt_k_NHSd),
        jax.tree.map(prompts, layer.prompt_v_NHSd),
        jax.tree.map(lambda x: fit(x, x.ndim - 1, new.own_tokens), layer.own_k_BHdT),
        jax.tree.map(lambda x: fit(x, 2, new.own_tokens), layer.own_v_BHTd),
    )


def read(
    layer: LayerCache, slot_R: Int[Array, "R"], prompt_R: Int[Array, "R"]
) -> tuple[Float[Array, "R ST H d"], Float[Array, "R ST H d"]]:
    """Keys and values of some slots, [prompt ; own tokens], as the decoder takes a prefix."""
    own_k = _values(layer.own_k_BHdT, slot_R, 2).swapaxes(2, 3)
    own_v = _values(layer.own_v_BHTd, slot_R, 3)
    k = jnp.concatenate([_values(layer.prompt_k_NHSd, prompt_R, 3), own_k], axis=2)
    v = jnp.concatenate([_values(layer.prompt_v_NHSd, prompt_R, 3), own_v], axis=2)
    return k.swapaxes(1, 2), v.swapaxes(1, 2)


def _values(cache: Stored, rows_R: Int[Array, "R"], head_dim_axis: int) -> Array:
    values = cache.values[rows_R]
    if cache.scale is None:
        return values
    return values.astype(jnp.float32) * jnp.expand_dims(cache.scale[rows_R], head_dim_axis)
