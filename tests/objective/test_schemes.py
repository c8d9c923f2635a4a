"""Rewards, token signals and weights: hand constants, the oracle, and float64 derivatives."""

import math

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective import schemes
from nrt_jax.objective.rewards import compute_rewards
from nrt_jax.objective.schemes import (
    LARGEST_WEIGHT,
    WS_SCHEMES,
    rewards_of,
    spread_over_traces,
    spread_weights,
    ws_weights,
)
from tests.objective import oracle

# c = 1/2, 1/4 and c_base = 1/4, 1/2 by hand: log 2 and log 4 are the weights of ws_neg_log_p.
C = np.log(np.array([[0.5, 0.25]], np.float32))
C_BASE = np.log(np.array([[0.25, 0.5]], np.float32))
BOTH = np.ones((1, 2), bool)
L2 = math.log(2)
BY_HAND = [
    ("logp", "mean", -3 * L2, [1, 1]),
    ("p", "mean", 1 / 8, [1 / 8, 1 / 8]),
    ("gm", "mean", 8**-0.5, [8**-0.5 / 2, 8**-0.5 / 2]),
    ("am", "mean", 3 / 8, [1 / 4, 1 / 8]),
    ("ws_inv_p", "sum", 2.5, [2, 0.5]),
    ("ws_inv_p", "mean", 1.25, [1, 0.25]),
    ("ws_inv_p", "normalised", 2.5 / 6, [2 / 6, 0.5 / 6]),
    ("ws_neg_log_p", "sum", 1.25 * L2, [L2, 0.25 * L2]),
    ("ws_neg_log_p", "mean", 0.625 * L2, [L2 / 2, 0.125 * L2]),
    ("ws_neg_log_p", "normalised", 1.25 / 3, [1 / 3, 0.25 / 3]),
    ("r3", "mean", -4 / 3 * L2, [2 / 3, 1 / 3]),
]


def aggregate(scheme, log_c, log_c_base, mask, **how):
    """R and S, with spreads over the traces as large as the surprises after the empty trace."""
    how = {"spread_BT": jnp.abs(jnp.asarray(log_c_base)), **how}
    log_reward, signal = schemes.aggregate(scheme, log_c, log_c_base, mask, **how)
    return rewards_of(scheme, log_reward), signal


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_scheme_has_hand_constants(scheme):
    assert scheme in {row[0] for row in BY_HAND}


@pytest.mark.parametrize("jitted", [False, True])
@pytest.mark.parametrize(("scheme", "normalisation", "reward", "signal"), BY_HAND)
def test_hand_constants(scheme, normalisation, reward, signal, jitted):
    def function(log_c, log_c_base, mask):
        return aggregate(scheme, log_c, log_c_base, mask, ws_normalisation=normalisation)

    got = (jax.jit(function) if jitted else function)(C, C_BASE, BOTH)
    np.testing.assert_allclose(got[0], [reward], rtol=1e-6)
    np.testing.assert_allclose(got[1], [signal], rtol=1e-6)


def test_sum_is_the_default_normalisation_and_no_cap_the_default_cap():
    base = np.full((1, 2), np.log(1e-6), np.float32)
    for scheme in WS_SCHEMES:
        default = aggregate(scheme, C, base, BOTH)
        explicit = aggregate(scheme, C, base, BOTH, ws_normalisation="sum", weight_cap=None)
        np.testing.assert_array_equal(default[1], explicit[1])
        assert (
            ws_weights(scheme, base, BOTH)[0][0, 0]
            == ws_weights(scheme, base, BOTH, ws_normalisation="sum")[0][0, 0]
        )
    assert ws_weights("ws_inv_p", base, BOTH)[0].max() > 1e5


# XLA takes subnormal numbers for 0.
logprobs = hnp.arrays(
    np.float32, (3, 5), elements=st.floats(-69, 0, width=32, allow_subnormal=False)
)


