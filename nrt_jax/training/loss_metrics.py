"""What a step tells of itself: rewards, groups, and how far the policy is from the sampler.

Letters: P prompts, K traces a prompt, B = P * K sequences, A answer tokens.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.objective.advantages import zero_std
from nrt_jax.objective.losses import PolicyTerms, truncated_importance
from nrt_jax.objective.masked import masked_count, masked_fill, masked_sum
from nrt_jax.objective.rewards import Rewards
from nrt_jax.objective.schemes import WS_SCHEMES, ws_weights
from nrt_jax.training.batch import Groups, answer_mask
from nrt_jax.training.forward import Branches
from nrt_jax.training.update import Metrics

Pair = tuple[Array, Array]
"""(sum, count): the mean over micro-batches is exact."""


def measure(
    policy: PolicyTerms,
    branches: Branches,
    rewards: Rewards,
    format_B: Float[Array, " B"],
    log_c_base_PA: Float[Array, "P A"],
    groups: Groups,
    objective: ObjectiveConfig,
) -> Metrics:
    """Everything but the losses; `policy/format_nats` is the loss of Eq. 11 before its weight."""
    K = groups.end_emitted_PK.shape[1]
    gap_BT = jnp.abs(branches.logprob_BT - branches.sampler_logprob_BT)
    gap_BT = masked_fill(gap_BT, branches.covered_BT)

    def mean_over_tokens(x_BT: Array) -> Pair:
        return masked_sum(x_BT, branches.covered_BT), masked_count(branches.covered_BT)

    means = {
        "policy/entropy": mean_over_tokens(branches.entropy_BT),
        "policy/ratio": mean_over_tokens(policy.ratio_BT),
        "policy/clip_share": mean_over_tokens(policy.clipped_BT),
        "policy/format_nats": (jnp.sum(format_B), masked_count(groups.kept_P) * K),
        "mismatch/mean": mean_over_tokens(gap_BT),
    }
    maxima = {"mismatch/max": jnp.max(gap_BT)}
    means |= reward_means(rewards.reward_PK, rewards.baseline_P, groups.kept_P, objective)
    if objective.importance_cap is not None:
        importance_BT = masked_fill(_importance(branches), branches.covered_BT)
        truncated_BT = importance_BT > objective.importance_cap
        means["importance/ratio"] = mean_over_tokens(importance_BT)
        means["importance/truncated_share"] = mean_over_tokens(truncated_BT)
        maxima["importance/ratio_max"] = jnp.max(importance_BT)
    if objective.scheme in WS_SCHEMES:
        means["reward/capped_weight_share"] = _capped(log_c_base_PA, groups, objective)
    means, maxima = jax.lax.stop_gradient((means, maxima))
    return Metrics(sums={}, means=means, maxima=maxima)


def _importance(branches: Branches) -> Float[Array, "B T"]:
    """pi_old / pi_sampler of each token, before the truncation."""
    return truncated_importance(branches.old_logprob_BT, branches.sampler_logprob_BT, math.inf)


def reward_means(
    reward_PK: Float[ArrayLike, "P K"],
    baseline_P: Float[ArrayLike, " P"],
    kept_P: Bool[ArrayLike, " P"],
    objective: ObjectiveConfig,
) -> dict[str, Pair]:
    """Rewards, and how many groups tell their traces apart, over the groups that are kept."""
    reward_PK, baseline_P = jnp.asarray(reward_PK), jnp.asarray(baseline_P)
    prompts = masked_count(kept_P)
    traces, kept_P1 = prompts * reward_PK.shape[1], jnp.asarray(kept_P)[:, None]
    kept_PK = jnp.broadcast_to(kept_P1, reward_PK.shape)
    zero_std_P = zero_std(reward_PK, baseline_P, objective.estimator)
    above_PK = reward_PK > baseline_P[:, None]
    return {
        "reward/mean": (masked_sum(reward_PK, kept_PK), traces),
        "reward/baseline": (masked_sum(baseline_P, kept_P), prompts),
        "reward/above_baseline_share": (masked_sum(above_PK, kept_PK), traces),
        "reward/no_spread_share": (masked_sum(zero_std_P, kept_P), prompts),
    }


def _capped(log_c_base_PA: Float[Array, "P A"], groups: Groups, objective: ObjectiveConfig) -> Pair:
    mask_PA = answer_mask(groups)
    _, capped_PA = ws_weights(
        objective.scheme,
        log_c_base_PA,
        mask_PA,
        ws_normalisation=objective.ws_normalisation,
        weight_cap=objective.weight_cap,
    )
    return masked_count(capped_PA), masked_count(mask_PA)
