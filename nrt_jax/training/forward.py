"""The forward pass of the groups: every prompt once, then its K traces and its empty trace.

Letters: those of batch.py; B = P * K branches, D model dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.logprobs import TokenLogprobs
from nrt_jax.objective.masked import masked_fill
from nrt_jax.training.batch import (
    BranchRows,
    Groups,
    TrainBatch,
    flat_rows,
    from_rows,
    target_masks,
)


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
    """What was measured under the sampling policy before the first update; None: not asked for.

    With [U, G] in the place of P, like the groups of a batch.
    """

    log_c_base_PA: Float[Array, "*P A"] | None = None
    log_c_PKA: Float[Array, "*P K A"] | None = None
    old_logprob_PKT: Float[Array, "*P K T"] | None = None
    ref_logprob_PKT: Float[Array, "*P K T"] | None = None
    """Under the weights before the first step, for the KL term."""


class Branches(NamedTuple):
    """Logprobs and masks of all branches, one row a sequence."""

    logprob_BT: Float[Array, "B T"]
    """0 at padding."""
    old_logprob_BT: Float[Array, "B T"]
    sampler_logprob_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]
    trace_BT: Bool[Array, "B T"]
    end_BT: Bool[Array, "B T"]
    covered_BT: Bool[Array, "B T"]
    """Targets of the trace term: z, and with z_and_end also a t_end that the model wrote."""


class Prompts(NamedTuple):
    """Every x after one pass: what its branches attend to, and its last hidden state."""

    prefix: KVPrefix
    last_UGD: Float[Array, "U G D"]


def run_prompts(decoder: Decoder, batch: TrainBatch) -> Prompts:
    """Run each x once, for all its branches."""
    hidden_USD, prefix = decoder.hidden(*batch.prompts)
    last_UG1 = batch.groups.prompt_last_P[:, :, None]
    return Prompts(prefix, jnp.take_along_axis(hidden_USD, last_UG1, axis=1))


def score_start(decoder: Decoder, settings: NrtSettings, prompts: Prompts) -> Float[Array, " P"]:
    """log pi(t_start | x): one value a prompt, the same for all its traces."""
    targets_UG = jnp.full(prompts.last_UGD.shape[:2], settings.think_start, jnp.int32)
    scores = decoder.scores(prompts.last_UGD, targets_UG, settings.chunk_tokens)
    return scores.logprob_BT.reshape(-1)


def score_branches(
    decoder: Decoder, settings: NrtSettings, prompts: Prompts, batch: TrainBatch
) -> TokenLogprobs:
    """log pi of every target of every branch, and the entropy there, as [P * K, T].

    Targets of z are scored at the sampling temperature, t_end and y* at 1.
    """
    scores = _score_rows(decoder, settings, prompts.prefix, batch.traces)
    start_UGK = batch.groups.branch_start_PK
    T = batch.groups.sampler_logprob_PKT.shape[-1]
    return TokenLogprobs(*(from_rows(x_URW, start_UGK, T).reshape(-1, T) for x_URW in scores))


def score_baseline(
    decoder: Decoder, settings: NrtSettings, prompts: Prompts, batch: TrainBatch
) -> Float[Array, "P A"]:
    """log c_base: y* after an empty trace, `t_start t_end y*`, once a prompt; no gradient."""
    decoder = nnx.merge(*jax.lax.stop_gradient(nnx.split(decoder)))
    prefix = jax.lax.stop_gradient(prompts.prefix)
    scores = _score_rows(decoder, settings, prefix, batch.baselines)
    A = batch.groups.answer_PA.shape[-1]
    # The first target is t_end.
    start_UG = batch.groups.baseline_start_P + 1
    return from_rows(scores.logprob_BT, start_UG, A).reshape(-1, A)


def _score_rows(
    decoder: Decoder, settings: NrtSettings, prefix: KVPrefix, rows: BranchRows
) -> TokenLogprobs:
    """Scores of every target of the rows, as [U, R, W]."""
    shape = rows.inputs_URW.shape
    rows_BW = flat_rows(rows)
    hidden_BWD, _ = decoder.hidden(
        rows_BW.inputs_URW, rows_BW.positions_URW, rows_BW.segments_URW, prefix, rows_BW.prompts_URW
    )
    inverse_BW = jnp.where(rows_BW.trace_URW, 1.0 / settings.temperature, 1.0)
    scores = decoder.scores(hidden_BWD, rows_BW.targets_URW, settings.chunk_tokens, inverse_BW)
    return TokenLogprobs(*(x.reshape(shape) for x in scores))


def as_branches(
    scores: TokenLogprobs, groups: Groups, scored: SamplingScores, objective: ObjectiveConfig
) -> Branches:
    """Flatten [P, K] to rows, and clear what padding holds."""
    rows = scores.logprob_BT.shape
    masks = target_masks(groups)
    covered_PKT = masks.trace_PKT
    if objective.trace_covers == "z_and_end":
        covered_PKT |= masks.end_PKT & groups.end_emitted_PK[:, :, None]
    covered_BT = covered_PKT.reshape(rows)
    sampler_BT = groups.sampler_logprob_PKT.reshape(rows)
    recomputed_PKT = scored.old_logprob_PKT
    old_BT = sampler_BT if recomputed_PKT is None else recomputed_PKT.reshape(rows)
    return Branches(
        logprob_BT=masked_fill(scores.logprob_BT, masks.valid_PKT.reshape(rows)),
        old_logprob_BT=masked_fill(old_BT, covered_BT),
        sampler_logprob_BT=masked_fill(sampler_BT, covered_BT),
        entropy_BT=scores.entropy_BT,
        trace_BT=masks.trace_PKT.reshape(rows),
        end_BT=masks.end_PKT.reshape(rows),
        covered_BT=covered_BT,
    )
