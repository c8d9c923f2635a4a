"""Keys and values in pages, for the ragged paged attention kernel of the TPU.

Letters: those of cache.py, and J pages of one shard, C tokens of a page, p pages of a prompt's
room, o pages of a slot's, W = p + o pages that a slot can have, F pages of a prompt that is
written, E = 2 H keys and values of a token.

A prompt's full pages are stored once, in its room; the page tables of all its slots name them. The
tokens after the last full page, the prompt's tail, are copied to the front of each slot's own
pages, which then hold [tail ; generated tokens], so that the kernel finds one run of tokens:

    C = 4, a prompt x0 .. x5, two slots that continue it, W = 3
    page of the prompt's room  0  x0 x1 x2 x3
    pages of slot 0            1  x4 x5 y0 y1    2  y2 .. .. ..     table  0 1 2
    pages of slot 1            3  x4 x5 z0 ..    4  .. .. .. ..     table  0 3 4

The rooms lie in one array a shard, the prompts' first. Which page is where follows from the sizes,
so the tables are computed in each step.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ragged_paged_attention
from jax.sharding import Mesh, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.engine.kv_cache import BATCH_AXES, Places, Sizes, fit, gather_in_shards, shards_of
from nrt_jax.models.sharding import partition_spec

PAGE_TOKENS = 64
BLOCK_TOKENS = 256
"""Keys that the kernel brings in at a time: a short sequence fetches as many in vain."""
BLOCK_QUERIES = 8

Kernel = Callable[..., Float[Array, "B N d"]]
"""From q [B, H * G, d], pages, lengths [B], tables [B, W], and the window: the output."""


@struct.dataclass
class PagedLayer:
    """One layer: the pages of all shards, keys and values of a head beside each other."""

    pages_JCEd: Any
    sizes: Sizes = struct.field(pytree_node=False)

    logical_axes: ClassVar = ("batch", None, "kv_heads")
    """Of the pages' first dims."""


class Tables(NamedTuple):
    """What all layers share in a step; slots and pages are counted within the shard."""

    length_B: Int[Array, "B"]
    """Tokens to attend to, the step's own included."""
    page_BW: Int[Array, "B W"]
    at_B: Int[Array, "B"]
    """Where in its own pages a slot writes; beyond them for one whose pages stay as they are."""


