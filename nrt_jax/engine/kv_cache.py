"""Keys and values of the sequences being decoded, each prompt's stored once for all its copies.

Letters: U shards of the slots (one for each device along the batch axes), I slots and M prompts of
one shard, B = U * I slots, N = U * M prompts, K copies of one prompt at most, S prompt tokens,
T tokens of a slot's own, R slots that are read, H key/value heads, G query heads a key/value head,
d head dim.

A slot continues a prompt of its own shard. Its query meets the prompt's keys beside the queries of
the prompt's other slots, in one matrix product that reads these keys once, and then its own keys:

    slot          0  1  2  3
    prompt        0  0  -  1        slots_NK   [[0 1] [3 -]]
    place         0  1  -  2        (prompt * K + row: where slots_NK names the slot)

The two softmaxes are merged by their log-sum-exps. Moving the queries to the prompts and the
results back moves one vector a head, not a cache.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.models.sharding import partition_spec

BATCH_AXES = partition_spec(("batch",))[0]
"""Mesh axes that the slots, and the prompts with them, are spread over."""

_LOWEST = float(jnp.finfo(jnp.float32).min) / 2


class Places(NamedTuple):
    """Which prompt each slot continues, and how far prompts and slots are filled."""

    prompt_length_N: Int[Array, "N"]
    slots_NK: Int[Array, "N K"]
    """Slots of each prompt, counted within the shard; rows that are free hold any slot."""
    place_B: Int[Array, "B"]
    """prompt * K + row, counted within the shard."""
    own_length_B: Int[Array, "B"]

    def prompt_of_slots(self, shards: int) -> Int[Array, "B"]:
        """The prompt that each slot continues, 0 to N - 1."""
        (N, K), (B,) = self.slots_NK.shape, self.place_B.shape
        return self.place_B // K + jnp.arange(B) // (B // shards) * (N // shards)


class Sizes(NamedTuple):
    """Room of a cache."""

    prompts: int
    """N, of all shards together."""
    prompt_tokens: int
    own_tokens: int


class Stored(NamedTuple):
    """Keys or values; int8 ones have a float32 factor for each token and head."""

    values: Array
    scale: Float[Array, "..."] | None


class LayerCache(NamedTuple):
    """One layer: the prompts' keys and values, and those that the slots wrote themselves."""

    prompt_k_NHSd: Stored
    prompt_v_NHSd: Stored
    own_k: Stored
    """[B, H, d, T], or [B, H, T, d] where the form says so."""
    own_v_BHTd: Stored

    @property
    def sizes(self) -> Sizes:
        """Room of the layer."""
        N, _, S, _ = self.prompt_k_NHSd.values.shape
        return Sizes(N, S, self.own_v_BHTd.values.shape[2])

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        """Of every array's first dims."""
        return ("batch", "kv_heads")


class Masks(NamedTuple):
    """What the queries of one step may see, and where their keys go; the same in every layer."""

    places: Places
    prompt_NKS: Bool[Array, "N #K S"]
    own_BT: Bool[Array, "B T"]
    at_B: Int[Array, "B"]
    """T for a slot whose cache stays as it is."""


class Partial(NamedTuple):
    """Attention over some of the keys: the weighted sum, the weights' sum, and their maximum."""

    out_BHGd: Float[Array, "B H G d"]
    sum_BHG: Float[Array, "B H G"]
    highest_BHG: Float[Array, "B H G"]


