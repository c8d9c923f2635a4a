"""The parameter groups of the warm-up, against optax run by hand on each group alone."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.training.optimizer import make_optimizer, make_schedule
from nrt_jax.training.warmup_optimizer import SCHEDULED, Rates, only_rows, warmup_optimizer

CONFIG = OptimizerConfig(
    beta1=0.6, beta2=0.9, epsilon=0.05, weight_decay=0.3, clip_norm=0.5, schedule="cosine"
)
TOKENS = (1, 3)
RATES = Rates(rows=0.1, others=0.01)


SCHEDULE = make_schedule(CONFIG, 10)


def trees(seed: int, scale: float, tied: bool) -> dict:
    rng = np.random.default_rng(seed)
    tree = {
        "embedding": jnp.asarray(scale * rng.normal(size=(5, 2)), jnp.float32),
        "layers": {"scale": jnp.asarray(scale * rng.normal(size=3), jnp.float32)},
    }
    if not tied:
        tree["head"] = jnp.asarray(scale * rng.normal(size=(2, 5)), jnp.float32)
    return tree


def rows_of(tree: dict) -> dict:
    """The group of the rows, as a tree of its own."""
    group = {"embedding": tree["embedding"][jnp.asarray(TOKENS)]}
    return group | ({"head": tree["head"][:, jnp.asarray(TOKENS)]} if "head" in tree else {})


def others_of(tree: dict) -> dict:
    rest = jnp.asarray([0, 2, 4])
    group = {"embedding": tree["embedding"][rest], "layers": tree["layers"]}
    return group | ({"head": tree["head"][:, rest]} if "head" in tree else {})


def by_hand(group_of, rate: float, gradients: list[dict], params: dict) -> Any:
    """One group, trained by itself."""
    adamw = optax.adamw(
        rate,
        b1=0.6,
        b2=0.9,
        eps=0.05,
        weight_decay=0.3,
        mask=lambda tree: jax.tree_util.tree_map_with_path(lambda p, _: p[-1].key != "scale", tree),
    )
    optimizer = optax.chain(optax.clip_by_global_norm(0.5), adamw)
    weights = group_of(params)
    state = optimizer.init(weights)
    for gradient in gradients:
        changes, state = optimizer.update(group_of(gradient), state, weights)
        weights = optax.apply_updates(weights, changes)
    return weights


@pytest.mark.parametrize("tied", [True, False])
def test_each_group_is_clipped_and_updated_by_itself(tied):
    params = trees(0, 1.0, tied)
    gradients = [trees(seed, scale, tied) for seed, scale in ((1, 9.0), (2, 0.01), (3, 1.0))]
    # The rows' gradient is far above the others': one norm for both would stop the others.
    for gradient in gradients:
        at = jnp.asarray(TOKENS)
        gradient["embedding"] = gradient["embedding"].at[at].multiply(100.0)
    optimizer = warmup_optimizer(CONFIG, SCHEDULE, TOKENS)
    weights, state = params, optimizer.init(params)
    for gradient in gradients:
        changes, state = jax.jit(optimizer.update)(gradient, state, weights, rates=RATES)
        weights = optax.apply_updates(weights, changes)
    for group_of, rate in ((rows_of, RATES.rows), (others_of, RATES.others)):
        expected = by_hand(group_of, rate, gradients, params)
        mine = group_of(weights)
        for name, leaf in expected.items():
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5), mine[name], leaf)


def test_a_rate_of_0_changes_no_bit():
    params = trees(0, 1.0, tied=False)
    optimizer = warmup_optimizer(CONFIG, SCHEDULE, TOKENS)
    rates, state = Rates(rows=0.1, others=0.0), optimizer.init(params)
    changes, _ = optimizer.update(trees(1, 5.0, tied=False), state, params, rates=rates)
    after = optax.apply_updates(params, changes)
    for old, new in zip(
        jax.tree.leaves(others_of(params)), jax.tree.leaves(others_of(after)), strict=True
    ):
        np.testing.assert_array_equal(old, new)
    for old, new in zip(
        jax.tree.leaves(rows_of(params)), jax.tree.leaves(rows_of(after)), strict=True
    ):
        assert (np.asarray(old) != np.asarray(new)).all()


@pytest.mark.parametrize("clip_norm", [0.5, None])
def test_the_state_has_the_structure_of_the_runs_own(clip_norm):
    config = CONFIG.model_copy(update={"clip_norm": clip_norm})
    params = trees(0, 1.0, tied=False)
    mine = warmup_optimizer(config, SCHEDULE, TOKENS).init(params)
    theirs = make_optimizer(config, 10).init(params)
    assert jax.tree.structure(mine) == jax.tree.structure(theirs)


def test_without_a_clip_the_gradient_is_taken_whole():
    config = CONFIG.model_copy(update={"clip_norm": None})
    params, gradient = trees(0, 1.0, tied=True), trees(1, 50.0, tied=True)
    optimizer = warmup_optimizer(config, SCHEDULE, TOKENS)
    state, rates = optimizer.init(params), Rates(1.0, 1.0)
    changes, _ = optimizer.update(gradient, state, params, rates=rates)
    plain = make_optimizer(config.model_copy(update={"learning_rate": 1.0}), 1)
    expected, _ = plain.update(gradient, plain.init(params), params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), changes, expected)


@pytest.mark.parametrize("clip_norm", [0.5, None])
def test_after_the_warmup_the_update_is_the_runs_own(clip_norm):
    """To the bit, along the schedule, with gradients that are clipped and others that are not."""
    config = CONFIG.model_copy(update={"clip_norm": clip_norm})
    params = trees(0, 1.0, tied=False)
    mine = warmup_optimizer(config, make_schedule(config, 3), TOKENS)
    theirs = make_optimizer(config, 3)
    state, expected = mine.init(params), theirs.init(params)
    for seed, scale in ((1, 9.0), (2, 0.01), (3, 1.0)):
        gradient = trees(seed, scale, tied=False)
        changes, state = mine.update(gradient, state, params, rates=SCHEDULED)
        by_theirs, expected = theirs.update(gradient, expected, params)
        jax.tree.map(np.testing.assert_array_equal, changes, by_theirs)
        jax.tree.map(np.testing.assert_array_equal, state, expected)


def test_only_embedding_and_head_have_a_gradient():
    params = trees(0, 1.0, tied=False)
    gradient = jax.grad(lambda p: sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(only_rows(p))))(
        params
    )
    assert not gradient["layers"]["scale"].any()
    assert gradient["embedding"].all()
    assert gradient["head"].all()