class Rooms(NamedTuple):
    """How many pages a prompt and a slot have, and where a shard's slots begin."""

    prompt_pages: int
    own_pages: int
    first_own: int

    @classmethod
    def of(cls, sizes: Sizes, shards: int) -> "Rooms":
        """A slot's own pages have room for the prompt's tail before its own tokens."""
        longest_tail = min(sizes.prompt_tokens, PAGE_TOKENS - 1)
        prompt_pages = sizes.prompt_tokens // PAGE_TOKENS
        own_pages = -(-(longest_tail + sizes.own_tokens) // PAGE_TOKENS)
        return cls(prompt_pages, own_pages, sizes.prompts // shards * prompt_pages)


def attention_kernel(
    q_BNd: Float[Array, "B N d"],
    pages_JCEd: Float[Array, "J C E d"],
    length_B: Int[Array, "B"],
    page_BW: Int[Array, "B W"],
    window: int | None,
) -> Float[Array, "B N d"]:
    """softmax(q k / sqrt(d)) v of one query a slot, by the Pallas kernel for TPUs."""
    (B, _, d), W = q_BNd.shape, page_BW.shape[1]
    return ragged_paged_attention(
        q_BNd,
        pages_JCEd,
        length_B,
        page_BW,
        jnp.arange(B + 1, dtype=jnp.int32),
        jnp.full(1, B, jnp.int32),
        sm_scale=d**-0.5,
        sliding_window=window,
        # Left to itself the kernel asks what device is there, and there may be none to ask.
        num_kv_pages_per_block=min(W, BLOCK_TOKENS // PAGE_TOKENS),
        num_queries_per_block=min(B, BLOCK_QUERIES),
    )


class PagedCache:
    """The form for TPUs; the methods are those of `KVCache`."""

    def __init__(self, mesh: Mesh, window: int | None = None, kernel: Kernel = attention_kernel):
        self._mesh, self._window, self._kernel = mesh, window, kernel
        self._shards = shards_of(mesh)
        self._pages_spec = partition_spec(PagedLayer.logical_axes)
        self._rows_spec = partition_spec(("batch", "kv_heads"))

    def empty(
        self, sizes: Sizes, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> PagedLayer:
        """A layer without contents."""
        room = Rooms.of(sizes, self._shards)
        J = sizes.prompts * room.prompt_pages + slots * room.own_pages
        return PagedLayer(jnp.zeros((J, PAGE_TOKENS, 2 * kv_heads, head_dim), dtype), sizes)

    def prompts_of(self, layer: PagedLayer) -> PagedLayer:
        """What `insert` changes: the pages of prompts and slots lie in one array."""
        return layer

    def with_prompts(self, layer: PagedLayer, prompts: PagedLayer) -> PagedLayer:
        """The layer with what `insert` made of `prompts_of`."""
        del layer
        return prompts

    def insert(
        self,
        prompts: PagedLayer,
        k_SHd: Float[Array, "S H d"],
        v_SHd: Float[Array, "S H d"],
        prompt: Int[Array, ""],
        length: Int[Array, ""],
        slot_K: Int[Array, "K"],
    ) -> PagedLayer:
        """Write one prompt of `length` tokens for the slots of `slot_K`, of which B is no slot."""
        pages_JCEd = prompts.pages_JCEd
        kv_SEd = _interleave(k_SHd, v_SHd).astype(pages_JCEd.dtype)
        kv_SEd = fit(kv_SEd, 0, -(-len(kv_SEd) // PAGE_TOKENS) * PAGE_TOKENS)
        new_FCEd = kv_SEd.reshape(-1, *pages_JCEd.shape[1:])
        everywhere = PartitionSpec()
        new_spec = partition_spec((None, None, "kv_heads"))
        write = jax.shard_map(
            partial(self._insert_in_shard, sizes=prompts.sizes),
            mesh=self._mesh,
            in_specs=(self._pages_spec, new_spec, everywhere, everywhere, everywhere),
            out_specs=self._pages_spec,
            check_vma=False,
        )
        pages_JCEd = write(pages_JCEd, new_FCEd, prompt, length, slot_K)
        return PagedLayer(pages_JCEd, prompts.sizes)

    def _insert_in_shard(
        self,
        pages_JCEd: Array,
        new_FCEd: Array,
        prompt: Array,
        length: Array,
        slot_K: Array,
        *,
        sizes: Sizes,
    ) -> Array:
        room, J, F = Rooms.of(sizes, self._shards), len(pages_JCEd), len(new_FCEd)
        shard = jax.lax.axis_index(BATCH_AXES)
        first_F = jnp.arange(min(F, room.prompt_pages))
        here = prompt - shard * (sizes.prompts // self._shards)
        is_here = (here >= 0) & (here < sizes.prompts // self._shards)
        at_F = jnp.where(is_here, here * room.prompt_pages + first_F, J)
        pages_JCEd = pages_JCEd.at[at_F].set(new_FCEd[: len(first_F)], mode="drop")
        # A prompt that ends with a page has no tail, whatever is copied for it.
        tail_CEd = new_FCEd[jnp.minimum(length // PAGE_TOKENS, F - 1)]
        slots = (J - room.first_own) // room.own_pages
        here_K = slot_K - shard * slots
        at_K = room.first_own + here_K * room.own_pages
        at_K = jnp.where((here_K >= 0) & (here_K < slots), at_K, J)
        return pages_JCEd.at[at_K].set(tail_CEd[None], mode="drop")

    def begin_step(self, places: Places, sizes: Sizes, active_B: Bool[Array, "B"]) -> Tables:
        """What all layers share in a step that runs the tokens at `own_length_B`.

        These see themselves. The pages of slots that are not active stay as they are.
        """
        own_tokens = Rooms.of(sizes, self._shards).own_pages * PAGE_TOKENS
        prompt_B = self._prompt_length(places)
        tail_B = prompt_B % PAGE_TOKENS
        # A slot that is done may hold more than its room, cut off when the rooms shrank.
        length_B = prompt_B - tail_B + jnp.minimum(tail_B + places.own_length_B + 1, own_tokens)
        at_B = jnp.where(active_B, tail_B + places.own_length_B, own_tokens)
        return Tables(length_B, self._page_table(places, sizes), at_B)

    def _prompt_length(self, places: Places) -> Int[Array, "B"]:
        row_B = places.place_B // places.slots_NK.shape[1]
        return gather_in_shards(places.prompt_length_N, row_B.reshape(self._shards, -1))

    def _page_table(self, places: Places, sizes: Sizes) -> Int[Array, "B W"]:
        """The full pages of each slot's prompt, then its own."""
        room, (B,) = Rooms.of(sizes, self._shards), places.place_B.shape
        full_B1 = (self._prompt_length(places) // PAGE_TOKENS)[:, None]
        prompt_B1 = (places.place_B // places.slots_NK.shape[1])[:, None]
        slot_B1 = (jnp.arange(B) % (B // self._shards))[:, None]
        order_1W = jnp.arange(room.prompt_pages + room.own_pages)[None]
        own_BW = jnp.clip(order_1W - full_B1, 0, room.own_pages - 1)
        own_BW = room.first_own + slot_B1 * room.own_pages + own_BW
        return jnp.where(order_1W < full_B1, prompt_B1 * room.prompt_pages + order_1W, own_BW)

    def attend(
        self,
        layer: PagedLayer,
        q_BHGd: Float[Array, "B H G d"],
        k_BHd: Float[Array, "B H d"],
        v_BHd: Float[Array, "B H d"],
        step: Tables,
    ) -> tuple[Float[Array, "B H G d"], PagedLayer]:
        """softmax(q k / sqrt(d)) v over [prompt ; own tokens ; this one], in the cache's dtype; and
        the layer with this token's key and value."""
        slots_spec = partition_spec(("batch",))
        attend = jax.shard_map(
            partial(self._attend_in_shard, room=Rooms.of(layer.sizes, self._shards)),
            mesh=self._mesh,
            in_specs=(self._pages_spec, self._rows_spec, self._rows_spec, slots_spec),
            out_specs=(self._rows_spec, self._pages_spec),
            check_vma=False,
        )
        kv_BEd = _interleave(k_BHd, v_BHd)
        out_BHGd, pages_JCEd = attend(layer.pages_JCEd, q_BHGd, kv_BEd, step)
        return out_BHGd, PagedLayer(pages_JCEd, layer.sizes)

    def _attend_in_shard(
        self, pages_JCEd: Array, q_BHGd: Array, kv_BEd: Array, step: Tables, *, room: Rooms
    ) -> tuple[Array, Array]:
        (B, H, G, d), dtype = q_BHGd.shape, pages_JCEd.dtype
        page_B, token_B = step.at_B // PAGE_TOKENS, step.at_B % PAGE_TOKENS
        own_B = room.first_own + jnp.arange(B) * room.own_pages + page_B
        own_B = jnp.where(page_B < room.own_pages, own_B, len(pages_JCEd))
        pages_JCEd = pages_JCEd.at[own_B, token_B].set(kv_BEd.astype(dtype), mode="drop")
        out_BNd = self._kernel(
            q_BHGd.reshape(B, H * G, d).astype(dtype),
            pages_JCEd,
            step.length_B,
            step.page_BW,
            self._window,
        )
        return out_BNd.reshape(B, H, G, d), pages_JCEd

    def resize(self, layer: PagedLayer, new: Sizes) -> PagedLayer:
        """The same contents in another room; what does not fit is cut off."""
        U, pages_JCEd = self._shards, layer.pages_JCEd
        old_room, new_room = Rooms.of(layer.sizes, U), Rooms.of(new, U)
        page = pages_JCEd.shape[1:]
        pages_U = pages_JCEd.reshape(U, -1, *page)
        prompts_UM = pages_U[:, : old_room.first_own].reshape(
            U, layer.sizes.prompts // U, old_room.prompt_pages, *page
        )
        prompts_UM = fit(fit(prompts_UM, 1, new.prompts // U), 2, new_room.prompt_pages)
        own_UI = pages_U[:, old_room.first_own :].reshape(U, -1, old_room.own_pages, *page)
        own_UI = fit(own_UI, 2, new_room.own_pages)
        rooms = [prompts_UM.reshape(U, -1, *page), own_UI.reshape(U, -1, *page)]
        return PagedLayer(jnp.concatenate(rooms, axis=1).reshape(-1, *page), new)

    def move_slots(self, layer: PagedLayer, from_UI: Int[Array, "U I"]) -> PagedLayer:
        """More slots or fewer: each gets the own pages of an old one of its shard."""
        (U, _), room = from_UI.shape, Rooms.of(layer.sizes, self._shards)
        page = layer.pages_JCEd.shape[1:]
        pages_U = layer.pages_JCEd.reshape(U, -1, *page)
        prompts_U, own_U = jnp.split(pages_U, [room.first_own], axis=1)
        own_BoCEd = own_U.reshape(-1, room.own_pages, *page)
        own_U = gather_in_shards(own_BoCEd, from_UI).reshape(U, -1, *page)
        pages_JCEd = jnp.concatenate([prompts_U, own_U], axis=1).reshape(-1, *page)
        return PagedLayer(pages_JCEd, layer.sizes)

    def read(
        self, layer: PagedLayer, places: Places, slot_R: Int[Array, "R"]
    ) -> tuple[Float[Array, "R ST H d"], Float[Array, "R ST H d"]]:
        """Keys and values of some slots, as the decoder takes a prefix."""
        pages_JCEd, (B,) = layer.pages_JCEd, places.place_B.shape
        shard_R1 = (slot_R // (B // self._shards))[:, None]
        page_RW = self._page_table(places, layer.sizes)[slot_R]
        page_RW += shard_R1 * (len(pages_JCEd) // self._shards)
        H, d = pages_JCEd.shape[2] // 2, pages_JCEd.shape[3]
        kv = pages_JCEd[page_RW].reshape(len(slot_R), -1, H, 2, d)
        return kv[..., 0, :], kv[..., 1, :]

    def read_positions(
        self,
        places: Places,
        sizes: Sizes,
        slot_R: Int[Array, "R"],
        own_length_R: Int[Array, "R"],
    ) -> tuple[Int[Array, "R ST"], Bool[Array, "R ST"]]:
        """Positions of what `read` gives, and which entries hold prompt or own tokens."""
        room = Rooms.of(sizes, self._shards)
        tokens = (room.prompt_pages + room.own_pages) * PAGE_TOKENS
        position_RS = jnp.broadcast_to(jnp.arange(tokens)[None], (len(slot_R), tokens))
        length_R = self._prompt_length(places)[slot_R] + own_length_R
        return position_RS, position_RS < length_R[:, None]


def _interleave(k: Float[Array, "T H d"], v: Float[Array, "T H d"]) -> Float[Array, "T E d"]:
    """Key and value of a head beside each other, as the kernel wants them."""
    T, H, d = k.shape
    return jnp.stack([k, v], axis=2).reshape(T, 2 * H, d)
