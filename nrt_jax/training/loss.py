"""The NRT loss of one micro-batch: one forward pass, then rewards, advantages and loss terms.

Letters: P prompts, K traces a prompt, B = P * K sequences, T predicted tokens of a branch,
A answer tokens.
"""

from typing import Any

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.objective import losses
from nrt_jax.objective.masked import masked_fill, masked_sum
from nrt_jax.objective.rewards import Rewards, compute_rewards
from nrt_jax.training.batch import Groups, TrainBatch, answer_mask, at_answer, flat_groups
from nrt_jax.training.forward import (
    Branches,
    NrtSettings,
    SamplingScores,
    as_branches,
    run_prompts,
    score_baseline,
    score_branches,
    score_start,
)
from nrt_jax.training.loss_metrics import measure
from nrt_jax.training.update import Metrics


def nrt_loss(
    params: Any, batch: TrainBatch, scored: SamplingScores, *, sequences: int, settings: NrtSettings
) -> tuple[Float[Array, ""], Metrics]:
    """Share of these groups in the loss of a mini-batch of `sequences` traces (Algorithm 1).

    One forward pass gives log pi(z), c and, unless it was scored before, c_base. Sums over tokens
    are divided by length_constant * sequences, so the shares of micro-batches add up to one loss;
    groups that are not kept are among the sequences, and have no part in any sum.
    """
    objective = settings.objective
    decoder = nnx.merge(settings.definition, params)
    groups, scored = flat_groups((batch.groups, scored))
    prompts = run_prompts(decoder, batch)
    scores = score_branches(decoder, settings, prompts, batch)
    branches = as_branches(scores, groups, scored, objective)
    log_c_PKA = at_answer(scores.logprob_BT.reshape(groups.sampler_logprob_PKT.shape), groups)
    log_c_base_PA = scored.log_c_base_PA
    if log_c_base_PA is None:
        log_c_base_PA = score_baseline(decoder, settings, prompts, batch)
    judged_PKA = log_c_PKA if scored.log_c_PKA is None else scored.log_c_PKA
    rewards = compute_rewards(judged_PKA, log_c_base_PA, answer_mask(groups), objective)

    policy = _policy_terms(branches, rewards, objective)
    start_logprob_P = score_start(decoder, settings, prompts)
    format_B = _format_terms(branches, start_logprob_P, groups, objective)
    terms = {
        "trace": _trace_term(policy, branches, objective),
        "token": _token_term(log_c_PKA, rewards, branches, groups, objective),
        "format": objective.format_coefficient * jnp.sum(format_B),
    } | _regularisers(branches, scored, objective)
    share = 1.0 / (objective.length_constant * sequences)
    losses_by_term = {f"loss/{name}": term * share for name, term in terms.items()}
    measured = measure(policy, branches, rewards, format_B, log_c_base_PA, groups, objective)
    loss = sum(losses_by_term.values(), start=jnp.zeros(()))
    return loss, measured._replace(sums=losses_by_term)


def _policy_terms(
    branches: Branches, rewards: Rewards, objective: ObjectiveConfig
) -> losses.PolicyTerms:
    """The clipped policy gradient of each trace token, with its ratio."""
    surrogate = {"ppo_clip": losses.ppo_clip, "cispo": losses.cispo}[objective.policy_loss]
    return surrogate(
        branches.logprob_BT,
        branches.old_logprob_BT,
        rewards.advantage_PK.reshape(-1),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )


def _trace_term(
    policy: losses.PolicyTerms, branches: Branches, objective: ObjectiveConfig
) -> Float[Array, ""]:
    """-sum A log pi(z), clipped; optionally corrected for a sampler that rounds otherwise."""
    loss_BT = policy.loss_BT
    if objective.importance_cap is not None:
        loss_BT *= losses.truncated_importance(
            branches.old_logprob_BT, branches.sampler_logprob_BT, objective.importance_cap
        )
    return masked_sum(loss_BT, branches.covered_BT)


def _token_term(
    log_c_PKA: Float[Array, "P K A"],
    rewards: Rewards,
    branches: Branches,
    groups: Groups,
    objective: ObjectiveConfig,
) -> Float[Array, ""]:
    """-sum S_i log c_i, with Eq. 23's r_k where it is asked for."""
    P, K, A = log_c_PKA.shape
    signal_BA = rewards.token_signal_PKA.reshape(P * K, A)
    loss_BA = losses.token_loss(log_c_PKA.reshape(P * K, A), signal_BA)
    if objective.token_ratio == "trace":
        ratio_B = losses.trace_ratio(
            branches.logprob_BT,
            branches.old_logprob_BT,
            branches.trace_BT,
            objective.token_ratio_cap,
        )
        loss_BA *= ratio_B[:, None]
    return masked_sum(loss_BA, jnp.repeat(answer_mask(groups), K, axis=0))


def _format_terms(
    branches: Branches,
    start_logprob_P: Float[Array, " P"],
    groups: Groups,
    objective: ObjectiveConfig,
) -> Float[Array, " B"]:
    """Cross-entropy of t_start and t_end of each trace (Eq. 11)."""
    K = groups.end_emitted_PK.shape[1]
    format_B = losses.format_loss(
        jnp.repeat(start_logprob_P, K),
        masked_sum(branches.logprob_BT, branches.end_BT, axis=1),
        groups.end_emitted_PK.reshape(-1),
        where=objective.format_where,
    )
    return masked_fill(format_B, jnp.repeat(groups.kept_P, K))


def _regularisers(
    branches: Branches, scored: SamplingScores, objective: ObjectiveConfig
) -> dict[str, Float[Array, ""]]:
    """KL and entropy over the trace tokens, where their coefficients are not 0."""
    terms = {}
    if objective.entropy_coefficient:
        entropy = masked_sum(branches.entropy_BT, branches.trace_BT)
        terms["entropy"] = -objective.entropy_coefficient * entropy
    if scored.ref_logprob_PKT is not None:
        ref_BT = scored.ref_logprob_PKT.reshape(branches.trace_BT.shape)
        ref_BT = masked_fill(ref_BT, branches.trace_BT)
        kl_BT = losses.kl_k3(branches.logprob_BT, ref_BT)
        terms["kl"] = objective.kl_coefficient * masked_sum(kl_BT, branches.trace_BT)
    return terms
