"""The forward pass of the groups: every prompt once, then its K traces and its empty trace.

Letters: P prompts, K traces a prompt, B = P * K sequences, S prompt tokens, W branch tokens,
T = W - 1 predicted tokens of a branch, A answer tokens, D model dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.log_probs import TokenScores, token_scores
from nrt_jax.objective.config import ObjectiveConfig
from nrt_jax.objective.masked import masked_fill
from nrt_jax.training.batch import TrainBatch, target_masks


class NrtSettings(NamedTuple):
    """What the loss needs to know besides weights and data."""

    definition: nnx.GraphDef
    objective: ObjectiveConfig
    think_start: int
    think_end: int
    temperature: float
    """Of the sampler: z is scored under the distribution it was drawn from."""
    chunk_tokens: int


class SamplingScores(NamedTuple):
    """What was measured under the sampling policy before the first update; None: not asked for."""

    log_c_base_PA: Float[Array, "P A"] | None = None
    log_c_PKA: Float[Array, "P K A"] | None = None
    old_log_prob_PKT: Float[Array, "P K T"] | None = None
    ref_log_prob_PKT: Float[Array, "P K T"] | None = None
    """Under the weights before the first step, for the KL term."""


class Branches(NamedTuple):
    """Log-probs and masks of all branches, one row a sequence."""

    log_prob_BT: Float[Array, "B T"]
    """0 at padding."""
    old_log_prob_BT: Float[Array, "B T"]
    sampler_log_prob_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]
    trace_BT: Bool[Array, "B T"]
    end_BT: Bool[Array, "B T"]
    covered_BT: Bool[Array, "B T"]
    """Targets of the trace term: z, and with z_and_end also a t_end that the model wrote."""


class Prompts(NamedTuple):
    """Every x after one pass: what its branches attend to, and its last hidden state."""

    prefix: KVPrefix
    last_P1D: Float[Array, "P 1 D"]


def run_prompts(decoder: Decoder, batch: TrainBatch) -> Prompts:
    """Run each x once, for all its branches."""
    P, S = batch.prompt_PS.shape
    positions_PS = jnp.broadcast_to(jnp.arange(S), (P, S))
    valid_PS = positions_PS < batch.prompt_length_P[:, None]
    segments_PS = valid_PS.astype(jnp.int32)
    hidden_PSD, prefix = decoder.hidden(batch.prompt_PS, positions_PS, segments_PS)
    last_P11 = batch.prompt_length_P[:, None, None] - 1
    return Prompts(prefix, jnp.take_along_axis(hidden_PSD, last_P11, axis=1))


def score_start(decoder: Decoder, settings: NrtSettings, prompts: Prompts) -> Float[Array, " P"]:
    """log pi(t_start | x): one value a prompt, the same for all its traces."""
    targets_P1 = jnp.full(prompts.last_P1D.shape[:2], settings.think_start, jnp.int32)
    scores = token_scores(
        prompts.last_P1D,
        decoder.head_DV(),
        targets_P1,
        vocab_size=decoder.architecture.vocab_size,
        chunk_tokens=settings.chunk_tokens,
    )
    return scores.log_prob_BT[:, 0]


def score_branches(
    decoder: Decoder, settings: NrtSettings, prompts: Prompts, batch: TrainBatch
) -> TokenScores:
    """log pi of every target of every branch, and the entropy there, as [P * K, T].

    Targets of z are scored at the sampling temperature, t_end and y* at 1.
    """
    P, K, W = batch.branch_PKW.shape
    masks = target_masks(batch)
    inverse_PKT = jnp.where(masks.trace_PKT, 1.0 / settings.temperature, 1.0)
    return _score_rows(
        decoder,
        settings,
        prompts.prefix,
        jnp.repeat(batch.prompt_length_P, K),
        batch.branch_PKW.reshape(P * K, W),
        masks.valid_PKT.reshape(P * K, W - 1),
        inverse_PKT.reshape(P * K, W - 1),
    )


def score_baseline(
    decoder: Decoder, settings: NrtSettings, prompts: Prompts, batch: TrainBatch
) -> Float[Array, "P A"]:
    """log c_base: y* after an empty trace, `t_start t_end y*`, once a prompt; no gradient."""
    decoder = nnx.merge(*jax.lax.stop_gradient(nnx.split(decoder)))
    prefix = jax.lax.stop_gradient(prompts.prefix)
    P, A = batch.answer_PA.shape
    think_P2 = jnp.tile(jnp.asarray([[settings.think_start, settings.think_end]]), (P, 1))
    branch_PW = jnp.concatenate([think_P2.astype(jnp.int32), batch.answer_PA], axis=1)
    valid_PT = jnp.arange(A + 1)[None] <= batch.answer_length_P[:, None]
    ones_PT = jnp.ones((P, A + 1))
    scores = _score_rows(
        decoder, settings, prefix, batch.prompt_length_P, branch_PW, valid_PT, ones_PT
    )
    return scores.log_prob_BT[:, 1:]


def _score_rows(
    decoder: Decoder,
    settings: NrtSettings,
    prefix: KVPrefix,
    start_B: Int[Array, " B"],
    branch_BW: Int[Array, "B W"],
    valid_BT: Bool[Array, "B T"],
    inverse_temperature_BT: Float[Array, "B T"],
) -> TokenScores:
    """Continue the prefix from position `start_B` with `branch_BW`; T = W - 1."""
    positions_BT = start_B[:, None] + jnp.arange(branch_BW.shape[1] - 1)[None]
    segments_BT = valid_BT.astype(jnp.int32)
    hidden_BTD, _ = decoder.hidden(branch_BW[:, :-1], positions_BT, segments_BT, prefix)
    return token_scores(
        hidden_BTD,
        decoder.head_DV(),
        branch_BW[:, 1:],
        vocab_size=decoder.architecture.vocab_size,
        chunk_tokens=settings.chunk_tokens,
        inverse_temperature_BT=inverse_temperature_BT,
    )


def as_branches(
    scores: TokenScores, batch: TrainBatch, scored: SamplingScores, objective: ObjectiveConfig
) -> Branches:
    """Flatten [P, K] to rows, and clear what padding holds."""
    rows = scores.log_prob_BT.shape
    masks = target_masks(batch)
    covered_PKT = masks.trace_PKT
    if objective.trace_covers == "z_and_end":
        covered_PKT |= masks.end_PKT & batch.end_emitted_PK[:, :, None]
    covered_BT = covered_PKT.reshape(rows)
    sampler_BT = batch.sampler_log_prob_PKT.reshape(rows)
    recomputed_PKT = scored.old_log_prob_PKT
    old_BT = sampler_BT if recomputed_PKT is None else recomputed_PKT.reshape(rows)
    return Branches(
        log_prob_BT=masked_fill(scores.log_prob_BT, masks.valid_PKT.reshape(rows)),
        old_log_prob_BT=masked_fill(old_BT, covered_BT),
        sampler_log_prob_BT=masked_fill(sampler_BT, covered_BT),
        entropy_BT=scores.entropy_BT,
        trace_BT=masks.trace_PKT.reshape(rows),
        end_BT=masks.end_PKT.reshape(rows),
        covered_BT=covered_BT,
    )
