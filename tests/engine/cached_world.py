"""A cache of one layer beside a plain list of what every slot has seen, and float64 attention.

Letters: those of nrt_jax/engine/kv_cache.py.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding

from nrt_jax.engine.decode_state import bucket
from nrt_jax.engine.kv_cache import KVCache, Sizes, SlotMap, fit_in_shards, shards_of
from nrt_jax.models.sharding import partition_spec

LIKE_ROWS = ("batch", "kv_heads")


class World:
    """What the engine does to a layer's cache, done to a cache and to lists of keys and values."""

    def __init__(
        self,
        cache: KVCache,
        sizes: Sizes,
        *,
        slots: int = 8,
        num_samples: int = 4,
        kv_heads: int = 2,
        groups: int = 3,
        head_dim: int = 16,
        dtype: Any = jnp.float32,
        window: int | None = None,
        seed: int = 0,
    ):
        self.cache, self.slots, self.num_samples, self.window = cache, slots, num_samples, window
        self.mesh, self.shards = cache._mesh, shards_of(cache._mesh)
        self.heads = (kv_heads, groups, head_dim)
        self.layer = self._placed(cache.empty(sizes, slots, kv_heads, head_dim, dtype))
        B, N = slots, sizes.prompts
        self.slot_map = SlotMap(
            np.zeros(N, int), np.zeros((N, num_samples), int), *np.zeros((2, B), int)
        )
        self.slot_map = jax.tree.map(lambda x: x.astype(np.int32), self.slot_map)
        self.random = np.random.default_rng(seed)
        self.seen: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        """Keys and values [tokens, H, d] of each slot that was started."""
        self._programs: dict[Any, Any] = {}

    def _placed(self, layer: Any) -> Any:
        sharding = NamedSharding(self.mesh, partition_spec(layer.logical_axes))
        return jax.tree.map(lambda x: jax.device_put(x, sharding), layer)

    def _draw(self, *shape: int) -> np.ndarray:
        return self.random.normal(size=shape).astype(np.float32)

    def insert(self, prompt: int, length: int, slots: list[int]) -> None:
        """Start `slots`, all of the shard of `prompt`, after a prompt of random keys and values."""
        H, _, d = self.heads
        k, v = self._draw(bucket(length), H, d), self._draw(bucket(length), H, d)
        slot_K = np.asarray([*slots, *[self.slots] * (self.num_samples - len(slots))], np.int32)
        slot_map = self.slot_map
        per_shard = len(slot_map.prompt_length_P) // self.shards
        self._insert(prompt // per_shard, prompt % per_shard, k, v, length, slot_K)
        slot_map.prompt_length_P[prompt] = length
        for row, slot in enumerate(slots):
            slot_map.slots_PK[prompt, row] = slot % (self.slots // self.shards)
            slot_map.prompt_row_B[slot] = prompt % per_shard * self.num_samples + row
            slot_map.own_length_B[slot] = 0
            self.seen[slot] = k[:length], v[:length]

    def _insert(
        self, shard: int, prompt: int, k: np.ndarray, v: np.ndarray, length: int, slot_K: np.ndarray
    ) -> None:
        """One shard gets its row of keys and values, the others what they must ignore."""
        R, slots = self.shards, self.slots // self.shards
        rows = [self._draw(R, k.shape[1], len(k), k.shape[2]) for _ in range(2)]
        rows[0][shard], rows[1][shard] = k.swapaxes(0, 1), v.swapaxes(0, 1)
        prompt_R = np.full(R, len(self.slot_map.prompt_length_P) // R, np.int32)
        prompt_R[shard] = prompt
        slot_RK = np.full((R, len(slot_K)), slots, np.int32)
        slot_RK[shard] = np.where(slot_K < self.slots, slot_K % slots, slots)
        length_R = np.full(R, length, np.int32)
        prompts = self.cache.prompts_of(self.layer)
        prompts = jax.jit(self.cache.insert)(prompts, *rows, prompt_R, length_R, slot_RK)
        self.layer = self.cache.with_prompts(self.layer, prompts)

    def step(self, active: list[int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Run a token in the active slots; outputs of theirs, and what they must be, in float64."""
        active = sorted(self.seen) if active is None else active
        (H, G, d), B = self.heads, self.slots
        q, k, v = self._draw(B, H, G, d), self._draw(B, H, d), self._draw(B, H, d)
        is_active_B = np.isin(np.arange(B), active)
        out, self.layer = self._attend(self.layer, self.slot_map, is_active_B, q, k, v)
        self.slot_map.own_length_B[active] += 1
        for slot in active:
            keys, values = self.seen[slot]
            self.seen[slot] = np.append(keys, k[None, slot], 0), np.append(values, v[None, slot], 0)
        expected = np.stack([plain_attention(q[b], *self.seen[b], self.window) for b in active])
        return np.asarray(out, np.float64)[active], expected

    def _attend(self, layer: Any, slot_map: SlotMap, is_active_B: Any, *qkv: Any) -> Any:
        sizes = layer.sizes

        def attend(layer, slot_map, is_active_B, q, k, v):
            step = self.cache.begin_step(slot_map, sizes, is_active_B)
            return self.cache.attend(layer, q, k, v, step)

        if sizes not in self._programs:
            self._programs[sizes] = jax.jit(attend)
        return self._programs[sizes](layer, jax.tree.map(jnp.asarray, slot_map), is_active_B, *qkv)

    def resize(self, sizes: Sizes) -> None:
        """As the engine does it."""
        self.layer = self._placed(jax.jit(self.cache.resize, static_argnums=1)(self.layer, sizes))
        prompts = [
            fit_in_shards(jnp.asarray(x), sizes.prompts, self.shards) for x in self.slot_map[:2]
        ]
        self.slot_map = SlotMap(*map(np.array, prompts), *self.slot_map[2:])

    def move(self, to: dict[int, int], slots: int, prompts: int) -> None:
        """Another number of slots, in which `to` says where each started one goes, and of prompt
        slots, in which the first two of each shard change places."""
        per_shard, old_map, K = slots // self.shards, self.slot_map, self.num_samples
        from_B, prompt_row_B, own_B = np.zeros((3, slots), np.int32)
        from_UP = np.zeros((self.shards, prompts // self.shards), np.int32)
        from_UP[:, 0] = 1
        length_UP = old_map.prompt_length_P.reshape(self.shards, -1)
        slots_PK = np.zeros((prompts, K), np.int32)
        for old, new in to.items():
            from_B[new] = old % (self.slots // self.shards)
            own_B[new] = old_map.own_length_B[old]
            prompt, row = divmod(int(old_map.prompt_row_B[old]), K)
            prompt_row_B[new] = (1 - prompt) * K + row
            slots_PK[new // per_shard * (prompts // self.shards) + 1 - prompt, row] = (
                new % per_shard
            )
        froms = jnp.asarray(from_B.reshape(self.shards, -1)), jnp.asarray(from_UP)
        self.layer = self._placed(jax.jit(self.cache.move_slots)(self.layer, *froms))
        length_P = np.take_along_axis(length_UP, from_UP, axis=1).reshape(-1)
        self.slot_map = SlotMap(length_P, slots_PK, prompt_row_B, own_B)
        self.seen, self.slots = {new: self.seen[old] for old, new in to.items()}, slots
        self._programs.clear()

    def assert_reads(self, tolerance: float = 0.0) -> None:
        """Everything that the started slots have seen can be read, in order of position."""
        slots = sorted(self.seen)
        slot_R, slot_map = jnp.asarray(slots), jax.tree.map(jnp.asarray, self.slot_map)
        k, v = jax.jit(self.cache.read)(self.layer, slot_map, slot_R)
        own_R = slot_map.own_length_B[slot_R]
        positions, valid = self.cache.read_positions(slot_map, self.layer.sizes, slot_R, own_R)
        for r, slot in enumerate(slots):
            held = np.asarray(valid[r])
            expected_k, expected_v = self.seen[slot]
            np.testing.assert_array_equal(positions[r][held], np.arange(len(expected_k)))
            for actual, expected in ((k, expected_k), (v, expected_v)):
                actual = np.asarray(actual[r], np.float64)[held]
                np.testing.assert_allclose(actual, expected, atol=tolerance, rtol=0)


def plain_attention(
    q_HGd: np.ndarray, k_THd: np.ndarray, v_THd: np.ndarray, window: int | None
) -> np.ndarray:
    """softmax(q k / sqrt(d)) v over the last `window` tokens, in float64."""
    first = 0 if window is None else max(0, len(k_THd) - window)
    q, k, v = (np.asarray(x, np.float64) for x in (q_HGd, k_THd[first:], v_THd[first:]))
    scores = np.einsum("hgd,thd->hgt", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("hgt,thd->hgd", weights / weights.sum(-1, keepdims=True), v)


def close(actual: np.ndarray, expected: np.ndarray, tolerance: float) -> None:
    """Within `tolerance` of the largest value."""
    error, scale = np.abs(actual - expected).max(), np.abs(expected).max()
    assert error <= tolerance * scale, f"{error} of {scale}"


def busy_world(cache: KVCache, sizes: Sizes, longest: int, **options: Any) -> World:
    """Every shard: a prompt with several slots, one with a single slot, and free prompt slots."""
    world = World(cache, sizes, **options)
    per_shard, prompts = world.slots // world.shards, sizes.prompts // world.shards
    lengths = (longest, longest // 2 + 1, 1)
    for shard in range(world.shards):
        slot, prompt = shard * per_shard, shard * prompts
        world.insert(prompt, lengths[shard % 3], [slot + 1, slot + 3])
        world.insert(prompt + 1, lengths[(shard + 1) % 3], [slot])
    return world


def check_resizing(world: World, many_sizes: Sequence[Sizes], prompt_tokens: int) -> None:
    """Each step after another resize is right, and a prompt fits into the last prompt slot."""
    for sizes in many_sizes:
        world.step()
        world.resize(sizes)
        assert world.layer.sizes == sizes
        close(*world.step(), tolerance=1e-5)
    world.insert(many_sizes[-1].prompts - 1, prompt_tokens, [4])
    close(*world.step(), tolerance=1e-5)
    world.assert_reads()


def check_moving_slots(world: World) -> None:
    """From 8 slots to 6 and to 12, and to 4 and 8 prompt slots, of two shards."""
    world.step()
    for to, slots, prompts in (
        ({0: 0, 1: 1, 3: 2, 4: 3, 5: 5, 7: 4}, 6, 4),
        ({0: 4, 2: 1, 3: 11, 5: 6}, 12, 8),
    ):
        world.move(to, slots, prompts)
        world.step([to[0]])
        close(*world.step(), tolerance=1e-5)
    world.assert_reads()
