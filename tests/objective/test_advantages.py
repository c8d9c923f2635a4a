"""Advantages of a group: hand constants, the oracle, and groups with nothing to compare."""

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from nrt_jax.objective.advantages import ESTIMATORS, advantages, zero_std
from tests.objective import oracle

REWARD = np.array([[0.0, 1.0, 2.0, 5.0]], np.float32)
BASELINE = np.array([1.0], np.float32)
# R' = 0, 0, 1, 4: mean 5/4, population variance 17/4 - 25/16 = 43/16. R: mean 2, variance 7/2.
BY_HAND = [
    ("grpo", (np.array([0, 0, 1, 4]) - 1.25) / np.sqrt(43 / 16)),
    ("grpo_unclipped", (np.array([0, 1, 2, 5]) - 2) / np.sqrt(3.5)),
    ("rloo", [-8 / 3, -4 / 3, 0, 4]),
    ("clip01", [0, 0, 1, 1]),
    ("dr_grpo", [-1.25, -1.25, -0.25, 2.75]),
]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_estimator_has_hand_constants(estimator):
    assert estimator in dict(BY_HAND)


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(("estimator", "expected"), BY_HAND)
def test_hand_constants(estimator, expected, jitted):
    def function(reward, baseline):
        return advantages(reward, baseline, estimator=estimator)

    got = (jax.jit(function) if jitted else function)(REWARD, BASELINE)
    np.testing.assert_allclose(got[0], expected, rtol=1e-6, atol=1e-6)


# Multiples of 1/64: a difference is then exactly 0 or far above rounding.
grid = st.integers(-128, 128).map(lambda n: n / 64)


@settings(max_examples=80, deadline=None)
@given(
    reward=hnp.arrays(np.float32, st.tuples(st.just(3), st.sampled_from([1, 2, 5])), elements=grid),
    baseline=hnp.arrays(np.float32, 3, elements=grid),
    estimator=st.sampled_from(list(ESTIMATORS)),
)
def test_agrees_with_the_oracle(reward, baseline, estimator):
    got = advantages(reward, baseline, estimator=estimator)
    for p in range(3):
        expected = oracle.advantages(reward[p].tolist(), float(baseline[p]), estimator)
        np.testing.assert_allclose(got[p], expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("estimator", ["grpo", "grpo_unclipped"])
@pytest.mark.parametrize("size", [1e-30, 1.0, 1e30])
def test_mean_zero_and_population_variance_one_at_any_size(estimator, size):
    reward = np.random.default_rng(0).random((16, 8)).astype(np.float32) * np.float32(size)
    got = advantages(reward, np.zeros(16, np.float32), estimator=estimator)
    np.testing.assert_allclose(got.mean(axis=1), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(got, axis=1), 1, rtol=1e-5)


def test_groups_are_independent():
    reward = np.array([[0.0, 1.0], [100.0, 300.0]], np.float32)
    got = advantages(reward, np.zeros(2, np.float32), estimator="grpo")
    np.testing.assert_allclose(got, [[-1, 1], [-1, 1]], rtol=1e-6)


@pytest.mark.parametrize("estimator", ["grpo", "grpo_unclipped"])
def test_rounding_noise_is_not_scaled_up(estimator):
    noisy = 0.7 * (1 + 1e-7 * np.arange(8, dtype=np.float32)[None])
    assert np.ptp(noisy) > 0
    equal = np.full((1, 8), 0.7, np.float32)
    # Just below the rewards the noise is large beside R', and yet it is noise of R.
    baseline = np.array([0.6999], np.float32)
    for reward in (noisy.astype(np.float32), equal):
        got = advantages(reward, baseline, estimator=estimator)
        np.testing.assert_array_equal(got, np.zeros((1, 8)))
        assert zero_std(reward, baseline, estimator).all()
    apart = equal + np.float32(1e-5) * np.arange(8, dtype=np.float32)
    assert not zero_std(apart, baseline, estimator).any()


def test_rounding_of_the_gain_over_a_far_baseline_is_noise_too():
    reward, baseline = np.array([[0, 4e-5]], np.float32), np.array([-1000], np.float32)
    np.testing.assert_array_equal(advantages(reward, baseline, estimator="grpo"), [[0, 0]])


def test_zero_std_is_judged_after_clipping():
    below = np.array([[0.1, 0.2, 0.3]], np.float32)
    baseline = np.array([0.5], np.float32)
    np.testing.assert_array_equal(advantages(below, baseline, estimator="grpo"), [[0, 0, 0]])
    names = ("grpo", "grpo_unclipped", "rloo", "clip01", "dr_grpo")
    zero = {name: bool(zero_std(below, baseline, name)[0]) for name in names}
    assert zero == {
        "grpo": True,
        "grpo_unclipped": False,
        "rloo": False,
        "clip01": True,
        "dr_grpo": True,
    }


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_one_trace_per_prompt(estimator):
    got = advantages(
        np.array([[0.9]], np.float32), np.array([0.4], np.float32), estimator=estimator
    )
    np.testing.assert_allclose(got, [oracle.advantages([0.9], 0.4, estimator)], rtol=1e-6)


def test_one_trace_per_prompt_has_nothing_to_compare_with():
    one = np.array([[0.9]], np.float32), np.array([0.4], np.float32)
    for estimator in ("grpo", "grpo_unclipped", "rloo", "dr_grpo"):
        np.testing.assert_array_equal(advantages(*one, estimator=estimator), [[0]])
    np.testing.assert_allclose(advantages(*one, estimator="clip01"), [[0.5]], rtol=1e-6)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradient_of_a_zero_std_group_is_finite(estimator):
    reward = jnp.zeros((2, 4))
    gradient = jax.grad(lambda r: advantages(r, jnp.zeros(2), estimator=estimator)[0, 0])(reward)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_nan_reward_is_not_hidden(estimator):
    reward = np.array([[0.0, np.nan, 1.0]], np.float32)
    got = advantages(reward, np.zeros(1, np.float32), estimator=estimator)
    assert np.isnan(got).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_float32_at_least_and_float64_kept(estimator, x64):
    half = advantages(REWARD.astype(jnp.bfloat16), BASELINE, estimator=estimator)
    double = advantages(REWARD.astype(np.float64), BASELINE.astype(np.float64), estimator=estimator)
    assert (half.dtype, double.dtype) == (jnp.float32, jnp.float64)


def test_unknown_estimator_lists_the_known_ones():
    for function in (lambda **k: advantages(REWARD, BASELINE, **k), zero_std):
        arguments = {"estimator": "gropo"}
        if function is zero_std:
            arguments |= {"reward_PK": REWARD, "baseline_P": BASELINE}
        with pytest.raises(ValueError, match=f"'gropo'.*{', '.join(ESTIMATORS)}"):
            function(**arguments)
