"""The XLA form of the cache against float64 attention over plain lists of keys and values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.engine.kv_cache import KVCache, Sizes, Stored, store
from tests.engine.cached_world import (
    World,
    busy_world,
    check_moving_slots,
    check_resizing,
    close,
)
from tests.models.tiny import mesh

SIZES = Sizes(prompts=8, prompt_tokens=32, own_tokens=16)
MESHES = [{}, {"data": 2}, {"data": 2, "fsdp": 2}, {"data": 2, "tensor": 2}]


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("window", [None, 5, 20])
def test_attention_is_the_softmax_over_prompt_and_own_tokens(axes, window):
    world = busy_world(KVCache(mesh(**axes), window), SIZES, longest=29, slots=16, window=window)
    for _ in range(16):
        close(*world.step(), tolerance=1e-5)
    world.assert_reads()


def test_slots_that_are_not_active_keep_their_cache():
    world = busy_world(KVCache(mesh(data=2)), SIZES, longest=32)
    for active in ([0, 1, 3], [1, 4, 5], [0, 1, 5, 7], [7]):
        close(*world.step(active), tolerance=1e-5)
    world.assert_reads()


def test_a_new_prompt_and_its_slots_leave_the_others_alone():
    world = busy_world(KVCache(mesh(data=2)), SIZES, longest=32)
    for _ in range(3):
        world.step()
    del world.seen[1], world.seen[3]
    world.insert(0, 7, [3, 2])
    for _ in range(3):
        close(*world.step(), tolerance=1e-5)
    world.assert_reads()


def test_caches_grow_and_shrink_around_their_contents():
    world = busy_world(KVCache(mesh(data=2)), SIZES, longest=32)
    many_sizes = (
        SIZES._replace(prompts=12),
        SIZES._replace(prompts=12, prompt_tokens=64),
        Sizes(12, 64, 64),
        Sizes(12, 64, 16),
    )
    check_resizing(world, many_sizes, prompt_tokens=60)


def test_slots_move_with_their_tokens_to_more_or_fewer_slots():
    world = busy_world(KVCache(mesh(data=2)), SIZES, longest=32)
    check_moving_slots(world)


def test_a_prompt_takes_the_same_memory_for_any_number_of_samples():
    cache = KVCache(mesh())
    shared = World(cache, Sizes(1, 1024, 32), slots=8, num_samples=8)
    copied = World(cache, Sizes(8, 1024, 32), slots=8, num_samples=1)
    prompt, own = (2 * 4 * 2 * 16 * tokens for tokens in (1024, 32))  # keys and values, float32
    bytes_of = lambda world: sum(x.nbytes for x in jax.tree.leaves(world.layer))  # noqa: E731
    assert bytes_of(shared) == prompt + 8 * own
    assert bytes_of(copied) == 8 * prompt + 8 * own


def test_bfloat16_keys_and_values_are_rounded_and_nothing_else_is():
    world = busy_world(KVCache(mesh()), SIZES, longest=29, dtype=jnp.bfloat16)
    for _ in range(8):
        close(*world.step(), tolerance=2e-2)
    world.assert_reads(tolerance=4 * 2**-8)


def test_int8_is_off_by_half_a_step_of_the_largest_value_at_most():
    x = np.random.default_rng(0).normal(size=(5, 3, 64)).astype(np.float32)
    x[0, 0] = 0
    like = Stored(jnp.zeros((5, 3, 64), jnp.int8), jnp.ones((5, 3)))
    stored = store(jnp.asarray(x), like)
    assert stored.values.dtype == jnp.int8
    read = np.asarray(stored.values, np.float64) * np.asarray(stored.scale, np.float64)[..., None]
    step = np.abs(x).max(-1, keepdims=True) / 127
    assert (np.abs(read - x) <= 0.5001 * step).all()
    assert np.abs(np.asarray(stored.values)).max(-1)[1:].min() == 127


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_int8_attention_is_near_that_of_float32(axes):
    world = busy_world(KVCache(mesh(**axes)), SIZES, longest=29, slots=16, dtype=jnp.int8)
    for _ in range(12):
        close(*world.step(), tolerance=3e-2)
    world.resize(Sizes(8, 64, 32))
    close(*world.step(), tolerance=3e-2)
    world.assert_reads(tolerance=5 / 254)
    sizes = [x.nbytes for x in jax.tree.leaves(world.layer)]
    assert sum(sizes) == 2 * 2 * (8 * 64 + 16 * 32) * (16 + 4)
