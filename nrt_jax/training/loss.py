"""The NRT loss of one micro-batch (Algorithm 1), from the forward pass to the sums.

Letters: P prompts, K traces per prompt, T predicted tokens of a completion, A answer tokens.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, ArrayLike, Bool, Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.objective import losses
from nrt_jax.objective.masked import masked_fill, masked_sum
from nrt_jax.objective.rewards import Rewards, compute_rewards, of_equal_traces
from nrt_jax.objective.schemes import rewards_of
from nrt_jax.training.batch import (
    GroupArrays,
    NrtBatch,
    answer_mask,
    answer_values,
    target_masks,
)
from nrt_jax.training.forward import (
    Completions,
    NrtSettings,
    group_logprobs,
)
from nrt_jax.training.frozen_logprobs import FrozenLogprobs
from nrt_jax.training.loss_metrics import loss_metrics
from nrt_jax.training.update import Metrics


class TermWeights(NamedTuple):
    """Factor of each term of the loss: 1 in an update; 1 for one term and 0 for the others where
    that term's gradient is measured."""

    trace: Float[ArrayLike, ""]
    token: Float[ArrayLike, ""]
    format: Float[ArrayLike, ""]
    entropy: Float[ArrayLike, ""]
    kl: Float[ArrayLike, ""]

    @classmethod
    def only(cls, *names: str) -> "TermWeights":
        """1 for these terms, 0 for the others."""
        return cls(**{name: np.asarray(name in names, np.float32) for name in cls._fields})


ALL_TERMS = TermWeights.only(*TermWeights._fields)


class TraceValues(NamedTuple):
    """What the loss computes of each trace, under the weights before the update."""

    logprob_PKT: Float[Array, "P K T"]
    """Of every target: z, t_end and y*; 0 at padding."""
    log_c_PKA: Float[Array, "P K A"]
    log_c_base_PA: Float[Array, "P A"]
    reward_PK: Float[Array, "P K"]
    baseline_P: Float[Array, " P"]
    """Reward of the empty trace."""
    advantage_PK: Float[Array, "P K"]


def terms_of(objective: ObjectiveConfig) -> list[str]:
    """Names of the terms that the loss has, those with a coefficient of 0 left out."""
    has = {
        "format": objective.format_coefficient > 0,
        "entropy": objective.entropy_coefficient > 0,
        "kl": objective.kl_coefficient > 0,
    }
    return [name for name in TermWeights._fields if has.get(name, True)]


def nrt_loss(
    params: Any,
    batch: NrtBatch,
    frozen: FrozenLogprobs,
    weights: TermWeights = ALL_TERMS,
    *,
    sequences: int,
    settings: NrtSettings,
) -> tuple[Float[Array, ""], Metrics]:
    """This micro-batch's share of the loss of a mini-batch of `sequences` traces.

    Sums over tokens are divided by length_constant * sequences, so the shares of micro-batches add
    up to the loss of the mini-batch. Groups that are not kept count in `sequences` and are part of
    no sum. `weights` are arguments of the compiled program, so that one program serves the update
    and the measurement of each term's gradient.
    """
    objective, groups = settings.objective, batch.groups

    # Forward: x once, with its completions (z, y*) and its baseline (empty trace, y*).
    decoder, log_c_base_PA = nnx.merge(settings.definition, params), frozen.log_c_base_PA
    scored = group_logprobs(decoder, settings, batch, baselines=log_c_base_PA is None)
    completions = mask_completions(
        scored.logprob_PKT, scored.entropy_PKT, frozen, groups, objective
    )

    # Confidences c and c_base in the answer.
    log_c_PKA, mask_PA = answer_values(scored.logprob_PKT, groups), answer_mask(groups)
    if log_c_base_PA is None:
        log_c_base_PA = scored.log_c_base_PA
        assert log_c_base_PA is not None

    # Rewards, advantages and token signals: constants to the gradient.
    rewarded_PKA = log_c_PKA if frozen.log_c_PKA is None else frozen.log_c_PKA
    rewarded_PKA = of_equal_traces(rewarded_PKA, log_c_base_PA, groups.reward_source_PK)
    rewards = compute_rewards(rewarded_PKA, log_c_base_PA, mask_PA, objective)

    # Loss terms, summed over prompts, traces and tokens.
    policy = _policy_terms(completions, rewards, objective)
    format_PK = _format_losses(completions, scored.start_P, groups, objective)
    terms = {
        "trace": _trace_term(policy, completions, objective),
        "token": _token_term(log_c_PKA, mask_PA, rewards, completions, settings),
        "format": objective.format_coefficient * jnp.sum(format_PK),
    } | _regularisers(completions, frozen, objective)
    scale = 1.0 / (objective.length_constant * sequences)
    factors = weights._asdict()
    losses_by_term = {
        f"loss/{name}": term * (scale * factors[name]) for name, term in terms.items()
    }
    metrics = loss_metrics(
        policy, completions, rewards, format_PK, log_c_base_PA, groups, objective
    )
    loss = sum(losses_by_term.values(), start=jnp.zeros(()))
    of_traces = trace_values(completions, log_c_PKA, log_c_base_PA, rewards, objective)
    return loss, metrics._replace(sums=losses_by_term, of_traces=of_traces)


