"""Keys and values of the sequences being decoded, with each prompt stored once for its samples.

Slots and prompt slots are split into shards, one for each device along the batch axes, and a slot
continues a prompt of its own shard. The queries of all slots of a prompt are multiplied with the
prompt's keys in one matrix product that reads these keys once, and each query with its slot's own
keys:

    slot          0  1  2  3
    prompt slot   0  0  -  1        slots_PK     [[0 1] [3 -]]
    prompt row    0  1  -  2        prompt_row_B: prompt slot * K + its row in slots_PK

The two softmaxes are merged by their log-sum-exps. Gathering queries by prompt, and scattering
results back, moves one vector per head and not a cache.

Letters: B slots, P prompt slots, K rows of a prompt slot (most samples that share it), S prompt
tokens, T own tokens of a slot, H key/value heads, G query heads per key/value head, d head dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.models.sharding import partition_spec

BATCH_AXES = partition_spec(("batch",))[0]
"""Mesh axes that slots and prompt slots are sharded over."""

_LOWEST = float(jnp.finfo(jnp.float32).min) / 2


class SlotMap(NamedTuple):
    """Which prompt each slot continues, and how many tokens prompts and slots hold."""

    prompt_length_P: Int[Array, "P"]
    slots_PK: Int[Array, "P K"]
    """Slots of each prompt, counted within the shard; free rows hold any slot."""
    prompt_row_B: Int[Array, "B"]
    """prompt slot * K + row, counted within the shard."""
    own_length_B: Int[Array, "B"]

    def prompt_of_slots(self, shards: int) -> Int[Array, "B"]:
        """The prompt slot that each slot continues, 0 to P - 1."""
        (P, K), (B,) = self.slots_PK.shape, self.prompt_row_B.shape
        return self.prompt_row_B // K + jnp.arange(B) // (B // shards) * (P // shards)


class Sizes(NamedTuple):
    """Capacity of a cache."""

    prompts: int
    """Prompt slots of all shards together."""
    prompt_tokens: int
    """Tokens that a prompt slot holds."""
    own_tokens: int
    """Tokens that a slot holds after its prompt."""


class Stored(NamedTuple):
    """Keys or values; int8 values have a float32 factor for each token and head."""

    values: Array
    scale: Float[Array, "..."] | None


class LayerCache(NamedTuple):
    """One layer: keys and values of the prompts, and of the slots' own tokens."""

    prompt_k: Stored
    """[P, H, d, S], or [P, H, S, d] without `k_tokens_last`."""
    prompt_v_PHSd: Stored
    own_k: Stored
    """[B, H, d, T], or [B, H, T, d] without `k_tokens_last`."""
    own_v_BHTd: Stored

    @property
    def sizes(self) -> Sizes:
        """Capacity of the layer."""
        P, _, S, _ = self.prompt_v_PHSd.values.shape
        return Sizes(P, S, self.own_v_BHTd.values.shape[2])

    @property
    def logical_axes(self) -> tuple[str | None, ...]:
        """Logical axes of the first dims of every array."""
        return ("batch", "kv_heads")


class Masks(NamedTuple):
    """What the queries of one step attend to and where their keys are written, in every layer."""

    slot_map: SlotMap
    prompt_PKS: Bool[Array, "P #K S"]
    own_BT: Bool[Array, "B T"]
    at_B: Int[Array, "B"]
    """Position of the new key; T for a slot whose cache does not change."""


class Partial(NamedTuple):
    """Attention over some of the keys: weighted sum of values, sum of weights, largest score."""

    out_BHGd: Float[Array, "B H G d"]
    sum_BHG: Float[Array, "B H G"]
    highest_BHG: Float[Array, "B H G"]


