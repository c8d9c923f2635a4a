"""Rewards too small for float32: the advantages are those of the exact rewards all the same."""

import math
from decimal import Decimal

import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective.advantages import ESTIMATORS, advantages, zero_std
from nrt_jax.objective.rewards import compute_rewards, of_equal_traces, score_rewards
from nrt_jax.types import SuffixLogprobs
from tests.objective import oracle

POSITIVE = [name for name, scheme in SCHEMES.items() if scheme.positive]
K = 6


def exact_reward(scheme: str, log_c: np.ndarray, log_c_base: np.ndarray) -> Decimal:
    """R in decimal arithmetic, whose exponents have no bound that matters here."""
    logs = [Decimal(float(x)) for x in log_c]
    if scheme == "p":
        return sum(logs).exp()
    if scheme == "gm":
        return (sum(logs) / len(logs)).exp()
    weights = [Decimal(1) / len(logs)] * len(logs)
    if SCHEMES[scheme].weighted:
        weights = [Decimal(float(w)) for w in oracle.weights(scheme, log_c_base, "sum", 1e4)]
    return sum((w * x.exp() for w, x in zip(weights, logs, strict=True)), start=Decimal())


def exact_advantages(scheme: str, log_c: np.ndarray, log_c_base: np.ndarray, estimator: str):
    rewards = [exact_reward(scheme, row, log_c_base) for row in log_c]
    baseline, largest = exact_reward(scheme, log_c_base, log_c_base), max(rewards)
    scaled = [float(reward / largest) for reward in rewards]
    return oracle.advantages(scaled, float(baseline / largest), estimator)


def answer(T: int, level: str) -> tuple[np.ndarray, np.ndarray]:
    """log c of K traces and log c_base: at -0.45 nats, mixed, or so small that every c is 0."""
    rng = np.random.default_rng(T)
    mean = {
        "-0.45": np.full(T, -0.45),
        "mixed": rng.choice([-1e-3, -0.45, -2.0, -15.0], T),
        "tiny": np.full(T, -110.0),
    }[level]
    # Sums that differ by a few nats, of which the trace between the others is the baseline.
    by_trace = 3 * rng.normal(size=(K, 1)) / np.abs(mean).sum()
    log_c = mean * (1 + by_trace + rng.normal(size=(K, T)) / (8 * math.sqrt(T)))
    order = np.argsort(log_c.sum(axis=1))
    return log_c.astype(np.float32), log_c[order[1]].astype(np.float32)


def rewards_of_group(scheme, log_c, log_c_base, estimator):
    objective = ObjectiveConfig.model_validate({"scheme": scheme, "estimator": estimator})
    mask = jnp.ones((1, log_c.shape[1]), bool)
    return compute_rewards(jnp.asarray(log_c[None]), jnp.asarray(log_c_base[None]), mask, objective)


@pytest.mark.parametrize("level", ["-0.45", "mixed", "tiny"])
@pytest.mark.parametrize("T", [200, 2000])
@pytest.mark.parametrize("scheme", POSITIVE)
@pytest.mark.parametrize("estimator", ["grpo", "grpo_unclipped"])
def test_advantages_are_those_of_exact_arithmetic(estimator, scheme, T, level):
    log_c, log_c_base = answer(T, level)
    rewards = rewards_of_group(scheme, log_c, log_c_base, estimator)
    expected = exact_advantages(scheme, log_c, log_c_base, estimator)
    assert max(np.abs(expected)) > 0.9
    np.testing.assert_allclose(rewards.advantage_PK[0], expected, rtol=5e-3, atol=5e-3)
    if scheme == "p":
        assert np.all(rewards.token_signal_PKA < 1e-35), "S is of the size of R"


def test_a_certain_token_without_weight_does_not_hide_the_others():
    """Of c = 1 and a weight of 0 beside c = e^-110, whose weights are 110."""
    log_c = np.array([[0, -110, -110], [0, -110, -109]], np.float32)
    base = np.array([0, -110, -110], np.float32)
    rewards = rewards_of_group("ws_neg_log_p", log_c, base, "grpo_unclipped")
    expected = [math.log(220) - 110, math.log(110 * (1 + math.e)) - 110]
    np.testing.assert_allclose(rewards.log_reward_PK[0], expected, rtol=1e-6)
    np.testing.assert_allclose(rewards.log_baseline_P, expected[:1], rtol=1e-6)
    np.testing.assert_allclose(rewards.advantage_PK[0], [-1, 1], rtol=1e-4)


