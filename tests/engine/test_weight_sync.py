"""The training's weights in an engine's hands: by reference, on another mesh, in another dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.engine.weight_sync import WeightTransfer
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params, make_mesh
from tests.models.tiny import architecture, decoder

A = architecture(vocab_size=64, num_attention_heads=4, num_key_value_heads=2)
STOPS = frozenset({7, 30, 60})


def mesh(data: int = 1, fsdp: int = 1, tensor: int = 1, first: int = 0) -> Mesh:
    devices = jax.devices()[first : first + data * fsdp * tensor]
    return make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), devices)


def target(mesh: Mesh, dtype: Any = jnp.float32) -> dict:
    return abstract_params(mesh, abstract_decoder(A), dtype)


def params(mesh: Mesh, scale: float = 1.0) -> dict:
    weights = nnx.to_pure_dict(nnx.split(decoder(A))[1])
    placed = jax.device_put(weights, jax.tree.map(lambda leaf: leaf.sharding, target(mesh)))
    return jax.tree.map(lambda weight: weight * scale, placed)


def buffers(tree: Any) -> set[int]:
    """Addresses of the shards on the devices."""
    shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
    return {shard.data.unsafe_buffer_pointer() for shard in shards}


def assert_equal(moved: Any, weights: Any) -> None:
    for mine, theirs in zip(jax.tree.leaves(moved), jax.tree.leaves(weights), strict=True):
        np.testing.assert_array_equal(np.asarray(mine), np.asarray(theirs))


def assert_placed(moved: Any, target: Any) -> None:
    for mine, wanted in zip(jax.tree.leaves(moved), jax.tree.leaves(target), strict=True):
        assert (mine.dtype, mine.sharding) == (wanted.dtype, wanted.sharding)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (1, 8, 1), (2, 2, 2)], ids=str)
def test_where_all_agrees_they_are_the_very_same_arrays(sizes):
    weights = params(mesh(*sizes))
    moved = WeightTransfer(target(mesh(*sizes)))(weights, 3)
    pairs = zip(jax.tree.leaves(moved.params), jax.tree.leaves(weights), strict=True)
    assert all(mine is theirs for mine, theirs in pairs)
    assert moved.version == 3
    assert moved.metrics["weights/bytes"] == 0


def test_another_mesh_of_the_same_devices():
    weights, wanted = params(mesh(fsdp=8)), target(mesh(data=4, tensor=2))
    transfer = WeightTransfer(wanted)
    moved = transfer(weights, 0)
    assert_equal(moved.params, weights)
    assert_placed(moved.params, wanted)
    size = sum(4 * leaf.size for leaf in jax.tree.leaves(weights))
    assert moved.metrics["weights/bytes"] == size
    assert moved.metrics["weights/seconds"] > 0
    transfer(params(mesh(fsdp=8), 2.0), 1)
    assert transfer._reshard_and_cast._cache_size() == 1, "one program for all updates"
    assert transfer._cast_in_place._cache_size() == 0


def test_a_cast_rounds_each_weight_once():
    weights, wanted = params(mesh(fsdp=2)), target(mesh(fsdp=2), jnp.bfloat16)
    moved = WeightTransfer(wanted)(weights, 0)
    assert_placed(moved.params, wanted)
    assert_equal(moved.params, jax.tree.map(lambda w: np.asarray(w).astype(jnp.bfloat16), weights))
    size = sum(2 * leaf.size for leaf in jax.tree.leaves(weights))
    assert moved.metrics["weights/bytes"] == size


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_devices_of_their_own(dtype):
    """The cast comes first, so that half as much is copied."""
    weights, wanted = params(mesh(fsdp=4)), target(mesh(data=2, tensor=2, first=4), dtype)
    transfer = WeightTransfer(wanted)
    moved = transfer(weights, 0)
    assert_placed(moved.params, wanted)
    assert_equal(moved.params, jax.tree.map(lambda w: np.asarray(w).astype(dtype), weights))
    assert transfer._cast_in_place._cache_size() == (dtype == jnp.bfloat16)
    assert transfer._reshard_and_cast._cache_size() == 0


@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1, 1), (1, 1, 1)), ((1, 8, 1), (1, 8, 1)), ((1, 8, 1), (4, 1, 2))],
    ids=str,
)
def test_a_snapshot_outlives_the_update_that_consumes_the_weights(before, after):
    weights = params(mesh(*before))
    copies = jax.tree.map(np.asarray, jax.tree.map(jnp.copy, weights))
    moved = WeightTransfer(target(mesh(*after)), outlives_update=True)(weights, 0)
    assert not buffers(moved.params) & buffers(weights)
    jax.jit(lambda w: jax.tree.map(lambda x: x + 1, w), donate_argnums=0)(weights)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(weights))
    assert_equal(moved.params, copies)


def engine(mesh: Mesh, dtype: Any = jnp.float32) -> Engine:
    return Engine(
        nnx.split(decoder(A, dtype=dtype))[0],
        A,
        mesh,
        slots=8,
        max_prompt_tokens=8,
        max_new_tokens=6,
        stop_ids=STOPS,
        dtype=dtype,
        num_samples=2,
    )


def draw(engine: Engine, params: Any) -> list[list[int]]:
    prompts = [np.asarray(row, np.int32) for row in ([1, 2, 3], [9, 8], [5, 5, 5, 5])]
    requests = [Request(prompt, index, 2, 6) for index, prompt in enumerate(prompts)]
    groups = generate(engine, params, requests, jax.random.key(0), steps=2)
    return [trace.tokens.tolist() for group in groups for trace in group]


@pytest.mark.parametrize(
    "theirs", [mesh(fsdp=8), mesh(data=4, tensor=2)], ids=["same mesh", "another mesh"]
)
def test_the_next_trace_is_of_the_updated_weights(theirs):
    """An engine that kept the weights it began with would repeat its first traces."""
    transfer, on_mesh, alone = WeightTransfer(target(theirs)), engine(theirs), engine(mesh())
    drawn = []
    for version, scale in enumerate((1.0, 1.5)):
        moved = transfer(params(mesh(fsdp=8), scale), version)
        drawn.append(draw(on_mesh, moved.params))
        assert drawn[-1] == draw(alone, params(mesh(), scale))
    assert drawn[0] != drawn[1]


def test_cast_weights_sample_what_the_cast_inside_the_decoder_samples():
    half = WeightTransfer(
        jax.tree_util.tree_map_with_path(
            lambda path, leaf: leaf if path[-1].key == "scale" else leaf.update(dtype=jnp.bfloat16),
            target(mesh()),
        )
    )(params(mesh()), 0)
    on_one = engine(mesh(), jnp.bfloat16)
    assert draw(on_one, half.params) == draw(on_one, params(mesh()))
