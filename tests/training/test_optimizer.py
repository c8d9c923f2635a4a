"""The update rule against AdamW written out in NumPy, and schedules against rates by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.config.train import TrainConfig
from nrt_jax.training.optimizer import make_optimizer, make_schedule

START = {"embedding": [[1.0, -2.0], [0.5, 0.25]], "norm": {"scale": [1.0, 2.0]}}
GRADIENTS = [
    {"embedding": [[0.3, -0.4], [0.0, 1.2]], "norm": {"scale": [0.5, -0.1]}},
    {"embedding": [[-0.01, 0.02], [0.03, 0.0]], "norm": {"scale": [0.02, 0.01]}},
    {"embedding": [[3.0, 1.0], [-2.0, 0.5]], "norm": {"scale": [-1.0, 4.0]}},
]
"""Norms of 1.4, 0.04 and 5.7: the second alone is below a clip of 0.5."""
CONFIG = OptimizerConfig(
    learning_rate=0.1,
    schedule="linear",
    beta1=0.6,
    beta2=0.95,
    # Large beside the gradients, so that it shows in every step.
    epsilon=0.05,
    weight_decay=0.3,
    clip_norm=0.5,
)
# Linear from 0.1 to 0 over the three updates.
RATES = [0.1, 0.1 * 2 / 3, 0.1 / 3]


def adamw_by_hand(clip_norm: float | None) -> dict[str, np.ndarray]:
    """Weights after the updates: Adam with bias correction, decay of `embedding` alone."""
    weights = {"embedding": np.array(START["embedding"]), "scale": np.array(START["norm"]["scale"])}
    mean = {name: np.zeros_like(w) for name, w in weights.items()}
    square = {name: np.zeros_like(w) for name, w in weights.items()}
    for i, (tree, rate) in enumerate(zip(GRADIENTS, RATES, strict=True), start=1):
        gradient = {"embedding": tree["embedding"], "scale": tree["norm"]["scale"]}
        norm = np.sqrt(sum(np.square(g).sum() for g in gradient.values()))
        factor = 1.0 if clip_norm is None else min(1.0, clip_norm / norm)
        for name, weight in weights.items():
            g = factor * np.asarray(gradient[name])
            mean[name] = 0.6 * mean[name] + 0.4 * g
            square[name] = 0.95 * square[name] + 0.05 * g**2
            first, second = mean[name] / (1 - 0.6**i), square[name] / (1 - 0.95**i)
            change = first / (np.sqrt(second) + 0.05)
            if name == "embedding":
                change = change + 0.3 * weight
            weights[name] = weight - rate * change
    return weights


@pytest.mark.parametrize("clip_norm", [0.5, None])
def test_updates_are_adamw_by_hand(clip_norm):
    optimizer = make_optimizer(CONFIG.model_copy(update={"clip_norm": clip_norm}), updates=3)
    as_arrays = {"is_leaf": lambda node: isinstance(node, list)}
    params = jax.tree.map(jnp.asarray, START, **as_arrays)
    state = optimizer.init(params)
    for tree in GRADIENTS:
        changes, state = optimizer.update(
            jax.tree.map(jnp.asarray, tree, **as_arrays), state, params
        )
        params = jax.tree.map(jnp.add, params, changes)
    expected = adamw_by_hand(clip_norm)
    np.testing.assert_allclose(params["embedding"], expected["embedding"], rtol=1e-5)
    np.testing.assert_allclose(params["norm"]["scale"], expected["scale"], rtol=1e-5)


# Rates of the first update, the middle one and the last, of ten updates with a peak of 2.
WITHOUT_WARMUP = {
    "constant": (2.0, 2.0, 2.0),
    "linear": (2.0, 1.0, 0.2),
    "cosine": (2.0, 1.0, 1 - np.cos(np.pi / 10)),
}
# After a warm-up of two updates, eight are left.
WITH_WARMUP = {
    "constant": (1.0, 2.0, 2.0, 2.0, 2.0),
    "linear": (1.0, 2.0, 2.0, 1.0, 0.25),
    "cosine": (1.0, 2.0, 2.0, 1.0, 1 - np.cos(np.pi / 8)),
}


@pytest.mark.parametrize("name", WITHOUT_WARMUP)
def test_schedules_at_the_first_middle_and_last_update(name):
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, schedule=name), 10)
    assert [float(rate(i)) for i in (0, 5, 9)] == pytest.approx(WITHOUT_WARMUP[name], rel=1e-5)
    rate = make_schedule(OptimizerConfig(learning_rate=2.0, schedule=name, warmup_ratio=0.2), 10)
    rates = [float(rate(i)) for i in (0, 1, 2, 6, 9)]
    assert rates == pytest.approx(WITH_WARMUP[name], rel=1e-5)


def test_a_schedule_ends_with_the_last_update_of_the_run():
    """Three steps of four mini-batches each are twelve updates."""
    train = TrainConfig(steps=3, batch_prompts=64, mini_batch_prompts=16, micro_batch_prompts=8)
    rate = make_schedule(OptimizerConfig(learning_rate=1.0, schedule="linear"), train.updates)
    assert [float(rate(i)) for i in (0, 6, 11, 12)] == pytest.approx([1, 1 / 2, 1 / 12, 0])


def test_norm_scales_do_not_decay():
    config = OptimizerConfig(learning_rate=0.1, weight_decay=0.5, clip_norm=None)
    params = {"norm": {"scale": jnp.ones(2)}, "embedding": jnp.ones((2, 2))}
    optimizer = make_optimizer(config, 1)
    zeros = jax.tree.map(jnp.zeros_like, params)
    changes, _ = optimizer.update(zeros, optimizer.init(params), params)
    embedding, scale = jax.tree.leaves(changes)
    np.testing.assert_allclose(embedding, -0.05, rtol=1e-6)
    np.testing.assert_allclose(scale, 0)