class KVCache:
    """The cache for XLA's attention, on every platform; `window` is the sliding window in tokens.

    `PagedCache` and `TritonCache` have the same methods. The arrays belong to the caller: every
    method is a pure function of them, to be traced.
    """

    k_tokens_last = True
    """The scores of a step are then products over d with the tokens contiguous."""

    def __init__(self, mesh: Mesh | AbstractMesh, window: int | None = None):
        self._mesh, self._window = mesh, window
        self._shards = shards_of(mesh)

    def empty(
        self, sizes: Sizes, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> LayerCache:
        """A layer without contents."""
        has_scale = jnp.dtype(dtype) == jnp.int8

        def stored(rows: int, tokens: int) -> Stored:
            scale = jnp.ones((rows, kv_heads, tokens), jnp.float32) if has_scale else None
            return Stored(jnp.zeros((rows, kv_heads, tokens, head_dim), dtype), scale)

        prompt_v = stored(sizes.prompts, sizes.prompt_tokens)
        own_v = stored(slots, sizes.own_tokens)
        return LayerCache(self._keys(prompt_v), prompt_v, self._keys(own_v), own_v)

    def prompts_of(self, layer: LayerCache) -> LayerCache:
        """The part that `insert` changes: everything but the slots' own tokens."""
        return layer._replace(own_k=None, own_v_BHTd=None)

    def with_prompts(self, layer: LayerCache, prompts: LayerCache) -> LayerCache:
        """The layer with its prompts replaced by what `insert` returned."""
        return prompts._replace(own_k=layer.own_k, own_v_BHTd=layer.own_v_BHTd)

    def insert(
        self,
        prompts: LayerCache,
        k_RHSd: Float[Array, "R H S d"],
        v_RHSd: Float[Array, "R H S d"],
        prompt_R: Int[Array, "R"],
        length_R: Int[Array, "R"],
        slot_RK: Int[Array, "R K"],
    ) -> LayerCache:
        """Write a prompt of `length_R` tokens to prompt slot `prompt_R` of each of the R shards.

        Numbers are counted within the shard, P / R or more for no prompt. It is for the slots
        `slot_RK`, where B / R means none. Entries past the prompt keep their values.
        """
        del length_R, slot_RK
        rows = partition_spec(("batch", "kv_heads"))
        write = jax.shard_map(
            lambda old, new, prompt_1: jax.tree.map(partial(_write_prompt, prompt_1), old, new),
            mesh=self._mesh,
            in_specs=(rows, rows, partition_spec(("batch",))),
            out_specs=rows,
            check_vma=False,
        )
        old = prompts.prompt_k, prompts.prompt_v_PHSd
        k, v = self._keys(store(k_RHSd, old[0])), store(v_RHSd, old[1])
        k, v = write(old, (k, v), prompt_R)
        return prompts._replace(prompt_k=k, prompt_v_PHSd=v)

    def begin_step(self, slot_map: SlotMap, sizes: Sizes, active_B: Bool[Array, "B"]) -> Masks:
        """What all layers share in a step that runs the token at `own_length_B` of each slot.

        The token attends to itself too. Caches of slots that are not active do not change.
        """
        own_T = jnp.arange(sizes.own_tokens)[None]
        own_BT = own_T <= slot_map.own_length_B[:, None]
        position_S = jnp.arange(sizes.prompt_tokens)[None, None]
        prompt_PKS = position_S < slot_map.prompt_length_P[:, None, None]
        if self._window is not None:
            own_BT &= slot_map.own_length_B[:, None] - own_T < self._window
            own_PK = self._to_prompts(slot_map.own_length_B, slot_map)
            query_PK1 = (slot_map.prompt_length_P[:, None] + own_PK)[:, :, None]
            prompt_PKS = prompt_PKS & (query_PK1 - position_S < self._window)
        at_B = jnp.where(active_B, slot_map.own_length_B, sizes.own_tokens)
        return Masks(slot_map, prompt_PKS, own_BT, at_B)

    def attend(
        self,
        layer: LayerCache,
        q_BHGd: Float[Array, "B H G d"],
        k_BHd: Float[Array, "B H d"],
        v_BHd: Float[Array, "B H d"],
        step: Masks,
    ) -> tuple[Float[Array, "B H G d"], LayerCache]:
        """softmax(q k / sqrt(d)) v over [prompt ; own tokens ; this token] in float32, and the
        layer with this token's key and value."""
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
        k, v = store(k_BHd, layer.own_k), store(v_BHd, layer.own_v_BHTd)

        def write(old: Array | None, new: Array | None, tokens_dim: int = 2) -> Any:
            if old is None:
                return None
            every = (slice(None),) * (tokens_dim - 1)
            # Slot by slot: for indices of slots the devices would send their tokens to each other.
            write_slot = lambda slot, token, at: slot.at[*every, at].set(token, mode="drop")  # noqa: E731
            return jax.vmap(write_slot)(old, new, at_B)

        own_k, own_v = layer.own_k, layer.own_v_BHTd
        return layer._replace(
            own_k=Stored(
                write(own_k.values, k.values, 3 if self.k_tokens_last else 2),
                write(own_k.scale, k.scale),
            ),
            own_v_BHTd=Stored(write(own_v.values, v.values), write(own_v.scale, v.scale)),
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
        k, v = layer.prompt_k, layer.prompt_v_PHSd
        q_PKHGd = self._to_prompts(_scaled(q_BHGd), step.slot_map)
        keys = "nhds" if self.k_tokens_last else "nhsd"
        scores = _product(f"nrhgd,{keys}->nhrgs", q_PKHGd, k.values)
        scores = scores if k.scale is None else scores * k.scale[:, :, None, None]
        weights, partial = _softmax(scores, step.prompt_PKS[:, None, :, None])
        weights = weights if v.scale is None else weights * v.scale[:, :, None, None]
        of_prompts = partial(_product("nhrgs,nhsd->nhrgd", weights, v.values))
        return jax.tree.map(lambda x: self._to_slots(x.swapaxes(1, 2), step.slot_map), of_prompts)

    def _keys(self, stored: Stored) -> Stored:
        """From [..., tokens, d] to the order of dims that keys have, and back."""
        values = stored.values
        return stored._replace(values=values.swapaxes(2, 3)) if self.k_tokens_last else stored

    def _to_prompts(self, x: Array, slot_map: SlotMap) -> Array:
        """[B, ...] to [P, K, ...]: the rows of each prompt's slots."""
        rows = gather_in_shards(x, slot_map.slots_PK.reshape(self._shards, -1))
        return rows.reshape(*slot_map.slots_PK.shape, *x.shape[1:])

    def _to_slots(self, x: Array, slot_map: SlotMap) -> Array:
        """[P, K, ...] to [B, ...]."""
        rows = x.reshape(-1, *x.shape[2:])
        return gather_in_shards(rows, slot_map.prompt_row_B.reshape(self._shards, -1))

    def resize(self, layer: LayerCache, new: Sizes) -> LayerCache:
        """The same contents with other sizes; what does not fit is cut off."""
        prompts = lambda x: fit(fit_in_shards(x, new.prompts, self._shards), 2, new.prompt_tokens)  # noqa: E731
        own = lambda x: fit(x, 2, new.own_tokens)  # noqa: E731
        return LayerCache(
            self._keys(jax.tree.map(prompts, self._keys(layer.prompt_k))),
            jax.tree.map(prompts, layer.prompt_v_PHSd),
            self._keys(jax.tree.map(own, self._keys(layer.own_k))),
            jax.tree.map(own, layer.own_v_BHTd),
        )

    def move_slots(
        self,
        layer: LayerCache,
        from_slots: Int[Array, "shards slots"],
        from_prompts: Int[Array, "shards prompts"],
    ) -> LayerCache:
        """Other numbers of slots and prompt slots, each with the contents of one of its shard."""
        prompts = partial(jax.tree.map, lambda x: gather_in_shards(x, from_prompts))
        own = partial(jax.tree.map, lambda x: gather_in_shards(x, from_slots))
        return LayerCache(*prompts(layer[:2]), *own(layer[2:]))

    def read(
        self, layer: LayerCache, slot_map: SlotMap, slot_rows: Int[Array, "rows"]
    ) -> tuple[Float[Array, "rows cached H d"], Float[Array, "rows cached H d"]]:
        """Keys and values of some slots, as a prefix for the decoder."""
        prompt_rows = slot_map.prompt_of_slots(self._shards)[slot_rows]
        prompt_k, own_k = self._keys(layer.prompt_k), self._keys(layer.own_k)
        k = [_values(prompt_k, prompt_rows), _values(own_k, slot_rows)]
        v = [_values(layer.prompt_v_PHSd, prompt_rows), _values(layer.own_v_BHTd, slot_rows)]
        k, v = (jnp.concatenate(x, axis=2).swapaxes(1, 2) for x in (k, v))
        return k, v

    def read_positions(
        self,
        slot_map: SlotMap,
        sizes: Sizes,
        slot_rows: Int[Array, "rows"],
        own_length_rows: Int[Array, "rows"],
    ) -> tuple[Int[Array, "rows cached"], Bool[Array, "rows cached"]]:
        """Positions of what `read` returns, and which entries hold prompt or own tokens."""
        prompt_rows = slot_map.prompt_of_slots(self._shards)[slot_rows]
        length = slot_map.prompt_length_P[prompt_rows][:, None]
        in_prompt, in_own = (
            jnp.broadcast_to(jnp.arange(n)[None], (len(slot_rows), n)) for n in sizes[1:]
        )
        valid = [in_prompt < length, in_own < own_length_rows[:, None]]
        positions = [in_prompt, length + in_own]
        return jnp.concatenate(positions, axis=1), jnp.concatenate(valid, axis=1)


def shards_of(mesh: Mesh | AbstractMesh) -> int:
    """Groups of slots that lie on one device along the batch axes."""
    return int(np.prod([mesh.shape[axis] for axis in BATCH_AXES]))


def _write_prompt(prompt_1: Int[Array, "1"], old: Array, new: Array) -> Array:
    """The prompt slots of a shard with those of one prompt replaced; `new` has a leading 1."""
    at = (jnp.minimum(prompt_1[0], len(old) - 1), *[0] * (old.ndim - 1))
    kept = jax.lax.dynamic_slice(old, at, new.shape)
    return jax.lax.dynamic_update_slice(old, jnp.where(prompt_1[0] < len(old), new, kept), at)


def store(x: Float[Array, "*B d"], like: Stored) -> Stored:
    """`x` as `like` stores it: cast, or rounded to 127 steps of its largest value over d."""
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
    """`fit` along the first dim, within each shard."""
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    return fit(by_shard, 1, size // shards).reshape(size, *x.shape[1:])


def _scaled(q_BHGd: Float[Array, "B H G d"]) -> Float[Array, "B H G d"]:
    return q_BHGd.astype(jnp.float32) * q_BHGd.shape[-1] ** -0.5


def _product(equation: str, x: Float[Array, "..."], stored: Array) -> Float[Array, "..."]:
    """A product in the cache's floating dtype (float32 for int8), summed in float32."""
    dtype = stored.dtype if jnp.issubdtype(stored.dtype, jnp.floating) else jnp.float32
    return jnp.einsum(
        equation, x.astype(dtype), stored.astype(dtype), preferred_element_type=jnp.float32
    )


def _softmax(scores: Float[Array, "..."], mask: Bool[Array, "..."]) -> tuple[Array, Any]:
    """Weights before division by their sum, and what turns their product with v into a Partial."""
    scores = jnp.where(mask, scores, _LOWEST)
    highest = jnp.max(scores, axis=-1)
    # A query that sees nothing has weights 0 and not exp(0).
    weights = jnp.where(mask, jnp.exp(scores - highest[..., None]), 0.0)
    return weights, lambda out: Partial(out, jnp.sum(weights, axis=-1), highest)


def gather_in_shards(x: Array, index: Int[Array, "shards rows"]) -> Array:
    """Rows of each shard's part of `x`; no row moves to another device."""
    shards, rows = index.shape
    by_shard = x.reshape(shards, -1, *x.shape[1:])
    index = index.reshape(shards, rows, *([1] * (x.ndim - 1)))
    return jnp.take_along_axis(by_shard, index, axis=1).reshape(shards * rows, *x.shape[1:])


def _values(cache: Stored, rows: Int[Array, "rows"]) -> Array:
    values = cache.values[rows]
    if cache.scale is None:
        return values
    return values.astype(jnp.float32) * cache.scale[rows][..., None]
