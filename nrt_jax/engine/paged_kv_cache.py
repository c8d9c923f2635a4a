"""Keys and values in pages, for the ragged paged attention kernel of the TPU.

A prompt's full pages are stored once, in its prompt slot, and the page tables of all its slots
refer to them. The tokens after the last full page, the prompt's tail, are copied to the front of
each slot's own pages, which then hold [tail ; generated tokens], so that the kernel reads one
continuous run:

    pages of 4 tokens, a prompt x0 .. x5, two slots that continue it
    page of the prompt slot  0  x0 x1 x2 x3
    pages of slot 0          1  x4 x5 y0 y1    2  y2 .. .. ..     table  0 1 2
    pages of slot 1          3  x4 x5 z0 ..    4  .. .. .. ..     table  0 3 4

Each shard has one array of pages, those of its prompt slots first. The sizes determine which page
is where, so the tables are computed in each step.

Letters: those of kv_cache.py. The dim `kv` has 2 H entries, a token's keys and values; `table` is
the most pages that a slot can have.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import struct
from jax.experimental.pallas.ops.tpu.ragged_paged_attention.kernel import ragged_paged_attention
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.engine.kv_cache import Sizes, SlotMap, fit, gather_in_shards, shards_of
from nrt_jax.models.sharding import partition_spec

PAGE_TOKENS = 64
BLOCK_TOKENS = 256
"""Keys that the kernel loads at a time, even for a shorter sequence."""
BLOCK_QUERIES = 8

Kernel = Callable[..., Float[Array, "B query_heads d"]]
"""From q [B, H * G, d], pages, lengths [B], page tables [B, table] and the window: the output."""


@struct.dataclass
class PagedLayer:
    """One layer: the pages of all shards, with key and value of each head next to each other."""

    pages: Any
    """[pages, page_tokens, kv, d]."""
    sizes: Sizes = struct.field(pytree_node=False)

    logical_axes: ClassVar = ("batch", None, "kv_heads")
    """Logical axes of the first dims of the pages."""


class Tables(NamedTuple):
    """What all layers share in a step; slots and pages are numbered within the shard."""

    length_B: Int[Array, "B"]
    """Tokens to attend to, the new one included."""
    page_table_B: Int[Array, "B table"]
    at_B: Int[Array, "B"]
    """Where a slot writes in its own pages; beyond them for a slot whose pages do not change."""


class PageLayout(NamedTuple):
    """How many pages a prompt slot and a slot have, and where the slots' pages start in a shard."""

    prompt_pages: int
    own_pages: int
    first_own: int

    @classmethod
    def of(cls, sizes: Sizes, shards: int) -> "PageLayout":
        """The layout for these sizes; a slot's pages hold the prompt's tail and its own tokens."""
        longest_tail = min(sizes.prompt_tokens, PAGE_TOKENS - 1)
        prompt_pages = sizes.prompt_tokens // PAGE_TOKENS
        own_pages = -(-(longest_tail + sizes.own_tokens) // PAGE_TOKENS)
        return cls(prompt_pages, own_pages, sizes.prompts // shards * prompt_pages)


def attention_kernel(
    q: Float[Array, "B query_heads d"],
    pages: Float[Array, "pages page_tokens kv d"],
    length_B: Int[Array, "B"],
    page_table_B: Int[Array, "B table"],
    window: int | None,
) -> Float[Array, "B query_heads d"]:
    """softmax(q k / sqrt(d)) v of one query per slot, by the Pallas kernel for TPUs."""
    (B, _, d), table = q.shape, page_table_B.shape[1]
    return ragged_paged_attention(
        q,
        pages,
        length_B,
        page_table_B,
        jnp.arange(B + 1, dtype=jnp.int32),
        jnp.full(1, B, jnp.int32),
        sm_scale=d**-0.5,
        sliding_window=window,
        # Without these the kernel asks for the device, and there may be none when compiling.
        num_kv_pages_per_block=min(table, BLOCK_TOKENS // PAGE_TOKENS),
        num_queries_per_block=min(B, BLOCK_QUERIES),
    )


class PagedCache:
    """The cache for TPUs; it has the methods of `KVCache`."""

    def __init__(self, mesh: Mesh, window: int | None = None, kernel: Kernel = attention_kernel):
        self._mesh, self._window, self._kernel = mesh, window, kernel
        self._shards = shards_of(mesh)
        self._pages_spec = partition_spec(PagedLayer.logical_axes)
        self._rows_spec = partition_spec(("batch", "kv_heads"))

    def empty(
        self, sizes: Sizes, slots: int, kv_heads: int, head_dim: int, dtype: DTypeLike
    ) -> PagedLayer:
        """A layer without contents."""
        layout = PageLayout.of(sizes, self._shards)
        pages = sizes.prompts * layout.prompt_pages + slots * layout.own_pages
        return PagedLayer(jnp.zeros((pages, PAGE_TOKENS, 2 * kv_heads, head_dim), dtype), sizes)

    def prompts_of(self, layer: PagedLayer) -> PagedLayer:
        """The part that `insert` changes: all of it, as prompts and slots share one array."""
        return layer

    def with_prompts(self, layer: PagedLayer, prompts: PagedLayer) -> PagedLayer:
        """The layer that `insert` returned."""
        del layer
        return prompts

    def insert(
        self,
        prompts: PagedLayer,
        k_RHSd: Float[Array, "R H S d"],
        v_RHSd: Float[Array, "R H S d"],
        prompt_R: Int[Array, "R"],
        length_R: Int[Array, "R"],
        slot_RK: Int[Array, "R K"],
    ) -> PagedLayer:
        """Write a prompt to prompt slot `prompt_R` of each shard, and its tail to `slot_RK`.

        Numbers are counted within the shard; those beyond its prompt slots and slots mean none.
        """
        slots_spec = partition_spec(("batch",))
        write = jax.shard_map(
            partial(self._insert_in_shard, sizes=prompts.sizes),
            mesh=self._mesh,
            in_specs=(self._pages_spec, *[self._rows_spec] * 2, *[slots_spec] * 3),
            out_specs=self._pages_spec,
            check_vma=False,
        )
        pages = write(prompts.pages, k_RHSd, v_RHSd, prompt_R, length_R, slot_RK)
        return PagedLayer(pages, prompts.sizes)

    def _insert_in_shard(
        self,
        pages: Array,
        k_1HSd: Array,
        v_1HSd: Array,
        prompt_1: Array,
        length_1: Array,
        slot_1K: Array,
        *,
        sizes: Sizes,
    ) -> Array:
        layout, out_of_range = PageLayout.of(sizes, self._shards), len(pages)
        kv_S = _interleave(*(x[0].swapaxes(0, 1) for x in (k_1HSd, v_1HSd))).astype(pages.dtype)
        kv_S = fit(kv_S, 0, -(-len(kv_S) // PAGE_TOKENS) * PAGE_TOKENS)
        new_pages = kv_S.reshape(-1, *pages.shape[1:])
        page, prompt = jnp.arange(min(len(new_pages), layout.prompt_pages)), prompt_1[0]
        is_here = prompt < sizes.prompts // self._shards
        at_page = jnp.where(is_here, prompt * layout.prompt_pages + page, out_of_range)
        pages = pages.at[at_page].set(new_pages[: len(page)], mode="drop")
        # A prompt that ends with a page has no tail: the copied page is then overwritten or unread.
        tail_page = new_pages[jnp.minimum(length_1[0] // PAGE_TOKENS, len(new_pages) - 1)]
        slots = (len(pages) - layout.first_own) // layout.own_pages
        at_K = layout.first_own + slot_1K[0] * layout.own_pages
        at_K = jnp.where(slot_1K[0] < slots, at_K, out_of_range)
        return pages.at[at_K].set(tail_page[None], mode="drop")

    def begin_step(self, slot_map: SlotMap, sizes: Sizes, active_B: Bool[Array, "B"]) -> Tables:
        """What all layers share in a step that runs the token at `own_length_B` of each slot.

        The token attends to itself too. Pages of slots that are not active do not change.
        """
        own_tokens = PageLayout.of(sizes, self._shards).own_pages * PAGE_TOKENS
        prompt_B = self._prompt_length(slot_map)
        tail_B = prompt_B % PAGE_TOKENS
        # A finished slot may have written more tokens than are left after the cache shrank.
        length_B = prompt_B - tail_B + jnp.minimum(tail_B + slot_map.own_length_B + 1, own_tokens)
        at_B = jnp.where(active_B, tail_B + slot_map.own_length_B, own_tokens)
        return Tables(length_B, self._page_table(slot_map, sizes), at_B)

    def _prompt_length(self, slot_map: SlotMap) -> Int[Array, "B"]:
        row_B = slot_map.prompt_row_B // slot_map.slots_PK.shape[1]
        return gather_in_shards(slot_map.prompt_length_P, row_B.reshape(self._shards, -1))

    def _page_table(self, slot_map: SlotMap, sizes: Sizes) -> Int[Array, "B table"]:
        """The full pages of each slot's prompt, then its own."""
        layout, (B,) = PageLayout.of(sizes, self._shards), slot_map.prompt_row_B.shape
        full_B1 = (self._prompt_length(slot_map) // PAGE_TOKENS)[:, None]
        prompt_B1 = (slot_map.prompt_row_B // slot_map.slots_PK.shape[1])[:, None]
        slot_B1 = (jnp.arange(B) % (B // self._shards))[:, None]
        entry = jnp.arange(layout.prompt_pages + layout.own_pages)[None]
        own_page = jnp.clip(entry - full_B1, 0, layout.own_pages - 1)
        own_page = layout.first_own + slot_B1 * layout.own_pages + own_page
        return jnp.where(entry < full_B1, prompt_B1 * layout.prompt_pages + entry, own_page)

    def attend(
        self,
        layer: PagedLayer,
        q_BHGd: Float[Array, "B H G d"],
        k_BHd: Float[Array, "B H d"],
        v_BHd: Float[Array, "B H d"],
        step: Tables,
    ) -> tuple[Float[Array, "B H G d"], PagedLayer]:
        """softmax(q k / sqrt(d)) v over [prompt ; own tokens ; this token] in the cache's dtype,
        and the layer with this token's key and value."""
        slots_spec = partition_spec(("batch",))
        attend = jax.shard_map(
            partial(self._attend_in_shard, layout=PageLayout.of(layer.sizes, self._shards)),
            mesh=self._mesh,
            in_specs=(self._pages_spec, self._rows_spec, self._rows_spec, slots_spec),
            out_specs=(self._rows_spec, self._pages_spec),
            check_vma=False,
        )
        kv_B = _interleave(k_BHd, v_BHd)
        out_BHGd, pages = attend(layer.pages, q_BHGd, kv_B, step)
        return out_BHGd, PagedLayer(pages, layer.sizes)

    def _attend_in_shard(
        self, pages: Array, q_BHGd: Array, kv_B: Array, step: Tables, *, layout: PageLayout
    ) -> tuple[Array, Array]:
        (B, H, G, d), dtype = q_BHGd.shape, pages.dtype
        page_B, token_B = step.at_B // PAGE_TOKENS, step.at_B % PAGE_TOKENS
        own_B = layout.first_own + jnp.arange(B) * layout.own_pages + page_B
        own_B = jnp.where(page_B < layout.own_pages, own_B, len(pages))
        pages = pages.at[own_B, token_B].set(kv_B.astype(dtype), mode="drop")
        out = self._kernel(
            q_BHGd.reshape(B, H * G, d).astype(dtype),
            pages,
            step.length_B,
            step.page_table_B,
            self._window,
        )
        return out.reshape(B, H, G, d), pages

    def resize(self, layer: PagedLayer, new: Sizes) -> PagedLayer:
        """The same contents with other sizes; what does not fit is cut off."""
        shards, page = self._shards, layer.pages.shape[1:]
        old_layout, new_layout = (PageLayout.of(sizes, shards) for sizes in (layer.sizes, new))
        by_shard = layer.pages.reshape(shards, -1, *page)
        prompts, own = jnp.split(by_shard, [old_layout.first_own], axis=1)
        by_prompt = prompts.reshape(
            shards, layer.sizes.prompts // shards, old_layout.prompt_pages, *page
        )
        by_prompt = fit(fit(by_prompt, 1, new.prompts // shards), 2, new_layout.prompt_pages)
        by_slot = fit(own.reshape(shards, -1, old_layout.own_pages, *page), 2, new_layout.own_pages)
        parts = [by_prompt.reshape(shards, -1, *page), by_slot.reshape(shards, -1, *page)]
        return PagedLayer(jnp.concatenate(parts, axis=1).reshape(-1, *page), new)

    def move_slots(
        self,
        layer: PagedLayer,
        from_slots: Int[Array, "shards slots"],
        from_prompts: Int[Array, "shards prompts"],
    ) -> PagedLayer:
        """Other numbers of slots and prompt slots, each with the pages of one of its shard."""
        shards, page = self._shards, layer.pages.shape[1:]
        layout = PageLayout.of(layer.sizes, shards)
        by_shard = layer.pages.reshape(shards, -1, *page)
        prompts, own = jnp.split(by_shard, [layout.first_own], axis=1)
        by_prompt = prompts.reshape(layer.sizes.prompts, layout.prompt_pages, *page)
        by_slot = own.reshape(-1, layout.own_pages, *page)
        parts = [
            gather_in_shards(x, index).reshape(shards, -1, *page)
            for x, index in ((by_prompt, from_prompts), (by_slot, from_slots))
        ]
        pages = jnp.concatenate(parts, axis=1).reshape(-1, *page)
        return PagedLayer(pages, layer.sizes._replace(prompts=from_prompts.size))

    def read(
        self, layer: PagedLayer, slot_map: SlotMap, slot_rows: Int[Array, "rows"]
    ) -> tuple[Float[Array, "rows cached H d"], Float[Array, "rows cached H d"]]:
        """Keys and values of some slots, as a prefix for the decoder."""
        pages, (B,) = layer.pages, slot_map.prompt_row_B.shape
        shard = (slot_rows // (B // self._shards))[:, None]
        page = self._page_table(slot_map, layer.sizes)[slot_rows]
        page += shard * (len(pages) // self._shards)
        H, d = pages.shape[2] // 2, pages.shape[3]
        kv = pages[page].reshape(len(slot_rows), -1, H, 2, d)
        return kv[..., 0, :], kv[..., 1, :]

    def read_positions(
        self,
        slot_map: SlotMap,
        sizes: Sizes,
        slot_rows: Int[Array, "rows"],
        own_length_rows: Int[Array, "rows"],
    ) -> tuple[Int[Array, "rows cached"], Bool[Array, "rows cached"]]:
        """Positions of what `read` returns, and which entries hold prompt or own tokens."""
        layout = PageLayout.of(sizes, self._shards)
        tokens = (layout.prompt_pages + layout.own_pages) * PAGE_TOKENS
        position = jnp.broadcast_to(jnp.arange(tokens)[None], (len(slot_rows), tokens))
        length = self._prompt_length(slot_map)[slot_rows] + own_length_rows
        return position, position < length[:, None]


def _interleave(k: Float[Array, "T H d"], v: Float[Array, "T H d"]) -> Float[Array, "T 2*H d"]:
    """Key and value of each head next to each other, as the kernel reads them."""
    T, H, d = k.shape
    return jnp.stack([k, v], axis=2).reshape(T, 2 * H, d)
