"""Metrics of a micro-batch beside its losses: rewards, groups, and the policy against the sampler.

Letters: P prompts, K traces per prompt, T predicted tokens of a completion, A answer tokens.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective.advantages import zero_std
from nrt_jax.objective.losses import PolicyTerms, truncated_importance
from nrt_jax.objective.masked import masked_count, masked_fill, masked_sum
from nrt_jax.objective.rewards import Rewards
from nrt_jax.objective.schemes import WS_SCHEMES, rewards_of, ws_weights
from nrt_jax.training.batch import GroupArrays, answer_mask
from nrt_jax.training.forward import Completions
from nrt_jax.training.update import Metrics

SumAndCount = tuple[Array, Array]
"""Sums and counts add up over micro-batches, so their mean is exact."""


def loss_metrics(
    policy: PolicyTerms,
    completions: Completions,
    rewards: Rewards,
    format_PK: Float[Array, "P K"],
    log_c_base_PA: Float[Array, "P A"],
    groups: GroupArrays,
    objective: ObjectiveConfig,
) -> Metrics:
    """Everything but the losses; `policy/format_nats` is the loss of Eq. 11 before its weight."""
    covered_PKT = completions.covered_PKT
    gap_PKT = jnp.abs(completions.logprob_PKT - completions.sampler_PKT)
    gap_PKT = masked_fill(gap_PKT, covered_PKT)

    def mean_over_tokens(x_PKT: Array) -> SumAndCount:
        return masked_sum(x_PKT, covered_PKT), masked_count(covered_PKT)

    traces = masked_count(groups.kept_P) * format_PK.shape[1]
    means = {
        "policy/entropy": mean_over_tokens(completions.entropy_PKT),
        "policy/ratio": mean_over_tokens(policy.ratio_BT),
        "policy/clip_share": mean_over_tokens(policy.clipped_BT),
        "policy/format_nats": (jnp.sum(format_PK), traces),
        "mismatch/mean": mean_over_tokens(gap_PKT),
    }
    maxima = {"mismatch/max": jnp.max(gap_PKT)}
    means |= reward_means(rewards.log_reward_PK, rewards.log_baseline_P, groups.kept_P, objective)
    means["reward/zero_signal_share"] = _zero_signals(rewards, groups)
    if objective.importance_cap is not None:
        ratio_PKT = truncated_importance(completions.old_PKT, completions.sampler_PKT, math.inf)
        ratio_PKT = masked_fill(ratio_PKT, covered_PKT)
        means["importance/ratio"] = mean_over_tokens(ratio_PKT)
        truncated_PKT = ratio_PKT > objective.importance_cap
        means["importance/truncated_share"] = mean_over_tokens(truncated_PKT)
        maxima["importance/ratio_max"] = jnp.max(ratio_PKT)
    if objective.scheme in WS_SCHEMES:
        means["reward/capped_weight_share"] = _capped_weights(log_c_base_PA, groups, objective)
    means, maxima = jax.lax.stop_gradient((means, maxima))
    return Metrics(sums={}, means=means, maxima=maxima)


def reward_means(
    log_reward_PK: Float[ArrayLike, "P K"],
    log_baseline_P: Float[ArrayLike, " P"],
    kept_P: Bool[ArrayLike, " P"],
    objective: ObjectiveConfig,
) -> dict[str, SumAndCount]:
    """Rewards, and the share of groups with zero std, over the groups that are kept.

    The rewards are given as `aggregate` gives them; `reward/log_mean` is the mean of log R, where
    the scheme has one.
    """
    log_reward_PK, log_baseline_P = jnp.asarray(log_reward_PK), jnp.asarray(log_baseline_P)
    prompts, kept_P1 = masked_count(kept_P), jnp.asarray(kept_P)[:, None]
    traces = prompts * log_reward_PK.shape[1]
    logs = SCHEMES[objective.scheme].positive
    zero_std_P = zero_std(log_reward_PK, log_baseline_P, objective.estimator, logs=logs)
    above_PK = log_reward_PK > log_baseline_P[:, None]
    reward_PK, baseline_P = (
        rewards_of(objective.scheme, x) for x in (log_reward_PK, log_baseline_P)
    )
    means = {
        "reward/mean": (masked_sum(reward_PK, kept_P1), traces),
        "reward/baseline": (masked_sum(baseline_P, kept_P), prompts),
        "reward/above_baseline_share": (masked_sum(above_PK, kept_P1), traces),
        "reward/zero_std_share": (masked_sum(zero_std_P, kept_P), prompts),
    }
    if logs:
        means["reward/log_mean"] = (masked_sum(log_reward_PK, kept_P1), traces)
    return means


host_reward_means = partial(jax.jit, static_argnames="objective")(reward_means)
"""`reward_means` for values on the host, as one program instead of one per operation."""


def _zero_signals(rewards: Rewards, groups: GroupArrays) -> SumAndCount:
    """Answer tokens whose S is 0, so that the loss does not train them, and all of them."""
    signal_PKA = rewards.token_signal_PKA
    mask_PKA = jnp.broadcast_to(answer_mask(groups)[:, None], signal_PKA.shape)
    return masked_count(mask_PKA & (signal_PKA == 0)), masked_count(mask_PKA)


def _capped_weights(
    log_c_base_PA: Float[Array, "P A"], groups: GroupArrays, objective: ObjectiveConfig
) -> SumAndCount:
    """Answer tokens whose weight the cap reduced, and all answer tokens."""
    mask_PA = answer_mask(groups)
    _, capped_PA = ws_weights(
        objective.scheme,
        log_c_base_PA,
        mask_PA,
        ws_normalisation=objective.ws_normalisation,
        weight_cap=objective.weight_cap,
    )
    return masked_count(capped_PA), masked_count(mask_PA)
