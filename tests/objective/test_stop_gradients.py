"""The gradient of the whole objective is Eq. 23's sum of terms, built by hand.

Reward, advantages, signals, weights and old logprobs all come from the same parameters here, so a
gradient through any of them would show.
"""

import jax
import numpy as np
import pytest

from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective import losses
from nrt_jax.objective.advantages import ESTIMATORS, advantages
from nrt_jax.objective.masked import masked_sum
from nrt_jax.objective.schemes import aggregate, spread_over_traces
from tests.objective import oracle, tabular

PICKED = np.array([1, 4, 8, 11, 3, 6, 13, 0])
EMPTY = np.array([[0.0, 0.0, 1.0]])
P, K = 2, 4
LOW, HIGH = 0.2, 0.28


def pick(traces):
    return tabular.Traces(*(field[PICKED] for field in traces))


def objective_loss(params, old_params, scheme, estimator, policy_loss):
    """One step's loss: sums over tokens, all from `params` but the old logprobs."""
    traces = pick(tabular.all_traces())
    logprob = tabular.trace_logprobs(params, traces)
    old_logprob = tabular.trace_logprobs(old_params, traces)
    log_c = tabular.answer_logprobs(params, traces.features_BF)
    mask = np.ones(log_c.shape, bool)
    base = tabular.answer_logprobs(params, EMPTY)
    of_groups = log_c.reshape(P, K, -1)
    spread = spread_over_traces(of_groups, np.ones((P, log_c.shape[1])))
    by_trace = np.repeat(np.arange(P), K)
    log_reward, signal = aggregate(
        scheme, log_c, np.ones((P * K, 1)) * base, mask, spread_BT=spread[by_trace]
    )
    base_of_groups = np.ones((P, 1)) * base
    baseline, _ = aggregate(scheme, base_of_groups, base_of_groups, mask[:P], spread_BT=spread)
    advantage = advantages(
        log_reward.reshape(P, K),
        baseline,
        estimator=estimator,
        logs=SCHEMES[scheme].positive,
    ).reshape(-1)
    function = {"ppo_clip": losses.ppo_clip, "cispo": losses.cispo}[policy_loss]
    terms = function(logprob, old_logprob, advantage, clip_low=LOW, clip_high=HIGH)
    ratio = losses.trace_ratio(logprob, old_logprob, traces.mask_BT, 2.0)
    token = ratio[:, None] * losses.token_loss(log_c, signal)
    return masked_sum(terms.loss_BT, traces.mask_BT) + masked_sum(token, mask)


def gradient_by_hand(params, old_params, scheme, estimator, policy_loss):
    """-sum_k [A_k sum_t weight_t grad log pi(z_t) + r_k sum_i S_i grad log c_i]."""
    traces = pick(tabular.all_traces())
    log_c = np.asarray(tabular.answer_logprobs(params, traces.features_BF))
    base = np.asarray(tabular.answer_logprobs(params, EMPTY))[0]
    results, groups = [], []
    for p in range(P):
        rows = log_c[p * K : p * K + K]
        how = {"sigma": oracle.spread(rows)}
        baseline, _ = oracle.aggregate(scheme, base, base, **how)
        results += [oracle.aggregate(scheme, row, base, **how) for row in rows]
        rewards = [reward for reward, _ in results[p * K :]]
        groups.append(oracle.advantages(rewards, baseline, estimator))
    logprob = np.asarray(tabular.trace_logprobs(params, traces))
    log_ratio = logprob - np.asarray(tabular.trace_logprobs(old_params, traces))
    transition, answer = np.zeros(params.transition.shape), np.zeros(params.answer.shape)
    for b, advantage in enumerate(advantage for group in groups for advantage in group):
        mask = traces.mask_BT[b]
        for t in np.flatnonzero(mask):
            ratio = np.exp(log_ratio[b, t])
            if (advantage > 0 and ratio > 1 + HIGH) or (advantage < 0 and ratio < 1 - LOW):
                continue
            weight = ratio if policy_loss == "ppo_clip" else np.clip(ratio, 1 - LOW, 1 + HIGH)
            transition -= (advantage * weight) * tabular.trace_logprob_gradient(
                params, traces.tokens_BT[b, [t]], traces.previous_BT[b, [t]], [True]
            )
        trace_ratio = min(np.exp(log_ratio[b][mask].sum()), 2.0)
        for n, signal in enumerate(results[b][1]):
            gradient = tabular.answer_logprob_gradient(params, traces.features_BF[b], n)
            answer -= trace_ratio * signal * gradient
    return transition, answer


@pytest.mark.parametrize("policy_loss", ["ppo_clip", "cispo"])
@pytest.mark.parametrize("on_policy", [True, False])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_is_the_sum_of_terms_built_by_hand(scheme, on_policy, policy_loss, x64):
    # Under r3 the empty trace is better than every one of these, which the clip would make equal.
    check(scheme, "grpo_unclipped" if scheme == "r3" else "grpo", on_policy, policy_loss)


@pytest.mark.parametrize("estimator", [name for name in ESTIMATORS if name != "grpo"])
def test_gradient_under_every_estimator(estimator, x64):
    check("am", estimator, False, "ppo_clip")


def check(scheme, estimator, on_policy, policy_loss):
    params = tabular.random_params(1)
    old_params = params
    if not on_policy:
        noise = tabular.random_params(2)
        old_params = params._replace(transition=params.transition + 0.4 * noise.transition)
    names = (scheme, estimator, policy_loss)
    gradient = jax.grad(
        # On-policy the old logprobs are the same traced array, so that their stop shows too.
        lambda x: objective_loss(x, x if on_policy else old_params, *names)
    )(params)
    transition, answer = gradient_by_hand(params, old_params, *names)
    assert np.abs(transition).max() > 1e-3
    np.testing.assert_allclose(gradient.transition, transition, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(gradient.answer, answer, rtol=1e-9, atol=1e-12)