@settings(max_examples=60, deadline=None)
@given(
    log_c=logprobs,
    log_c_base=logprobs,
    mask=hnp.arrays(np.bool_, (3, 5)),
    scheme=st.sampled_from(list(SCHEMES)),
    normalisation=st.sampled_from(["mean", "sum", "normalised"]),
    cap=st.sampled_from([None, 0.5, 1e4]),
)
def test_agrees_with_the_oracle(log_c, log_c_base, mask, scheme, normalisation, cap):
    reward, signal = aggregate(
        scheme, log_c, log_c_base, mask, ws_normalisation=normalisation, weight_cap=cap
    )
    for b in range(3):
        expected_reward, expected_signal = oracle.aggregate(
            scheme,
            oracle.kept(log_c[b], mask[b]),
            oracle.kept(log_c_base[b], mask[b]),
            normalisation,
            cap,
            oracle.kept(np.abs(log_c_base[b]), mask[b]),
        )
        # Weights are exponentials of up to 69, where neighbouring floats are 7.6e-6 apart.
        np.testing.assert_allclose(reward[b], expected_reward, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(signal[b][mask[b]], expected_signal, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(signal[b][~mask[b]], 0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_masked_positions_may_hold_anything(scheme):
    garbage = np.array([np.nan, np.inf, -np.inf], np.float32)
    log_c = np.concatenate([C, garbage[None]], axis=1)
    base = np.concatenate([C_BASE, garbage[None]], axis=1)
    mask = np.array([[1, 1, 0, 0, 0]], np.float32)
    reward, signal = aggregate(scheme, log_c, base, mask)
    expected_reward, expected_signal = aggregate(scheme, C, C_BASE, BOTH)
    np.testing.assert_array_equal(reward, expected_reward)
    np.testing.assert_array_equal(signal[:, :2], expected_signal)
    np.testing.assert_array_equal(signal[:, 2:], 0)
    gradient = jax.grad(lambda x: aggregate(scheme, x, base, mask)[0].sum())(jnp.array(log_c))
    np.testing.assert_allclose(gradient, signal, rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_masked_row_is_zero_with_zero_gradient(scheme):
    nothing = np.zeros((2, 3), bool)
    log_c = jnp.full((2, 3), jnp.nan)
    reward, signal = aggregate(scheme, log_c, log_c, nothing)
    np.testing.assert_array_equal(reward, np.zeros(2))
    np.testing.assert_array_equal(signal, np.zeros((2, 3)))
    gradient = jax.grad(lambda x: aggregate(scheme, x, x, nothing)[0].sum())(log_c)
    np.testing.assert_array_equal(gradient, np.zeros((2, 3)))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("T", [1, 500])
@pytest.mark.parametrize("c", [1e-30, 1.0])
@pytest.mark.parametrize("c_base", [0.0, 1e-30, 1.0])
def test_finite_at_the_extremes(scheme, T, c, c_base):
    with np.errstate(divide="ignore"):
        log_c, base = (np.full((1, T), np.log(value), np.float32) for value in (c, c_base))
    mask = np.ones((1, T), bool)
    for normalisation in ("mean", "sum", "normalised"):
        reward, signal = aggregate(scheme, log_c, base, mask, ws_normalisation=normalisation)
        assert np.isfinite(reward).all()
        assert np.isfinite(signal).all()


def test_weight_without_a_cap_keeps_its_scale_down_to_1e_minus_30():
    tiny = np.full((1, 1), np.log(1e-30), np.float32)
    reward, _ = aggregate("ws_inv_p", tiny, tiny, np.ones((1, 1), bool))
    np.testing.assert_allclose(reward, [1.0], rtol=1e-5)


def test_cap_cuts_the_raw_weight_before_normalisation_and_is_reported():
    base = np.log(np.array([[1e-3, 0.5, 1e-3]], np.float32))
    mask = np.array([[True, True, False]])
    weight, capped = ws_weights(
        "ws_inv_p", base, mask, ws_normalisation="normalised", weight_cap=8.0
    )
    np.testing.assert_allclose(weight, [[0.8, 0.2, 0.0]], rtol=1e-6)
    np.testing.assert_array_equal(capped, [[True, False, False]])
    zero = np.full((1, 1), -np.inf, np.float32)
    weight, capped = ws_weights("ws_inv_p", zero, np.ones((1, 1), bool), ws_normalisation="sum")
    np.testing.assert_allclose(weight, [[LARGEST_WEIGHT]], rtol=1e-6)
    assert capped.all()


@pytest.mark.parametrize("scheme", WS_SCHEMES)
@pytest.mark.parametrize("normalisation", ["mean", "sum", "normalised"])
def test_weights_are_zero_under_the_mask(scheme, normalisation):
    base = np.array([[-1.0, np.nan], [np.nan, -np.inf]], np.float32)
    mask = np.array([[True, False], [False, False]])
    weight, capped = ws_weights(
        scheme, base, mask, ws_normalisation=normalisation, weight_cap=100.0
    )
    np.testing.assert_array_equal(weight[:, 1], [0, 0])
    np.testing.assert_array_equal(weight[1], [0, 0])
    assert weight[0, 0] > 0.9
    assert not capped.any()


def test_certain_baseline_gives_weight_zero_never_negative():
    base = np.array([[0.0, 1e-6]], np.float32)
    for normalisation in ("mean", "sum", "normalised"):
        weight, capped = ws_weights("ws_neg_log_p", base, BOTH, ws_normalisation=normalisation)
        np.testing.assert_array_equal(weight, [[0, 0]])
        assert not capped.any()


def test_bfloat16_is_computed_in_float32_and_float64_kept(x64):
    log_c = jnp.full((1, 400), -0.01, jnp.bfloat16)
    mask = jnp.ones((1, 400), bool)
    for scheme in SCHEMES:
        reward, signal = aggregate(scheme, log_c, log_c, mask)
        assert reward.dtype == signal.dtype == jnp.float32
        reward, signal = aggregate(scheme, C.astype(np.float64), C_BASE.astype(np.float64), BOTH)
        assert reward.dtype == signal.dtype == jnp.float64
    reward, _ = aggregate("logp", log_c, log_c, mask)
    np.testing.assert_allclose(reward, [400 * float(log_c[0, 0])], rtol=1e-6)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("normalisation", ["mean", "sum", "normalised"])
def test_signal_is_the_derivative_of_the_reward(scheme, normalisation, x64):
    rng = np.random.default_rng(0)
    log_c, base = -3 * rng.random((2, 4, 6))
    mask = rng.random((4, 6)) < 0.7

    def reward(x):
        return aggregate(scheme, x, base, mask, ws_normalisation=normalisation)[0]

    signal = aggregate(scheme, log_c, base, mask, ws_normalisation=normalisation)[1]
    np.testing.assert_allclose(jax.grad(lambda x: reward(x).sum())(log_c), signal, rtol=1e-12)
    h = 1e-6
    for t in range(6):
        step = np.zeros_like(log_c)
        step[:, t] = h
        difference = (reward(log_c + step) - reward(log_c - step)) / (2 * h)
        np.testing.assert_allclose(difference, signal[:, t], rtol=1e-7, atol=1e-9)


def test_the_weights_of_r3_are_constants(x64):
    def reward(spread):
        return aggregate("r3", C, C_BASE, BOTH, spread_BT=spread)[0].sum()

    np.testing.assert_array_equal(jax.grad(reward)(jnp.array([[2.0, 1.0]])), np.zeros((1, 2)))


@pytest.mark.parametrize("scheme", WS_SCHEMES)
def test_weights_are_constants(scheme, x64):
    base = jnp.array(C_BASE)
    gradient = jax.grad(lambda x: aggregate(scheme, C, x, BOTH)[0].sum())(base)
    np.testing.assert_array_equal(gradient, np.zeros((1, 2)))
    gradient = jax.grad(lambda x: ws_weights(scheme, x, BOTH)[0].sum())(base)
    np.testing.assert_array_equal(gradient, np.zeros((1, 2)))


def test_the_spread_is_that_of_log_c_over_the_traces_of_a_prompt():
    """By hand: log c of -1 and -3, whose standard deviation is 1, beside one that is -1 twice."""
    log_c = np.array([[[-1, -1, np.nan], [-3, -1, np.nan]]], np.float32)
    mask = np.array([[True, True, False]])
    np.testing.assert_allclose(spread_over_traces(log_c, mask), [[1, 0, 0]])
    for sigma, weight in (([1, 3, np.nan], [0.25, 0.75, 0]), ([0, 0, np.inf], [0, 0, 0])):
        got = spread_weights(np.array([sigma], np.float32), mask)
        np.testing.assert_array_equal(got, [weight])


def test_r3_compares_traces_by_the_tokens_on_which_they_differ():
    """The second token is alike after both traces, and after them surer than after the empty one:
    it neither separates the traces nor counts against the baseline, and is not trained."""
    log_c = jnp.array([[[-1.0, -0.5], [-3.0, -0.5]]])
    base, mask = jnp.array([[-2.0, -5.0]]), jnp.ones((1, 2), bool)
    rewards = compute_rewards(log_c, base, mask, ObjectiveConfig.model_validate({"scheme": "r3"}))
    np.testing.assert_allclose(rewards.log_reward_PK, [[-1, -3]])
    np.testing.assert_allclose(rewards.log_baseline_P, [-2])
    np.testing.assert_allclose(rewards.advantage_PK, [[1, -1]], rtol=1e-6)
    np.testing.assert_array_equal(rewards.token_signal_PKA, [[[1, 0], [1, 0]]])


def test_r3_of_equal_traces_has_neither_reward_nor_signal():
    log_c, base = jnp.full((1, 4, 3), -0.7), jnp.full((1, 3), -0.9)
    mask = jnp.ones((1, 3), bool)
    rewards = compute_rewards(log_c, base, mask, ObjectiveConfig.model_validate({"scheme": "r3"}))
    for value in rewards:
        np.testing.assert_array_equal(value, np.zeros(value.shape))


def test_unknown_names_list_the_known_ones():
    with pytest.raises(ValueError, match=f"'gmm'.*{', '.join(SCHEMES)}"):
        aggregate("gmm", C, C_BASE, BOTH)
    with pytest.raises(ValueError, match=r"'average'.*mean, sum, normalised"):
        aggregate("ws_inv_p", C, C_BASE, BOTH, ws_normalisation="average")
    with pytest.raises(ValueError, match=f"'am'.*{', '.join(WS_SCHEMES)}"):
        ws_weights("am", C_BASE, BOTH)
