"""Memory of a device: what is told of it, moments on the hosts, and the message when it is full."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState, abstract_state, init_state, state_shardings
from nrt_jax.config.checkpoint import CheckpointConfig
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.errors import RunFailed
from nrt_jax.models.sharding import batch_sharding, make_mesh, param_shardings
from nrt_jax.training.frozen_logprobs import FrozenLogprobs
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.memory import (
    ACTIVATIONS,
    GRADIENT,
    MOMENTS,
    WEIGHTS,
    DeviceMemory,
    bytes_per_device,
    gibibytes,
)
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.update import Update, UpdateRule
from tests.training import worlds

DEFINITION, PARAMS = worlds.tiny_decoder()
COUNT = sum(weight.size for weight in jax.tree.leaves(PARAMS))
OPTIMIZER = make_optimizer(OptimizerConfig(learning_rate=1e-3), updates=3)


def shardings_on(offload: bool = False, **axes: int) -> TrainState:
    mesh = make_mesh(MeshConfig(**axes), jax.devices()[: int(np.prod(list(axes.values())))])
    target = jax.tree.map(
        lambda weight, sharding: jax.ShapeDtypeStruct(
            weight.shape, weight.dtype, sharding=sharding
        ),
        PARAMS,
        param_shardings(mesh, worlds.abstract_state()),
    )
    return state_shardings(OPTIMIZER, target, mesh, offload=offload)


def first_state(shardings: TrainState) -> TrainState:
    params = jax.device_put(jax.tree.map(jnp.copy, PARAMS), shardings.params)
    return init_state(OPTIMIZER, params, shardings)


def after_updates(state: TrainState, shardings: TrainState, seeds) -> TrainState:
    settings = worlds.settings(DEFINITION)

    def loss_fn(params, batch):
        return nrt_loss(params, *batch, sequences=16, settings=settings)

    update = Update(loss_fn, UpdateRule(OPTIMIZER, shardings))
    mesh = jax.tree.leaves(shardings.params)[0].mesh
    layout = Layout(8, mesh.shape["data"] * mesh.shape["fsdp"], mesh.shape["context"])
    for seed in seeds:
        batches = worlds.batches_of(worlds.random_groups(8, 2, seed), Packer(layout))
        batches = [(batch, FrozenLogprobs()) for batch in batches]
        state, _ = update(state, jax.device_put(batches, batch_sharding(mesh)))
    return state


def abstract(shardings: TrainState) -> TrainState:
    target = jax.tree.map(
        lambda weight, s: jax.ShapeDtypeStruct(weight.shape, weight.dtype, sharding=s),
        PARAMS,
        shardings.params,
    )
    return abstract_state(OPTIMIZER, target, shardings)


def same(first, second, tolerance: float) -> None:
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=0, atol=tolerance)


def test_parts_are_those_of_one_device():
    whole = DeviceMemory(abstract(shardings_on(data=1))).parts
    assert whole[WEIGHTS] == whole[GRADIENT] == 4 * COUNT
    assert whole[MOMENTS] == pytest.approx(8 * COUNT, rel=0.01)
    split = DeviceMemory(abstract(shardings_on(fsdp=4))).parts
    # The scales of norms are on every device.
    assert whole[WEIGHTS] / 4 < split[WEIGHTS] < whole[WEIGHTS] / 3.7
    offloaded = DeviceMemory(abstract(shardings_on(offload=True, data=1))).parts
    assert offloaded[MOMENTS] < 100


def test_offloaded_moments_change_no_weight():
    kept, away = shardings_on(fsdp=2), shardings_on(offload=True, fsdp=2)
    first = after_updates(first_state(kept), kept, (0, 1))
    second = after_updates(first_state(away), away, (0, 1))
    moments = [leaf for leaf in jax.tree.leaves(second.opt_state) if leaf.ndim]
    assert {leaf.sharding.memory_kind for leaf in moments} == {"pinned_host"}
    assert bytes_per_device(second.opt_state) < 100
    same(first, second, 0)


def test_offloaded_moments_come_back_from_a_checkpoint(tmp_path):
    away, kept = shardings_on(offload=True, data=1), shardings_on(data=1)
    state = after_updates(first_state(away), away, (0,))
    checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig(), writable=True)
    checkpoints.save(1, state, {"step": 1}, {})
    checkpoints.close()
    for shardings, kind in ((away, "pinned_host"), (kept, "device")):
        restored = Checkpoints(tmp_path / "c", CheckpointConfig(), writable=False).restore_newest(
            abstract(shardings)
        )
        assert restored is not None
        same(restored.state, state, 0)
        moments = [leaf for leaf in jax.tree.leaves(restored.state.opt_state) if leaf.ndim]
        assert {leaf.sharding.memory_kind for leaf in moments} == {kind}


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_fewer_devices(tmp_path):
    """Updates on 8 devices and then on 1, with a checkpoint between, are two updates on one."""
    meshes = [{"data": 2, "fsdp": 2, "tensor": 2}, {"data": 1}]
    expected = shardings_on(data=1)
    expected = after_updates(first_state(expected), expected, range(2))
    state = first_state(shardings_on(**meshes[0]))
    for step, axes in enumerate(meshes):
        shardings = shardings_on(**axes)
        if step:
            checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig(), writable=False)
            restored = checkpoints.restore_newest(abstract(shardings))
            assert restored is not None
            assert restored.step == step
            same(restored.state, state, 0)
            state = restored.state
        state = after_updates(state, shardings, (step,))
        checkpoints = Checkpoints(tmp_path / "c", CheckpointConfig(), writable=True)
        checkpoints.save(step + 1, state, {"step": step + 1}, {})
        checkpoints.close()
    same(state.params, expected.params, 1e-5)


def test_programs_are_told_of_once_with_what_they_take(caplog):
    shardings = shardings_on(data=1)
    memory = DeviceMemory(abstract(shardings))
    update = Update(
        lambda params, batch: nrt_loss(
            params, *batch, sequences=16, settings=worlds.settings(DEFINITION)
        ),
        UpdateRule(OPTIMIZER, shardings),
        memory.add_program,
    )
    batch = (worlds.random_batch(4, 2), FrozenLogprobs())
    state = first_state(shardings)
    with caplog.at_level(logging.INFO, logger="nrt_jax.training.memory"):
        for _ in range(2):
            state, _ = update(state, [batch, batch])
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "a micro-batch, program 1",
        "the update, program 2",
    ]
    assert memory.parts[ACTIVATIONS] > 0
    assert gibibytes(memory.parts[ACTIVATIONS]) in caplog.text


@pytest.mark.parametrize(
    ("largest", "remedy"),
    [
        (WEIGHTS, "mesh.fsdp or mesh.tensor"),
        (MOMENTS, "optimizer.offload=true"),
        (GRADIENT, "mesh.fsdp or mesh.tensor"),
        (ACTIVATIONS, "lower train.micro_batch_prompts"),
    ],
)
def test_a_full_device_is_one_line_with_the_largest_part_and_a_remedy(largest, remedy):
    memory = DeviceMemory(abstract(shardings_on(data=1)))
    memory.parts[largest] = 3 * 2**30
    with pytest.raises(RunFailed) as failure, memory.explained():
        jnp.zeros(2**45).block_until_ready()  # no machine has 128 TiB
    message = str(failure.value)
    assert "\n" not in message
    assert f"out of memory: the largest part of a device's memory is {largest} (" in message
    assert f"{largest} 3.00 GiB" in message
    assert remedy in message


def test_other_errors_stay_what_they_are():
    memory = DeviceMemory(abstract(shardings_on(data=1)))
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), memory.explained():
        raise jax.errors.JaxRuntimeError("INTERNAL: boom")
