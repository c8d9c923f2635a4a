"""The estimator's expectation is the exact gradient of J = E_z[R(z)], by listing every trace.

Here A = R, not normalised, and the token signal is the derived one; the weights of the ws schemes
are constants on both sides.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective import losses
from nrt_jax.objective.advantages import advantages
from nrt_jax.objective.masked import masked_sum
from nrt_jax.objective.schemes import aggregate, rewards_of
from tests.objective import tabular

# Ratios are 1 on-policy; off-policy no token may be clipped, or the estimate would be biased.
UNCLIPPED = {"clip_low": 1.0, "clip_high": 1e6}
BASE_SEED = 7


def rewards(params, traces, scheme):
    """R and S of each trace; c_base, and the spread that weights, are of constant parameters."""
    log_c = tabular.answer_logprobs(params, traces.features_BF)
    base = tabular.answer_logprobs(tabular.random_params(BASE_SEED), np.array([[0.0, 0.0, 1.0]]))
    mask = np.ones(log_c.shape, bool)
    base = jnp.broadcast_to(base, log_c.shape)
    log_reward, signal = aggregate(scheme, log_c, base, mask, spread_BT=jnp.abs(base))
    return log_c, rewards_of(scheme, log_reward), signal


def probabilities(params, traces):
    return jnp.exp(masked_sum(tabular.trace_logprobs(params, traces), traces.mask_BT, axis=1))


def exact_gradient(params, traces, scheme):
    def J(params):
        return (probabilities(params, traces) * rewards(params, traces, scheme)[1]).sum()

    return jax.grad(J)(params)


def expected_gradient(params, old_params, traces, scheme, policy_loss):
    """Minus the gradient of the loss of each trace, weighted by its probability of being drawn."""
    weight_B = probabilities(old_params, traces)

    def loss(params):
        log_c, reward, signal = rewards(params, traces, scheme)
        logprob = tabular.trace_logprobs(params, traces)
        old = tabular.trace_logprobs(old_params, traces)
        terms = policy_loss(logprob, old, reward, **UNCLIPPED)
        ratio = losses.trace_ratio(logprob, old, traces.mask_BT, float("inf"))
        loss_B = masked_sum(terms.loss_BT, traces.mask_BT, axis=1)
        loss_B = loss_B + ratio * losses.token_loss(log_c, signal).sum(axis=1)
        return (weight_B * loss_B).sum()

    return jax.tree.map(jnp.negative, jax.grad(loss)(params))


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert np.abs(other).max() > 1e-4
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


def test_the_list_of_traces_is_complete(x64):
    traces = tabular.all_traces()
    assert len(traces.tokens_BT) == 15
    np.testing.assert_allclose(probabilities(tabular.random_params(0), traces).sum(), 1, rtol=1e-12)


@pytest.mark.parametrize("policy_loss", [losses.ppo_clip, losses.cispo])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_on_policy_estimator_is_exact_in_expectation(scheme, policy_loss, x64):
    params, traces = tabular.random_params(0), tabular.all_traces()
    got = expected_gradient(params, params, traces, scheme, policy_loss)
    assert_same(got, exact_gradient(params, traces, scheme))


@pytest.mark.parametrize("policy_loss", [losses.ppo_clip, losses.cispo])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_off_policy_estimator_is_exact_for_traces_of_one_token(scheme, policy_loss, x64):
    """With one token the ratio of the token is r_k, so that Eq. 23 holds to the letter."""
    params, traces = tabular.random_params(0), tabular.all_traces(limit=1)
    old_params = params._replace(transition=tabular.random_params(3).transition)
    got = expected_gradient(params, old_params, traces, scheme, policy_loss)
    assert_same(got, exact_gradient(params, traces, scheme))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_leave_one_out_advantages_leave_the_expectation_as_it_is(scheme, x64):
    """Over all pairs of independent traces (K = 2), RLOO's trace term is the gradient of E[R]."""
    params, traces = tabular.random_params(0), tabular.all_traces()
    B = len(traces.tokens_BT)
    first, second = (index.reshape(-1) for index in np.meshgrid(range(B), range(B)))
    probability = probabilities(params, traces)
    _, reward, signal = rewards(params, traces, scheme)
    advantage = advantages(
        jnp.stack([reward[first], reward[second]], axis=1), jnp.zeros(B * B), estimator="rloo"
    )

    def loss(params):
        log_c, _, _ = rewards(params, traces, scheme)
        logprob = tabular.trace_logprobs(params, traces)
        total = 0
        for k, index in enumerate((first, second)):
            terms = losses.ppo_clip(logprob[index], logprob[index], advantage[:, k], **UNCLIPPED)
            loss_B = masked_sum(terms.loss_BT, traces.mask_BT[index], axis=1)
            loss_B = loss_B + losses.token_loss(log_c, signal).sum(axis=1)[index]
            total = total + (probability[first] * probability[second] * loss_B).sum() / 2
        return total

    got = jax.tree.map(jnp.negative, jax.grad(loss)(params))
    assert_same(got, exact_gradient(params, traces, scheme))