def trace_values(
    completions: Completions,
    log_c_PKA: Float[Array, "P K A"],
    log_c_base_PA: Float[Array, "P A"],
    rewards: Rewards,
    objective: ObjectiveConfig,
) -> TraceValues:
    """The values of the log of rollouts.

    They are outputs of every update, also of one that nobody logs: as outputs of some they would
    give these another program, which rounds differently.
    """
    reward_PK, baseline_P = (
        rewards_of(objective.scheme, x) for x in (rewards.log_reward_PK, rewards.log_baseline_P)
    )
    return TraceValues(
        logprob_PKT=completions.logprob_PKT,
        log_c_PKA=log_c_PKA,
        log_c_base_PA=log_c_base_PA,
        reward_PK=reward_PK,
        baseline_P=baseline_P,
        advantage_PK=rewards.advantage_PK,
    )


def mask_completions(
    logprob_PKT: Float[Array, "P K T"],
    entropy_PKT: Float[Array, "P K T"],
    frozen: FrozenLogprobs,
    groups: GroupArrays,
    objective: ObjectiveConfig,
) -> Completions:
    """Logprobs with 0 where nothing counts, and the masks of the loss terms."""
    masks = target_masks(groups)
    covered_PKT = masks.trace_PKT
    if objective.trace_covers == "z_and_end":
        covered_PKT |= masks.end_PKT & groups.end_emitted_PK[:, :, None]
    old_PKT = groups.sampler_logprob_PKT if frozen.old_PKT is None else frozen.old_PKT
    return Completions(
        logprob_PKT=masked_fill(logprob_PKT, masks.valid_PKT),
        old_PKT=masked_fill(old_PKT, covered_PKT),
        sampler_PKT=masked_fill(groups.sampler_logprob_PKT, covered_PKT),
        entropy_PKT=entropy_PKT,
        trace_PKT=masks.trace_PKT,
        end_PKT=masks.end_PKT,
        covered_PKT=covered_PKT,
    )


def _policy_terms(
    completions: Completions, rewards: Rewards, objective: ObjectiveConfig
) -> losses.PolicyTerms:
    """The clipped policy-gradient loss of each trace token, with its ratio."""
    policy_loss = {"ppo_clip": losses.ppo_clip, "cispo": losses.cispo}[objective.policy_loss]
    return policy_loss(
        completions.logprob_PKT,
        completions.old_PKT,
        rewards.advantage_PK,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )


def _trace_term(
    policy: losses.PolicyTerms, completions: Completions, objective: ObjectiveConfig
) -> Float[Array, ""]:
    """-sum A log pi(z), clipped; optionally corrected for a sampler that rounds differently."""
    loss_PKT = policy.loss_BT
    if objective.importance_cap is not None:
        loss_PKT *= losses.truncated_importance(
            completions.old_PKT, completions.sampler_PKT, objective.importance_cap
        )
    return masked_sum(loss_PKT, completions.covered_PKT)


def _token_term(
    log_c_PKA: Float[Array, "P K A"],
    mask_PA: Bool[Array, "P A"],
    rewards: Rewards,
    completions: Completions,
    settings: NrtSettings,
) -> Float[Array, ""]:
    """-sum S_i log c_i, times the r_k of Eq. 23 with `token_ratio: trace`."""
    loss_PKA = losses.token_loss(log_c_PKA, rewards.token_signal_PKA)
    if settings.objective.token_ratio == "trace":
        # Recomputed logprobs are those of the sampling policy unless the rollout is stale.
        ratio_PK = losses.trace_ratio(
            completions.logprob_PKT,
            completions.sampler_PKT if settings.stale else completions.old_PKT,
            completions.trace_PKT,
            settings.objective.token_ratio_cap,
        )
        loss_PKA *= ratio_PK[:, :, None]
    return masked_sum(loss_PKA, mask_PA[:, None])


def _format_losses(
    completions: Completions,
    start_logprob_P: Float[Array, " P"],
    groups: GroupArrays,
    objective: ObjectiveConfig,
) -> Float[Array, "P K"]:
    """Cross-entropy of t_start and t_end of each trace (Eq. 11)."""
    end_logprob_PK = masked_sum(completions.logprob_PKT, completions.end_PKT, axis=2)
    format_PK = losses.format_loss(
        jnp.broadcast_to(start_logprob_P[:, None], end_logprob_PK.shape),
        end_logprob_PK,
        groups.end_emitted_PK,
        groups.cut_PK,
        where=objective.format_where,
    )
    return masked_fill(format_PK, groups.kept_P[:, None])


def _regularisers(
    completions: Completions, frozen: FrozenLogprobs, objective: ObjectiveConfig
) -> dict[str, Float[Array, ""]]:
    """Entropy and KL over the trace tokens, where their coefficients are not 0."""
    terms, trace_PKT = {}, completions.trace_PKT
    if objective.entropy_coefficient:
        entropy = masked_sum(completions.entropy_PKT, trace_PKT)
        terms["entropy"] = -objective.entropy_coefficient * entropy
    if frozen.reference_PKT is not None:
        reference_PKT = masked_fill(frozen.reference_PKT, trace_PKT)
        kl_PKT = losses.kl_k3(completions.logprob_PKT, reference_PKT)
        terms["kl"] = objective.kl_coefficient * masked_sum(kl_PKT, trace_PKT)
    return terms
