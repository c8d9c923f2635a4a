"""The NRT loss of one micro-batch: one forward pass, then rewards, advantages and loss terms.

Letters: P prompts, K traces a prompt, B = P * K sequences, S prompt tokens, T predicted tokens of a
branch, A answer tokens, U = A + 1 predicted tokens of a baseline branch, D model dim.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.log_probs import TokenScores, token_scores
from nrt_jax.objective import losses
from nrt_jax.objective.advantages import advantages, has_spread
from nrt_jax.objective.aggregation import WS_SCHEMES, aggregate, ws_weights
from nrt_jax.objective.config import ObjectiveConfig
from nrt_jax.objective.masked import masked_count, masked_fill, masked_sum
from nrt_jax.training.batch import TargetMasks, TrainBatch, answer_mask, at_answer, target_masks
from nrt_jax.training.step import Metrics


class NrtSettings(NamedTuple):
    """What the loss needs to know besides weights and data."""

    definition: nnx.GraphDef
    objective: ObjectiveConfig
    think_start: int
    think_end: int
    temperature: float
    chunk_tokens: int


class SamplingScores(NamedTuple):
    """What was measured under the sampling policy before the first update; None: not asked for."""

    log_c_base_PA: Float[Array, "P A"] | None = None
    log_c_PKA: Float[Array, "P K A"] | None = None
    old_log_prob_PKT: Float[Array, "P K T"] | None = None
    ref_log_prob_PKT: Float[Array, "P K T"] | None = None


class Rewards(NamedTuple):
    """Rewards of the traces, and what follows from them; all constants to the gradient."""

    reward_PK: Float[Array, "P K"]
    baseline_P: Float[Array, " P"]
    advantage_PK: Float[Array, "P K"]
    token_signal_PKA: Float[Array, "P K A"]


def run_prompts(
    decoder: Decoder, batch: TrainBatch
) -> tuple[Float[Array, "P 1 D"], KVPrefix]:
    """Every x once: the hidden state at its last token, and the keys and values for its branches."""
    P, S = batch.prompt_PS.shape
    positions_PS = jnp.broadcast_to(jnp.arange(S), (P, S))
    valid_PS = positions_PS < batch.prompt_length_P[:, None]
    hidden_PSD, prefix = decoder.hidden(batch.prompt_PS, positions_PS, valid_PS)
    last_P11 = batch.prompt_length_P[:, None, None] - 1
    return jnp.take_along_axis(hidden_PSD, last_P11, axis=1), prefix


def score_branches(
    decoder: Decoder, settings: NrtSettings, prefix: KVPrefix, batch: TrainBatch
) -> TokenScores:
    """log pi of every target of every branch, and the entropy there, [P, K, T].

    Targets of z are scored at the sampling temperature, t_end and y* at 1.
    """
    P, K, _ = batch.branch_PKW.shape
    masks = target_masks(batch)
    inverse_PKT = jnp.where(masks.trace_PKT, 1.0 / settings.temperature, 1.0)
    scores = _score_rows(
        decoder,
        settings,
        prefix,
        jnp.repeat(batch.prompt_length_P, K),
        batch.branch_PKW.reshape(P * K, -1),
        masks.valid_PKT.reshape(P * K, -1),
        inverse_PKT.reshape(P * K, -1),
    )
    return jax.tree.map(lambda x_BT: x_BT.reshape(P, K, -1), scores)


def score_baseline(
    decoder: Decoder, settings: NrtSettings, prefix: KVPrefix, batch: TrainBatch
) -> Float[Array, "P A"]:
    """log c_base: y* after an empty trace, `t_start t_end y*`, once a prompt."""
    P, A = batch.answer_PA.shape
    think_P2 = jnp.tile(jnp.asarray([[settings.think_start, settings.think_end]]), (P, 1))
    branch_PW = jnp.concatenate([think_P2.astype(jnp.int32), batch.answer_PA], axis=1)
    valid_PU = jnp.arange(A + 1)[None] <= batch.answer_length_P[:, None]
    scores = _score_rows(
        decoder, settings, prefix, batch.prompt_length_P, branch_PW, valid_PU, jnp.ones((P, A + 1))
    )
    return scores.log_prob_BT[:, 1:]


def _score_rows(
    decoder, settings, prefix, start_B, branch_BW, valid_BT, inverse_temperature_BT
) -> TokenScores:
    positions_BT = start_B[:, None] + jnp.arange(branch_BW.shape[1] - 1)[None]
    hidden_BTD, _ = decoder.hidden(branch_BW[:, :-1], positions_BT, valid_BT, prefix)
    return token_scores(
        hidden_BTD,
        decoder.head_DV(),
        branch_BW[:, 1:],
        chunk_tokens=settings.chunk_tokens,
        inverse_temperature_BT=inverse_temperature_BT,
    )


def nrt_loss(
    params: Any, batch: TrainBatch, scored: SamplingScores, sequences: int, settings: NrtSettings
) -> tuple[Float[Array, ""], Metrics]:
    """Share of these groups in the loss of a mini-batch of `sequences` traces (Algorithm 1).

    One forward pass gives log pi(z), c and, unless it was scored before, c_base. Sums over tokens
    are divided by length_constant * sequences, so micro-batches add up to the same loss.
    """
    decoder = nnx.merge(settings.definition, params)
    last_P1D, prefix = run_prompts(decoder, batch)
    scores = score_branches(decoder, settings, prefix, batch)
    log_c_base_PA = scored.log_c_base_PA
    if log_c_base_PA is None:
        frozen = nnx.merge(settings.definition, jax.lax.stop_gradient(params))
        prefix = jax.lax.stop_gradient(prefix)
        log_c_base_PA = score_baseline(frozen, settings, prefix, batch)
    log_c_PKA = at_answer(scores.log_prob_BT, batch)
    judged_PKA = log_c_PKA if scored.log_c_PKA is None else scored.log_c_PKA
    rewards = compute_rewards(judged_PKA, log_c_base_PA, batch, settings.objective)
    start_log_prob_P = _start_log_prob(decoder, settings, last_P1D)
    terms, policy_metrics = _loss_terms(
        scores, log_c_PKA, rewards, start_log_prob_P, batch, scored, settings
    )
    share = 1.0 / (settings.objective.length_constant * sequences)
    terms = {name: term * share for name, term in terms.items()}
    metrics = Metrics(
        sums={f"loss/{name}": term for name, term in terms.items()},
        means=policy_metrics.means | _reward_metrics(rewards, log_c_base_PA, batch, settings),
        maxima=policy_metrics.maxima,
    )
    return sum(terms.values(), start=jnp.zeros(())), metrics


def compute_rewards(
    log_c_PKA: Float[Array, "P K A"],
    log_c_base_PA: Float[Array, "P A"],
    batch: TrainBatch,
    objective: ObjectiveConfig,
) -> Rewards:
    """R, R_base, A and S from the answer's confidences (Eq. 6, 9, 10; Table 1)."""
    P, K, A = log_c_PKA.shape
    mask_PA = answer_mask(batch)
    log_c_base_BA = jnp.repeat(log_c_base_PA, K, axis=0)
    mask_BA = jnp.repeat(mask_PA, K, axis=0)
    how = {"ws_normalisation": objective.ws_normalisation, "weight_cap": objective.weight_cap}
    reward_B, signal_BA = aggregate(
        objective.scheme, log_c_PKA.reshape(P * K, A), log_c_base_BA, mask_BA, **how
    )
    baseline_P, _ = aggregate(objective.scheme, log_c_base_PA, log_c_base_PA, mask_PA, **how)
    reward_PK = reward_B.reshape(P, K)
    if objective.token_signal == "fixed":
        signal_BA = mask_BA.astype(jnp.float32)
    advantage_PK = advantages(reward_PK, baseline_P, estimator=objective.estimator)
    rewards = Rewards(reward_PK, baseline_P, advantage_PK, signal_BA.reshape(P, K, A))
    return jax.lax.stop_gradient(rewards)


