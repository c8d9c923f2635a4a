"""What a step tells of itself: rewards, groups, and how far the policy is from the sampler.

Letters: P prompts, K traces a prompt, B = P * K sequences, A answer tokens.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrt_jax.objective.advantages import has_spread
from nrt_jax.objective.aggregation import WS_SCHEMES, ws_weights
from nrt_jax.objective.config import ObjectiveConfig
from nrt_jax.objective.losses import PolicyTerms
from nrt_jax.objective.masked import masked_count, masked_fill, masked_sum
from nrt_jax.training.batch import TrainBatch, answer_mask
from nrt_jax.training.forward import Branches
from nrt_jax.training.rewards import Rewards
from nrt_jax.training.step import Metrics

Pair = tuple[Array, Array]
"""(sum, count): the mean over micro-batches is exact."""


def measure(
    policy: PolicyTerms,
    branches: Branches,
    rewards: Rewards,
    format_B: Float[Array, " B"],
    log_c_base_PA: Float[Array, "P A"],
    batch: TrainBatch,
    objective: ObjectiveConfig,
) -> Metrics:
    """Everything but the losses; `policy/format_nats` is the loss of Eq. 11 before its weight."""
    gap_BT = jnp.abs(branches.log_prob_BT - branches.sampler_log_prob_BT)
    gap_BT = masked_fill(gap_BT, branches.covered_BT)

    def mean_over_tokens(x_BT: Array) -> Pair:
        return masked_sum(x_BT, branches.covered_BT), masked_count(branches.covered_BT)

    means = {
        "policy/entropy": mean_over_tokens(branches.entropy_BT),
        "policy/ratio": mean_over_tokens(policy.ratio_BT),
        "policy/clip_share": mean_over_tokens(policy.clipped_BT),
        "policy/format_nats": (jnp.sum(format_B), jnp.float32(format_B.size)),
        "mismatch/mean": mean_over_tokens(gap_BT),
    }
    means |= _reward_means(rewards, objective)
    if objective.scheme in WS_SCHEMES:
        means["reward/capped_weight_share"] = _capped(log_c_base_PA, batch, objective)
    means, maxima = jax.lax.stop_gradient((means, {"mismatch/max": jnp.max(gap_BT)}))
    return Metrics(sums={}, means=means, maxima=maxima)


def _reward_means(rewards: Rewards, objective: ObjectiveConfig) -> dict[str, Pair]:
    P, K = rewards.reward_PK.shape
    traces, prompts = jnp.float32(P * K), jnp.float32(P)
    spread_P = has_spread(rewards.reward_PK, rewards.baseline_P, objective.estimator)
    above_PK = rewards.reward_PK > rewards.baseline_P[:, None]
    return {
        "reward/mean": (jnp.sum(rewards.reward_PK), traces),
        "reward/baseline": (jnp.sum(rewards.baseline_P), prompts),
        "reward/above_baseline_share": (jnp.sum(above_PK, dtype=jnp.float32), traces),
        "reward/no_spread_share": (jnp.sum(~spread_P, dtype=jnp.float32), prompts),
    }


def _capped(
    log_c_base_PA: Float[Array, "P A"], batch: TrainBatch, objective: ObjectiveConfig
) -> Pair:
    mask_PA = answer_mask(batch)
    _, capped_PA = ws_weights(
        objective.scheme,
        log_c_base_PA,
        mask_PA,
        ws_normalisation=objective.ws_normalisation,
        weight_cap=objective.weight_cap,
    )
    return masked_count(capped_PA), masked_count(mask_PA)
