"""Each loss term: hand constants, the oracle, its gradient, and what it treats as constant."""

import math

import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from nrt_jax.objective import losses
from nrt_jax.objective.masked import masked_fill, masked_sum
from tests.objective import oracle

CLIP = {"clip_low": 0.2, "clip_high": 0.28}
POLICY_LOSSES = {"ppo_clip": losses.ppo_clip, "cispo": losses.cispo}


def policy_terms(name, ratio, advantage, old=-2.0):
    """The terms of one token whose probability ratio is `ratio`."""
    logprob = jnp.array([[old + math.log(ratio)]])
    return POLICY_LOSSES[name](logprob, jnp.full((1, 1), old), jnp.array([advantage]), **CLIP)


def loss_gradient(name, ratio, advantage, old=-2.0):
    """d loss / d log pi of that token."""

    def loss(logprob):
        old_logprob = jnp.full((1, 1), old)
        terms = POLICY_LOSSES[name](logprob, old_logprob, jnp.array([advantage]), **CLIP)
        return terms.loss_BT.sum()

    return float(jax.grad(loss)(jnp.array([[old + math.log(ratio)]]))[0, 0])


# ratio, advantage, loss and gradient of ppo_clip and of cispo (old log pi = -2), clipped.
BY_HAND = [
    (1.0, 1.0, -1.0, -1.0, 2.0, -1.0, False),
    (1.5, 1.0, -1.28, 0.0, 0.0, 0.0, True),
    (1.5, -1.0, 1.5, 1.5, 1.28 * (math.log(1.5) - 2), 1.28, False),
    (0.5, 1.0, -0.5, -0.5, -0.8 * (math.log(0.5) - 2), -0.8, False),
    (0.5, -1.0, 0.8, 0.0, 0.0, 0.0, True),
    (1.2, 2.0, -2.4, -2.4, -2.4 * (math.log(1.2) - 2), -2.4, False),
    (0.9, -2.0, 1.8, 1.8, 1.8 * (math.log(0.9) - 2), 1.8, False),
    # Between the bounds that an exchange of clip_low and clip_high would give.
    (1.25, 1.0, -1.25, -1.25, -1.25 * (math.log(1.25) - 2), -1.25, False),
    (0.75, -1.0, 0.8, 0.0, 0.0, 0.0, True),
    (1.5, 0.0, 0.0, 0.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize(
    ("ratio", "advantage", "ppo", "ppo_gradient", "cispo", "cispo_gradient", "clipped"), BY_HAND
)
def test_policy_losses_by_hand(ratio, advantage, ppo, ppo_gradient, cispo, cispo_gradient, clipped):
    expected = {"ppo_clip": (ppo, ppo_gradient), "cispo": (cispo, cispo_gradient)}
    for name, (loss, gradient) in expected.items():
        terms = policy_terms(name, ratio, advantage)
        np.testing.assert_allclose(terms.loss_BT, [[loss]], rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(terms.ratio_BT, [[ratio]], rtol=1e-5)
        assert bool(terms.clipped_BT[0, 0]) is clipped
        np.testing.assert_allclose(loss_gradient(name, ratio, advantage), gradient, rtol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    logprob=st.floats(-6, 0, width=32),
    old=st.floats(-6, 0, width=32),
    advantage=st.floats(-3, 3, width=32),
    low=st.sampled_from([0.0, 0.2, 1.0]),
    high=st.sampled_from([0.0, 0.28, 3.0]),
)
def test_policy_losses_agree_with_the_oracle(logprob, old, advantage, low, high):
    # At a bound the float32 and the float64 ratio may fall on different sides: CISPO jumps there.
    bounds = (1 - low, 1 + high)
    at_bound = any(abs(math.exp(logprob - old) - bound) < 1e-5 for bound in bounds)
    for name in ("ppo_clip",) if at_bound else POLICY_LOSSES:
        terms = POLICY_LOSSES[name](
            jnp.array([[logprob]]),
            jnp.array([[old]]),
            jnp.array([advantage]),
            clip_low=low,
            clip_high=high,
        )
        expected = getattr(oracle, name)(logprob, old, advantage, low, high)
        np.testing.assert_allclose(terms.loss_BT, [[expected]], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_policy_gradient_on_policy_is_minus_advantage_whatever_depends_on_theta(name):
    """At ratio 1 the gradient is -A, also when old logprobs and A are functions of log pi."""
    logprob = jnp.array([[-1.0, -2.0], [-0.5, -3.0]])

    def loss(x):
        advantage_B = jnp.array([1.0, -2.0]) + (x - logprob).sum(axis=1)
        return POLICY_LOSSES[name](x, x, advantage_B, **CLIP).loss_BT.sum()

    np.testing.assert_allclose(jax.grad(loss)(logprob), [[-1, -1], [2, 2]], rtol=1e-6)


@pytest.mark.parametrize("name", POLICY_LOSSES)
@pytest.mark.parametrize("advantage", [1.0, -1.0])
def test_policy_losses_stay_finite_at_absurd_ratios(name, advantage):
    for logprob, old in ((0.0, -500.0), (-500.0, 0.0)):

        def loss(x, name=name, old=old):
            arguments = (jnp.full((1, 1), old), jnp.array([advantage]))
            return POLICY_LOSSES[name](x, *arguments, **CLIP).loss_BT.sum()

        value, gradient = jax.value_and_grad(loss)(jnp.full((1, 1), logprob))
        assert np.isfinite(value)
        assert np.isfinite(gradient).all()


@pytest.mark.parametrize("name", POLICY_LOSSES)
def test_garbage_under_the_mask_leaves_no_trace(name):
    mask = jnp.array([[True, True, False, False]])
    garbage = jnp.array([[-1.0, -2.0, jnp.nan, -jnp.inf]])

    def loss(logprob, old):
        logprob, old = masked_fill(logprob, mask), masked_fill(old, mask)
        terms = POLICY_LOSSES[name](logprob, old, jnp.array([1.5]), **CLIP)
        return masked_sum(terms.loss_BT, mask)

    value, gradient = jax.value_and_grad(loss)(garbage, jnp.flip(garbage, 1).at[:, :2].set(-1.5))
    expected = [policy_terms(name, math.exp(d), 1.5, old=-1.5).loss_BT.sum() for d in (0.5, -0.5)]
    np.testing.assert_allclose(value, sum(expected), rtol=1e-5)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(gradient[:, 2:], [[0, 0]])


def test_token_loss_weighs_by_a_constant_signal():
    log_c = jnp.array([[-1.0, -2.0]])
    np.testing.assert_allclose(losses.token_loss(log_c, jnp.array([[0.5, 3.0]])), [[0.5, 6.0]])
    gradient = jax.grad(lambda x: losses.token_loss(x, jnp.exp(x)).sum())(log_c)
    np.testing.assert_allclose(gradient, -np.exp(log_c), rtol=1e-6)


def test_format_loss_all_and_where_the_end_was_not_emitted_and_where_it_was_natural():
    """A trace that t_end ended, one that another token ended, and one that the limit cut."""
    start, end = jnp.array([-1.0, -2.0, -4.0]), jnp.array([-0.25, -0.5, -8.0])
    ends = jnp.array([True, False, False]), jnp.array([False, False, True])
    for where, expected, derivatives in (
        ("all", [1.25, 2.5, 12], [[-1, -1, -1], [-1, -1, -1]]),
        ("not_emitted", [0, 0.5, 8], [[0, 0, 0], [0, -1, -1]]),
        ("natural_end", [1.25, 2.5, 4], [[-1, -1, -1], [-1, -1, 0]]),
    ):
        loss = losses.format_loss(start, end, *ends, where=where)
        np.testing.assert_allclose(loss, expected)
        gradient = jax.grad(
            lambda x, where=where: losses.format_loss(*x, *ends, where=where).sum()
        )(jnp.stack([start, end]))
        np.testing.assert_array_equal(gradient, derivatives)
    with pytest.raises(ValueError, match=r"'nowhere'.*all, not_emitted, natural_end"):
        losses.format_loss(start, end, *ends, where="nowhere")


def test_kl_is_never_negative_and_right_on_average():
    pi, ref = jax.nn.log_softmax(jnp.array([[0.3, -1.0, 2.0], [1.0, 0.0, -1.0]]))
    k3 = losses.kl_k3(pi[None], ref[None])[0]
    by_hand = np.exp(ref - pi) - 1 - (ref - pi)
    np.testing.assert_allclose(k3, by_hand, rtol=1e-5)
    assert (k3 >= 0).all()
    np.testing.assert_allclose((np.exp(pi) * k3).sum(), (np.exp(pi) * (pi - ref)).sum(), rtol=1e-5)
    np.testing.assert_array_equal(losses.kl_k3(pi[None], pi[None]), np.zeros((1, 3)))


def test_kl_gradient_pulls_to_a_constant_reference():
    logprob = jnp.array([[-1.0, -3.0]])
    gradient = jax.grad(lambda x: losses.kl_k3(x, 0 * x - 2.0).sum())(logprob)
    np.testing.assert_allclose(gradient, 1 - np.exp(-2.0 - np.asarray(logprob)), rtol=1e-6)
    gradient = jax.grad(lambda x: losses.kl_k3(jnp.full((1, 2), -1.0), x).sum())(logprob)
    np.testing.assert_array_equal(gradient, [[0, 0]])
    value = losses.kl_k3(jnp.full((1, 1), -500.0), jnp.zeros((1, 1)))
    assert np.isfinite(value).all()


def test_truncated_importance_is_the_capped_constant_ratio():
    old = jnp.array([[-1.0, -1.0, -0.0]])
    sampler = jnp.array([[-1.5, -0.5, -200.0]])
    weight = losses.truncated_importance(old, sampler, 2.0)
    np.testing.assert_allclose(weight, [[math.exp(0.5), math.exp(-0.5), 2.0]], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.truncated_importance(x, sampler, 2.0).sum())(old)
    np.testing.assert_array_equal(gradient, [[0, 0, 0]])


def test_trace_ratio_is_of_the_whole_trace_capped_and_constant():
    logprob = jnp.array([[-1.0, -1.0, jnp.nan], [-1.0, 0.0, 0.0], [jnp.nan] * 3, [0.0, 0.0, 0.0]])
    old = jnp.array([[-1.25, -1.5, 7.0], [-1.0, -3.0, 0.0], [jnp.nan] * 3, [-500.0, 0.0, 0.0]])
    mask = jnp.array([[1, 1, 0], [1, 1, 1], [0, 0, 0], [1, 0, 0]])
    ratio = losses.trace_ratio(logprob, old, mask, 5.0)
    np.testing.assert_allclose(ratio, [math.exp(0.75), 5.0, 1.0, 5.0], rtol=1e-6)
    gradient = jax.grad(lambda x: losses.trace_ratio(x, old, mask, 5.0).sum())(logprob)
    np.testing.assert_array_equal(gradient, np.zeros((4, 3)))


def test_sft_loss_is_the_cross_entropy():
    logprob = jnp.log(jnp.array([[0.5, 0.25]]))
    np.testing.assert_allclose(losses.sft_loss(logprob), [[math.log(2), math.log(4)]], rtol=1e-6)