def _start_log_prob(
    decoder: Decoder, settings: NrtSettings, last_P1D: Float[Array, "P 1 D"]
) -> Float[Array, " P"]:
    """log pi(t_start | x): the same for all traces of a prompt."""
    targets_P1 = jnp.full(last_P1D.shape[:2], settings.think_start, jnp.int32)
    scores = token_scores(
        last_P1D, decoder.head_DV(), targets_P1, chunk_tokens=settings.chunk_tokens
    )
    return scores.log_prob_BT[:, 0]


def _loss_terms(
    scores: TokenScores,
    log_c_PKA: Float[Array, "P K A"],
    rewards: Rewards,
    start_log_prob_P: Float[Array, " P"],
    batch: TrainBatch,
    scored: SamplingScores,
    settings: NrtSettings,
) -> tuple[dict[str, Float[Array, ""]], Metrics]:
    """Sums over the tokens of this micro-batch, one a term, and the policy's metrics."""
    objective = settings.objective
    P, K, T = scores.log_prob_BT.shape
    masks = target_masks(batch)
    covered_BT = _covered(masks, batch, objective).reshape(P * K, T)
    sampler_BT = batch.sampler_log_prob_PKT.reshape(P * K, T)
    log_prob_BT = masked_fill(scores.log_prob_BT.reshape(P * K, T), masks.valid_PKT.reshape(-1, T))
    old_BT = sampler_BT
    if scored.old_log_prob_PKT is not None:
        old_BT = scored.old_log_prob_PKT.reshape(P * K, T)
    surrogate = {"ppo_clip": losses.ppo_clip, "cispo": losses.cispo}[objective.policy_loss]
    policy = surrogate(
        log_prob_BT,
        masked_fill(old_BT, covered_BT),
        rewards.advantage_PK.reshape(P * K),
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
    )
    trace_BT = policy.loss_BT
    if objective.importance_cap is not None:
        trace_BT *= losses.truncated_importance(old_BT, sampler_BT, objective.importance_cap)
    trace_mask_BT = masks.trace_PKT.reshape(P * K, T)
    token_PKA = losses.token_loss(log_c_PKA, rewards.token_signal_PKA)
    if objective.token_ratio == "trace":
        cap = objective.token_ratio_cap
        ratio_B = losses.trace_ratio(log_prob_BT, old_BT, trace_mask_BT, cap)
        token_PKA *= ratio_B.reshape(P, K, 1)
    end_log_prob_B = masked_sum(log_prob_BT, masks.end_PKT.reshape(P * K, T), axis=1)
    format_B = losses.format_loss(
        jnp.repeat(start_log_prob_P, K),
        end_log_prob_B,
        batch.end_emitted_PK.reshape(P * K),
        where=objective.format_where,
    )
    answer_PKA = jnp.broadcast_to(answer_mask(batch)[:, None], token_PKA.shape)
    entropy_BT = scores.entropy_BT.reshape(P * K, T)
    terms = {
        "trace": masked_sum(trace_BT, covered_BT),
        "token": masked_sum(token_PKA, answer_PKA),
        "format": objective.format_coefficient * jnp.sum(format_B),
    }
    if objective.entropy_coefficient:
        terms["entropy"] = -objective.entropy_coefficient * masked_sum(entropy_BT, trace_mask_BT)
    if scored.ref_log_prob_PKT is not None:
        ref_BT = scored.ref_log_prob_PKT.reshape(P * K, T)
        kl_BT = losses.kl_k3(log_prob_BT, masked_fill(ref_BT, trace_mask_BT))
        terms["kl"] = objective.kl_coefficient * masked_sum(kl_BT, trace_mask_BT)
    return terms, _policy_metrics(policy, log_prob_BT, sampler_BT, entropy_BT, covered_BT, format_B)