SIZES = [(1.0, 0.4), (8.0, 0.1), (1e-3, 2.0), (1e30, 0.5), (1e-30, 0.5)]


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize(("size", "baseline"), SIZES)
def test_logs_give_the_advantages_of_their_rewards(estimator, size, baseline):
    """Gains above 1 and below 0 are among them, and a baseline above every trace."""
    reward = (size * np.random.default_rng(0).random((3, K))).astype(np.float32)
    base = np.full(3, size * baseline, np.float32)
    got = advantages(np.log(reward), np.log(base), estimator=estimator, logs=True)
    expected = advantages(reward, base, estimator=estimator)
    largest = max(float(np.abs(expected).max()), 1e-30)
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-4 * largest)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_rewards_and_a_baseline_of_zero(estimator):
    zero = np.full((1, 3), -np.inf, np.float32)
    one = np.zeros(1, np.float32)
    for baseline in (zero[:, 0], one):
        got = advantages(zero, baseline, estimator=estimator, logs=True)
        np.testing.assert_array_equal(got, np.zeros((1, 3)))
        assert zero_std(zero, baseline, estimator, logs=True).all()
    some = np.array([[-np.inf, -900.0, -901.0]], np.float32)
    got = advantages(some, zero[:, 0], estimator=estimator, logs=True)
    assert np.isfinite(got).all()
    assert not zero_std(some, zero[:, 0], estimator, logs=True).any()


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_baseline_far_above_or_below_every_trace(estimator):
    some = np.array([[-900.0, -901.0]], np.float32)
    above, below = (np.array([x], np.float32) for x in (-1.0, -5000.0))
    clipped = estimator in ("grpo", "clip01", "dr_grpo")
    for baseline, all_equal in ((above, clipped), (below, False)):
        got = advantages(some, baseline, estimator=estimator, logs=True)
        assert np.isfinite(got).all()
        assert bool(zero_std(some, baseline, estimator, logs=True)[0]) == all_equal


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_nan_is_not_hidden(estimator):
    reward = np.array([[-5.0, np.nan, -1.0]], np.float32)
    got = advantages(reward, np.full(1, -2, np.float32), estimator=estimator, logs=True)
    assert np.isnan(got).any()
    assert not zero_std(reward, np.zeros(1, np.float32), estimator, logs=True).any()


def test_rounding_of_a_large_logarithm_is_no_merit():
    """float32 holds -900 to 6e-5, which is a difference of 0.006 % in R."""
    size = np.float32(900)
    noisy = np.array([[-size, np.nextafter(-size, np.float32(0))]], np.float32)
    baseline = np.array([-2000], np.float32)
    assert noisy[0, 0] != noisy[0, 1]
    np.testing.assert_array_equal(advantages(noisy, baseline, estimator="grpo", logs=True), 0)
    apart = np.array([[-900, -899.99]], np.float32)
    assert not zero_std(apart, baseline, "grpo", logs=True).any()


def test_scores_of_the_engine_are_rewards():
    log_c, log_c_base = (np.full(shape, -0.5, np.float32) for shape in ((2, 4), 4))
    for scheme, expected in (("p", math.exp(-2)), ("logp", -2), ("am", math.exp(-0.5))):
        rewards = score_rewards(
            [SuffixLogprobs(log_c, log_c_base)], ObjectiveConfig.model_validate({"scheme": scheme})
        )
        np.testing.assert_allclose(rewards.reward_PK, [[expected, expected]], rtol=1e-6)
        np.testing.assert_allclose(rewards.baseline_P, [expected], rtol=1e-6)


# --- groups without a trace term -----------------------------------------------------------------


def test_equal_gains_are_a_trace_term_where_nothing_is_compared():
    """clip01 reinforces every trace by its gain, whatever those of the others are."""
    reward, baseline = np.full((2, 3), 0.9, np.float32), np.array([0.4, 0.9], np.float32)
    for logs in (False, True):
        given = (np.log(reward), np.log(baseline)) if logs else (reward, baseline)
        zero = {name: zero_std(*given, name, logs=logs).tolist() for name in ESTIMATORS}
        assert zero.pop("clip01") == [False, True]
        assert set(map(tuple, zero.values())) == {(True, True)}
        got = advantages(*given, estimator="clip01", logs=logs)
        np.testing.assert_allclose(got, [[0.5] * 3, [0] * 3], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("logs", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_zero_std_group_has_advantages_of_zero(estimator, logs):
    """And any other has one that is not, beyond rounding."""
    rng = np.random.default_rng(1)
    reward = rng.choice([0.2, 0.5, 0.9, 3.0], (200, 2)).astype(np.float32)
    baseline = rng.choice([0.1, 0.5, 2.0, 4.0], 200).astype(np.float32)
    given = (np.log(reward), np.log(baseline)) if logs else (reward, baseline)
    size = np.abs(advantages(*given, estimator=estimator, logs=logs)).max(axis=1)
    np.testing.assert_array_equal(zero_std(*given, estimator, logs=logs), size < 1e-5)


# --- equal traces --------------------------------------------------------------------------------


def test_log_c_of_the_trace_that_stands_for_each():
    log_c, base = jnp.asarray([[[1.0, 2.0], [3, 4], [5, 6]]]), jnp.asarray([[7.0, 8.0]])
    got = of_equal_traces(log_c, base, jnp.asarray([[1, 0, 1]]))
    np.testing.assert_array_equal(got, [[[1, 2], [7, 8], [1, 2]]])
