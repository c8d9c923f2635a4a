"""The update: non-finite gradients are skipped, and meshes change nothing."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nrt_jax.checkpoints.train_state import init_state, state_shardings
from nrt_jax.config.mesh import MeshConfig, parse_mesh
from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.models.sharding import batch_sharding, make_mesh, param_shardings
from nrt_jax.training.frozen_logprobs import FrozenLogprobs
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.update import Metrics, Update, UpdateRule
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
    update = Update(linear_loss, UpdateRule(optimizer, shardings))
    state = init_state(optimizer, params, shardings)
    good, bad = jnp.ones(2), jnp.asarray([1.0, np.nan])
    state, _ = update(state, [good])
    before = jax.device_get((state.params, state.opt_state))
    for expected in (1, 2):
        state, metrics = update(state, [bad])
        assert (int(metrics["update/skipped_in_row"]), int(state.skipped)) == (expected, expected)
        after = jax.device_get((state.params, state.opt_state))
        for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
            np.testing.assert_array_equal(old, new)
    state, metrics = update(state, [good])
    assert int(metrics["update/skipped_in_row"]) == 0
    assert (int(state.skipped), int(state.updates)) == (2, 4)
    assert not np.array_equal(before[0]["w"], state.params["w"])


def two_steps(mesh, layout: Layout):
    """Weights after two NRT updates on a mesh, and the losses."""
    settings = worlds.settings(DEFINITION)
    # A copy: the update consumes its state.
    params = jax.tree.map(jnp.copy, PARAMS)
    params = jax.device_put(params, param_shardings(mesh, worlds.abstract_state()))
    optimizer = make_optimizer(OptimizerConfig(learning_rate=1e-3), updates=2)
    shardings = state_shardings(optimizer, params, mesh)

    def loss_fn(params, batch):
        return nrt_loss(params, *batch, sequences=16, settings=settings)

    update, packer = Update(loss_fn, UpdateRule(optimizer, shardings)), Packer(layout)
    state = init_state(optimizer, params, shardings)
    losses = []
    for seed in (0, 1):
        batches = worlds.batches_of(worlds.random_groups(8, 2, seed), packer)
        batches = [(batch, FrozenLogprobs()) for batch in batches]
        state, metrics = update(state, jax.device_put(batches, batch_sharding(mesh)))
        losses.append(float(metrics["loss/total"]))
    return jax.device_get(state.params), losses


@cache
def two_steps_on_one_device():
    return two_steps(one_device(), Layout(8, packing=False))


MESHES = {
    "data=8": (8, False),
    "data=8 packed": (8, True),
    "fsdp=2": (4, True),
    "tensor=2": (4, True),
    "data=2,fsdp=2,tensor=2": (4, True),
    "fsdp=2,context=2,tensor=2": (2, True),
    "context=8": (8, False),
}
# The others are parts of these, or more devices on one axis.
QUICK = {"data=2,fsdp=2,tensor=2", "fsdp=2,context=2,tensor=2"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in MESHES],
)
def test_a_mesh_changes_neither_loss_nor_weights(name):
    micro_batch, packing = MESHES[name]
    expected, expected_losses = two_steps_on_one_device()
    sizes = parse_mesh(name.removesuffix(" packed"))
    count = sizes.data * sizes.fsdp * sizes.tensor * sizes.context
    mesh = make_mesh(sizes, jax.devices()[:count])
    layout = Layout(micro_batch, sizes.data * sizes.fsdp, sizes.context, packing=packing)
    weights, losses = two_steps(mesh, layout)
    np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
    for old, new in zip(jax.tree.leaves(expected), jax.tree.leaves(weights), strict=True):
        # Adam divides by the root of a tiny second moment: rounding grows to a share of the step.
        np.testing.assert_allclose(new, old, atol=1e-5)