class KVCache:
    """The form that XLA computes with, on every platform; `window` is the sliding window's.

    `PagedCache` and `TritonCache` have the same methods. A cache's arrays are the caller's: all
    methods are functions of them, to be traced.
    """

    own_k_tokens_last = True
    """A step's scores then come from a product over d with T contiguous."""

    def __init__(self, mesh: Mesh, window: int | None = None):
        self._mesh, self._window = mesh, window
        self._shards = shards_of(mesh)

    def empty(
        self, sizes: Sizes, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """A layer without contents."""
        N, S, T = sizes
        H, d = kv_heads, head_dim

        def stored(*shape: int, token_shape: tuple[int, ...]) -> Stored:
            has_scale = jnp.dtype(dtype) == jnp.int8
            scale = jnp.ones(token_shape, jnp.float32) if has_scale else None
            return Stored(jnp.zeros(shape, dtype), scale)

        own_k = (slots, H, d, T) if self.own_k_tokens_last else (slots, H, T, d)
        return LayerCache(
            stored(N, H, S, d, token_shape=(N, H, S)),
            stored(N, H, S, d, token_shape=(N, H, S)),
            stored(*own_k, token_shape=(slots, H, T)),
            stored(slots, H, T, d, token_shape=(slots, H, T)),
        )

    def prompts_of(self, layer: LayerCache) -> LayerCache:
        """What `insert` changes: the slots' own part is left out."""
        return layer._replace(own_k=None, own_v_BHTd=None)

    def with_prompts(self, layer: LayerCache, prompts: LayerCache) -> LayerCache:
        """The layer with what `insert` made of `prompts_of`."""
        return prompts._replace(own_k=layer.own_k, own_v_BHTd=layer.own_v_BHTd)

    def insert(
        self,
        prompts: LayerCache,
        k_SHd: Float[Array, "S H d"],
        v_SHd: Float[Array, "S H d"],
        prompt: Int[Array, ""],
        length: Int[Array, ""],
        slot_K: Int[Array, "K"],
    ) -> LayerCache:
        """Write one prompt of `length` tokens for the slots of `slot_K`, of which B is no slot.

        A prompt shorter than its room leaves the rest of the room as it is.
        """
        del length, slot_K

        def write(old: Array, new: Array) -> Array:
            return jax.lax.dynamic_update_slice(old, new[None], (prompt, *([0] * (old.ndim - 1))))

        stored_k, stored_v = prompts.prompt_k_NHSd, prompts.prompt_v_NHSd
        return prompts._replace(
            prompt_k_NHSd=jax.tree.map(write, stored_k, store(k_SHd.swapaxes(0, 1), stored_k)),
            prompt_v_NHSd=jax.tree.map(write, stored_v, store(v_SHd.swapaxes(0, 1), stored_v)),
        )

    def begin_step(self, places: Places, sizes: Sizes, active_B: Bool[Array, "B"]) -> Masks:
        """What all layers share in a step that runs the tokens at `own_length_B`.

        These see themselves. The caches of slots that are not active stay as they are.
        """
        own_T = jnp.arange(sizes.own_tokens)[None]
        own_BT = own_T <= places.own_length_B[:, None]
        position_S = jnp.arange(sizes.prompt_tokens)[None, None]
        prompt_NKS = position_S < places.prompt_length_N[:, None, None]
        if self._window is not None:
            own_BT &= places.own_length_B[:, None] - own_T < self._window
            own_NK = self._to_prompts(places.own_length_B, places)
            query_NK1 = (places.prompt_length_N[:, None] + own_NK)[:, :, None]
            prompt_NKS = prompt_NKS & (query_NK1 - position_S < self._window)
        at_B = jnp.where(active_B, places.own_length_B, sizes.own_tokens)
        return Masks(places, prompt_NKS, own_BT, at_B)

    def attend(
        self,
        layer: LayerCache,
        q_BHGd: Float[Array, "B H G d"],
        k_BHd: Float[Array, "B H d"],
        v_BHd: Float[Array, "B H d"],
        step: Masks,
    ) -> tuple[Float[Array, "B H G d"], LayerCache]:
        """softmax(q k / sqrt(d)) v over [prompt ; own tokens ; this one], float32; and the layer
        with this token's key and value."""
        layer = self._append(layer, k_BHd, v_BHd, step.at_B)
        of_prompts = self._attend_prompts(layer, q_BHGd, step)
        return merge(of_prompts, self._attend_own(layer, q_BHGd, step)), layer

    def _append(
        self,
        layer: LayerCache,
        k_BHd: Float[Array, "B H d"],
        v_BHd: Float[Array, "B H d"],
        at_B: Int[Array, "B"],
    ) -> LayerCache:
        slots = jnp.arange(k_BHd.shape[0])
        k, v = store(k_BHd, layer.own_k), store(v_BHd, layer.own_v_BHTd)
        k_place = (slots, slice(None), slice(None), at_B)
        v_place = (slots, slice(None), at_B)

        def write(old: Array | None, place: tuple, new: Array | None) -> Array | None:
            return None if old is None else old.at[place].set(new, mode="drop")

        own_k, own_v = layer.own_k, layer.own_v_BHTd
        return layer._replace(
            own_k=Stored(
                write(own_k.values, k_place if self.own_k_tokens_last else v_place, k.values),
                write(own_k.scale, v_place, k.scale),
            ),
            own_v_BHTd=Stored(
                write(own_v.values, v_place, v.values), write(own_v.scale, v_place, v.scale)
            ),
        )

    def _attend_own(
        self, layer: LayerCache, q_BHGd: Float[Array, "B H G d"], step: Masks
    ) -> Partial:
        k, v = layer.own_k, layer.own_v_BHTd
        scores = _product("bhgd,bhdt->bhgt", _scaled(q_BHGd), k.values)
        scores = scores if k.scale is None else scores * k.scale[:, :, None]
        weights, partial = _softmax(scores, step.own_BT[:, None, None])
        weights = weights if v.scale is None else weights * v.scale[:, :, None]
        return partial(_product("bhgt,bhtd->bhgd", weights, v.values))

    def _attend_prompts(
        self, layer: LayerCache, q_BHGd: Float[Array, "B H G d"], step: Masks
    ) -> Partial:
        k, v = layer.prompt_k_NHSd, layer.prompt_v_NHSd
        q_NKHGd = self._to_prompts(_scaled(q_BHGd), step.places)
        scores = _product("nrhgd,nhsd->nhrgs", q_NKHGd, k.values)
        scores = scores if k.scale is None else scores * k.scale[:, :, None, None]
        weights, partial = _softmax(scores, step.prompt_NKS[:, None, :, None])
        weights = weights if v.scale is None else weights * v.scale[:, :, None, None]
        of_prompts = partial(_product("nhrgs,nhsd->nhrgd", weights, v.values))
        return jax.tree.map(lambda x: self._to_slots(x.swapaxes(1, 2), step.places), of_prompts)

    def _to_prompts(self, x: Array, places: Places) -> Array:
        """[B, ...] to [N, K, ...]: the values of each prompt's slots."""
        rows = gather_in_shards(x, places.slots_NK.reshape(self._shards, -1))
        return rows.reshape(*places.slots_NK.shape, *x.shape[1:])

    def _to_slots(self, x: Array, places: Places) -> Array:
        """[N, K, ...] to [B, ...]."""
        rows = x.reshape(-1, *x.shape[2:])
        return gather_in_shards(rows, places.place_B.reshape(self._shards, -1))

    def resize(self, layer: LayerCache, new: Sizes) -> LayerCache:
        """The same contents in another room; what does not fit is cut off."""
        prompts = lambda x: fit(fit_in_shards(x, new.prompts, self._shards), 2, new.prompt_tokens)  # noqa: E731
        own = lambda x: fit(x, 2, new.own_tokens)  # noqa: E731
        own_k_axis = 3 if self.own_k_tokens_last else 2
        return LayerCache(
            jax.tree.map(prompts, layer.prompt_k_NHSd),
            jax.tree.map(prompts, layer.prompt_v_NHSd),
            Stored(
                fit(layer.own_k.values, own_k_axis, new.own_tokens),
                jax.tree.map(own, layer.own_k.scale),
            ),
            jax.tree.map(own, layer.own_v_BHTd),
        )

    def move_slots(self, layer: LayerCache, from_UI: Int[Array, "U I"]) -> LayerCache:
        """More slots or fewer: each gets the own tokens of an old one of its shard."""
        own_k, own_v = jax.tree.map(
            lambda x: gather_in_shards(x, from_UI), (layer.own_k, layer.own_v_BHTd)
        )
        return layer._replace(own_k=own_k, own_v_BHTd=own_v)

    def read(
        self, layer: LayerCache, places: Places, slot_R: Int[Array, "R"]
    ) -> tuple[Float[Array, "R ST H d"], Float[Array, "R ST H d"]]:
        """Keys and values of some slots, as the decoder takes a prefix."""
        prompt_R = places.prompt_of_slots(self._shards)[slot_R]
        own_k = layer.own_k
        if self.own_k_tokens_last:
            own_k = own_k._replace(values=own_k.values.swapaxes(2, 3))
        k = [_values(layer.prompt_k_NHSd, prompt_R), _values(own_k, slot_R)]
        v = [_values(layer.prompt_v_NHSd, prompt_R), _values(layer.own_v_BHTd, slot_R)]
        k_RTHd, v_RTHd = (jnp.concatenate(x, axis=2).swapaxes(1, 2) for x in (k, v))
        return k_RTHd, v_RTHd

    def read_positions(
        self,
        places: Places,
        sizes: Sizes,
        slot_R: Int[Array, "R"],
        own_length_R: Int[Array, "R"],
    ) -> tuple[Int[Array, "R ST"], Bool[Array, "R ST"]]:
        """Positions of what `read` gives, and which entries hold prompt or own tokens."""
        length_R1 = places.prompt_length_N[places.prompt_of_slots(self._shards)[slot_R]][:, None]
        prompt_RS, own_RT = (
            jnp.broadcast_to(jnp.arange(n)[None], (len(slot_R), n)) for n in sizes[1:]
        )
        valid = [prompt_RS < length_R1, own_RT < own_length_R[:, None]]
        positions = [prompt_RS, length_R1 + own_RT]
        return jnp.concatenate(positions, axis=1), jnp.concatenate(valid, axis=1)


def shards_of(mesh: Mesh) -> int:
    """Groups of slots that stay on one device along the batch axes."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def store(x: Float[Array, "*B d"], like: Stored) -> Stored:
    """`x` in the form of `like`: cast, or rounded to 127 steps of its largest value over d."""
    if like.scale is None:
        return Stored(x.astype(like.values.dtype), None)
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x), axis=-1) / 127, jnp.finfo(jnp.float32).tiny)
    return Stored(jnp.round(x / scale[..., None]).astype(jnp.int8), scale)


def merge(first: Partial, second: Partial) -> Float[Array, "B H G d"]:
    """Attention over both sets of keys together."""
    highest_BHG = jnp.maximum(first.highest_BHG, second.highest_BHG)
    one_BHG = jnp.exp(first.highest_BHG - highest_BHG)
    two_BHG = jnp.exp(second.highest_BHG - highest_BHG)
    total_BHG = first.sum_BHG * one_BHG + second.sum_BHG * two_BHG
    out_BHGd = first.out_BHGd * one_BHG[..., None] + second.out_BHGd * two_BHG[..., None]
    return out_BHGd / total_BHG[..., None]


def fit(x: Array, axis: int, size: int) -> Array:
    """`x` with `size` entries along `axis`: cut off, or zeros added."""
    if size <= x.shape[axis]:
        return jax.lax.slice_in_dim(x, 0, size, axis=axis)
    return jnp.pad(x, [(0, size - n if i == axis else 0) for i, n in enumerate(x.shape)])


def fit_in_shards(x: Array, size: int, shards: int) -> Array:
    """`fit` along the first dim, in each shard's part of it."""
    x_U = x.reshape(shards, -1, *x.shape[1:])
    return fit(x_U, 1, size // shards).reshape(size, *x.shape[1:])


def _scaled(q_BHGd: Float[Array, "B H G d"]) -> Float[Array, "B H G d"]:
    return q_BHGd.astype(jnp.float32) * q_BHGd.shape[-1] ** -0.5


def _product(equation: str, x: Float[Array, "..."], stored: Array) -> Float[Array, "..."]:
    """A product in the cache's own floating dtype, summed in float32."""
    dtype = stored.dtype if jnp.issubdtype(stored.dtype, jnp.floating) else jnp.float32
    return jnp.einsum(
        equation, x.astype(dtype), stored.astype(dtype), preferred_element_type=jnp.float32
    )


def _softmax(scores: Float[Array, "..."], mask: Bool[Array, "..."]) -> tuple[Array, Any]:
    """Weights before they are divided by their sum, and what makes a Partial of their product."""
    scores = jnp.where(mask, scores, _LOWEST)
    highest = jnp.max(scores, axis=-1)
    # Where nothing is seen, the weights are 0 and not exp(0).
    weights = jnp.where(mask, jnp.exp(scores - highest[..., None]), 0.0)
    return weights, lambda out: Partial(out, jnp.sum(weights, axis=-1), highest)


def gather_in_shards(x: Array, index_UJ: Int[Array, "U J"]) -> Array:
    """Rows of each shard's part of `x`, so that none crosses a device."""
    U, J = index_UJ.shape
    x_U = x.reshape(U, -1, *x.shape[1:])
    index = index_UJ.reshape(U, J, *([1] * (x.ndim - 1)))
    return jnp.take_along_axis(x_U, index, axis=1).reshape(U * J, *x.shape[1:])


def _values(cache: Stored, rows_R: Int[Array, "R"]) -> Array:
    values = cache.values[rows_R]
    if cache.scale is None:
        return values
    return values.astype(jnp.float32) * cache.scale[rows_R][..., None]