def _covered(masks: TargetMasks, batch: TrainBatch, objective: ObjectiveConfig) -> Array:
    """Targets of the trace term: z, and with z_and_end also a t_end that the model wrote."""
    if objective.trace_covers == "z":
        return masks.trace_PKT
    return masks.trace_PKT | (masks.end_PKT & batch.end_emitted_PK[:, :, None])


def _policy_metrics(
    policy: losses.PolicyTerms,
    log_prob_BT: Float[Array, "B T"],
    sampler_BT: Float[Array, "B T"],
    entropy_BT: Float[Array, "B T"],
    covered_BT: Array,
    format_B: Float[Array, " B"],
) -> Metrics:
    """How far the trainer's policy is from the one that sampled, over the trace tokens."""
    tokens = masked_count(covered_BT)
    mismatch_BT = masked_fill(jnp.abs(log_prob_BT - sampler_BT), covered_BT)
    means = {
        "policy/entropy": (masked_sum(entropy_BT, covered_BT), tokens),
        "policy/ratio": (masked_sum(policy.ratio_BT, covered_BT), tokens),
        "policy/clip_share": (masked_sum(policy.clipped_BT, covered_BT), tokens),
        "mismatch/mean": (masked_sum(mismatch_BT, covered_BT), tokens),
        "policy/format_nats": (jnp.sum(format_B), jnp.float32(format_B.size)),
    }
    return Metrics({}, jax.lax.stop_gradient(means), {"mismatch/max": jnp.max(mismatch_BT)})


def _reward_metrics(
    rewards: Rewards,
    log_c_base_PA: Float[Array, "P A"],
    batch: TrainBatch,
    settings: NrtSettings,
) -> dict[str, tuple[Array, Array]]:
    """Rewards and the groups' shapes; every value is a (sum, count) pair."""
    objective = settings.objective
    P, K = rewards.reward_PK.shape
    spread_P = has_spread(rewards.reward_PK, rewards.baseline_P, objective.estimator)
    above_PK = rewards.reward_PK > rewards.baseline_P[:, None]
    traces, prompts = jnp.float32(P * K), jnp.float32(P)
    means = {
        "reward/mean": (jnp.sum(rewards.reward_PK), traces),
        "reward/baseline": (jnp.sum(rewards.baseline_P), prompts),
        "reward/above_baseline_share": (jnp.sum(above_PK), traces),
        "reward/no_spread_share": (jnp.sum(~spread_P), prompts),
    }
    if objective.scheme in WS_SCHEMES:
        mask_PA = answer_mask(batch)
        _, capped_PA = ws_weights(
            objective.scheme,
            log_c_base_PA,
            mask_PA,
            ws_normalisation=objective.ws_normalisation,
            weight_cap=objective.weight_cap,
        )
        means["reward/capped_weight_share"] = (jnp.sum(capped_PA), masked_count(mask_PA))
    return jax.lax.stop_gradient(means)
