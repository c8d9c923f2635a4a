"""The update: non-finite gradients are skipped, meshes change nothing, the schedule is as said."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nrt_jax.models.sharding import MeshConfig, batch_sharding, make_mesh, param_shardings
from nrt_jax.training.config import OptimizerConfig
from nrt_jax.training.forward import SamplingScores
from nrt_jax.training.nrt_loss import nrt_loss
from nrt_jax.training.optimizer import make_optimizer, make_schedule
from nrt_jax.training.state import init_state, state_shardings
from nrt_jax.training.step import Metrics, make_update
from tests.training import worlds

DEFINITION, PARAMS = worlds.tiny_decoder()


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def linear_loss(params: Any, batch: Any) -> tuple[Any, Metrics]:
    loss = jnp.sum(params["w"] * batch.sum())
    return loss, Metrics({"loss/x": loss}, {}, {})


def test_a_gradient_that_is_not_finite_leaves_weights_and_moments_alone():
    params = jax.device_put({"w": jnp.ones(3)}, jax.sharding.SingleDeviceSharding(jax.devices()[0]))
    optimizer = optax.adam(0.1)
    mesh = one_device()
    shardings = state_shardings(optimizer, params, mesh)
    update = make_update(linear_loss, optimizer, 1, shardings)
    state = init_state(optimizer, params, shardings)
    good, bad = jnp.ones(2), jnp.asarray([1.0, np.nan])
    state, _ = update(state, good)
    before = jax.device_get((state.params, state.opt_state))
    for expected in (1, 2):
        state, metrics = update(state, bad)
        assert (int(metrics["update/skipped_in_row"]), int(state.skipped)) == (expected, expected)
        after = jax.device_get((state.params, state.opt_state))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old, new)
    state, metrics = update(state, good)
    assert int(metrics["update/skipped_in_row"]) == 0
    assert (int(state.skipped), int(state.updates)) == (2, 4)
    assert not np.array_equal(before[0]["w"], state.params["w"])


def two_steps(mesh, micro_count: int):
    """Weights after two NRT updates on a mesh."""
    settings = worlds.settings(DEFINITION)
    batches = [worlds.random_batch(8, 2, seed) for seed in (0, 1)]
    # A copy: the update consumes its state.
    params = jax.tree.map(jnp.copy, PARAMS)
    params = jax.device_put(params, param_shardings(mesh, worlds.abstract_state()))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-2), updates=2)
    shardings = state_shardings(optimizer, params, mesh)

    def loss_fn(params, batch):
        return nrt_loss(params, *batch, sequences=16, settings=settings)

    update = make_update(loss_fn, optimizer, micro_count, shardings)
    state = init_state(optimizer, params, shardings)
    losses = []
    for batch in batches:
        batch = jax.device_put((batch, SamplingScores()), batch_sharding(mesh))
        state, metrics = update(state, batch)
        losses.append(float(metrics["loss/total"]))
    return jax.device_get(state.params), losses


@pytest.mark.parametrize(
    ("sizes", "micro_count"),
    [((8, 1, 1), 1), ((1, 2, 1), 2), ((2, 2, 2), 2)],
    ids=lambda value: str(value),
)
def test_a_mesh_changes_neither_loss_nor_weights(sizes, micro_count):
    expected, expected_losses = two_steps(one_device(), 1)
    data, fsdp, tensor = sizes
    count = data * fsdp * tensor
    mesh = make_mesh(MeshConfig(data=data, fsdp=fsdp, tensor=tensor), jax.devices()[:count])
    weights, losses = two_steps(mesh, micro_count)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(weights), strict=True):
        # Adam divides by the root of a tiny second moment: rounding grows to a share of the step.
        np.testing.assert_allclose(new, old, atol=2e-4)


def test_schedules():
    config = OptimizerConfig(learning_rate=1.0, schedule="linear", warmup_ratio=0.2)
    rates = [float(make_schedule(config, 10)(i)) for i in range(11)]
    np.testing.assert_allclose(rates[:3], [0.5, 1.0, 1.0], rtol=1e-6)
    np.testing.assert_allclose(rates[-1], 0.0, atol=1e-6)
    constant = make_schedule(OptimizerConfig(learning_rate=0.5), 10)
    assert [float(constant(i)) for i in (0, 5, 99)] == [0.5, 0.5, 0.5]


def test_norm_scales_do_not_decay():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    params = {"norm": {"scale": jnp.ones(2)}, "embedding": jnp.ones((2, 2))}
    optimizer = make_optimizer(config, 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params)
    embedding, scale = jax.tree.leaves(changes)
    np.testing.assert_allclose(embedding, -0.05, rtol=1e-6)
    np.testing.assert_allclose(scale, 0)
