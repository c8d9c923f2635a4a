"""The forward pass: every prompt once, then its K completions and its baseline.

Rows leave this file as [P, K, T] and [P, A]. Letters: those of batch.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.make import trace_banned_ids
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.logprobs import TokenLogprobs
from nrt_jax.models.rows import SideBySide, TokenRows
from nrt_jax.training.batch import CompletionRows, NrtBatch, unpack


class NrtSettings(NamedTuple):
    """What the loss needs besides weights and data."""

    definition: nnx.GraphDef
    objective: ObjectiveConfig
    think_start: int
    think_end: int
    temperature: float
    """The sampler's: z is scored under the distribution that it was drawn from."""
    chunk_tokens: int
    banned_ids: tuple[int, ...] = ()
    """Tokens that the sampler never draws in z: z is scored without them."""
    stale: bool = False
    """Whether weights older than those of the step drew the traces, and scored their answers."""


def loss_settings(config: RunConfig, model: Model, tokenizer: Tokenizer) -> NrtSettings:
    """The settings of a run's loss."""
    return NrtSettings(
        definition=model.definition,
        objective=config.objective,
        think_start=tokenizer.think_start_id,
        think_end=tokenizer.think_end_id,
        temperature=config.rollout.temperature,
        chunk_tokens=config.model.logprob_chunk_tokens,
        banned_ids=tuple(sorted(trace_banned_ids(config, tokenizer))),
        stale=config.rollout.staleness > 0,
    )


class Completions(NamedTuple):
    """Logprobs of all completions, and which of their targets each term of the loss covers."""

    logprob_PKT: Float[Array, "P K T"]
    """0 at padding."""
    old_PKT: Float[Array, "P K T"]
    """Of the policy that the ratio compares with; 0 where not covered."""
    sampler_PKT: Float[Array, "P K T"]
    """Of the engine; 0 where not covered."""
    entropy_PKT: Float[Array, "P K T"]
    trace_PKT: Bool[Array, "P K T"]
    end_PKT: Bool[Array, "P K T"]
    covered_PKT: Bool[Array, "P K T"]
    """Targets of the trace term: z, and with z_and_end also a t_end that the model wrote."""


class GroupLogprobs(NamedTuple):
    """Logprobs of the groups of a micro-batch."""

    start_P: Float[Array, " P"]
    """log pi(t_start | x), which all traces of a prompt share."""
    logprob_PKT: Float[Array, "P K T"]
    """log pi of every target of every completion."""
    entropy_PKT: Float[Array, "P K T"]
    """Of the distribution of each of these targets."""
    log_c_base_PA: Float[Array, "P A"] | None
    """As `baseline_logprobs`; None where it was not asked for."""


def group_logprobs(
    decoder: Decoder, settings: NrtSettings, batch: NrtBatch, *, baselines: bool
) -> GroupLogprobs:
    """Run each x with its completions, and with its baseline if asked for, in one pass."""
    packs = len(batch.prompts.tokens_packs_S)
    prompts_BSD, hidden_BWD, *of_baselines = decoder.hidden_of_packs(
        TokenRows(*batch.prompts),
        _rows(batch.completions),
        constant=_rows(batch.baselines) if baselines else None,
    )
    start_P, scored = _score_completions(decoder, settings, batch, prompts_BSD, hidden_BWD)
    start_PK, T = batch.groups.completion_start_PK, batch.groups.sampler_logprob_PKT.shape[2]
    logprob_PKT, entropy_PKT = (unpack(x_BW, start_PK, packs, T) for x_BW in scored)
    log_c_base_PA = None
    if baselines:
        log_c_base_PA = _score_baselines(decoder, settings, batch, *of_baselines)
    return GroupLogprobs(start_P, logprob_PKT, entropy_PKT, log_c_base_PA)


def baseline_logprobs(
    decoder: Decoder, settings: NrtSettings, batch: NrtBatch
) -> Float[Array, "P A"]:
    """log c_base: y* after an empty trace, `t_start t_end y*`, once per prompt; no gradient."""
    _, hidden_BWD = decoder.hidden_of_packs(
        TokenRows(*batch.prompts), constant=_rows(batch.baselines)
    )
    return _score_baselines(decoder, settings, batch, hidden_BWD)


def _score_baselines(
    decoder: Decoder, settings: NrtSettings, batch: NrtBatch, hidden_BWD: Float[Array, "B W D"]
) -> Float[Array, "P A"]:
    decoder = nnx.merge(*jax.lax.stop_gradient(nnx.split(decoder)))
    scored = score_rows(decoder, settings, hidden_BWD, batch.baselines)
    # The first target of a baseline is t_end.
    start_P, A = batch.groups.baseline_start_P + 1, batch.groups.answer_PA.shape[1]
    return unpack(scored.logprob_BT, start_P, len(batch.prompts.tokens_packs_S), A)


def _rows(rows: CompletionRows) -> TokenRows:
    return TokenRows(rows.inputs_BW, rows.positions_BW, rows.segments_BW, rows.prompts_BW)


def _score_completions(
    decoder: Decoder,
    settings: NrtSettings,
    batch: NrtBatch,
    prompts_BSD: Float[Array, "packs S D"],
    hidden_BWD: Float[Array, "B W D"],
) -> tuple[Float[Array, " P"], TokenLogprobs]:
    """log pi of t_start after each x, and of every target of the rows, by one pass of the head."""
    packs, shards = len(prompts_BSD), decoder.context_shards
    last = batch.groups.prompt_last_P.reshape(packs, -1)
    groups = last.shape[1]
    # Positions that nobody reads let the tokens divide over the devices.
    last = jnp.pad(last, ((0, 0), (0, -groups % shards)))
    start_BgD = jnp.take_along_axis(prompts_BSD, last[..., None], axis=1)
    targets_Bg = jnp.full(last.shape, settings.think_start, jnp.int32)
    layout = SideBySide.of((start_BgD, hidden_BWD), packs, shards)
    scored = _score(
        decoder,
        settings,
        layout.join((start_BgD, hidden_BWD)),
        layout.join((targets_Bg, batch.completions.targets_BW)),
        layout.join((jnp.zeros(last.shape, bool), batch.completions.trace_BW)),
    )
    (start_Bg, logprob_BW), (_, entropy_BW) = (layout.split(x) for x in scored)
    return start_Bg[:, :groups].reshape(-1), TokenLogprobs(logprob_BW, entropy_BW)


def score_rows(
    decoder: Decoder, settings: NrtSettings, hidden_BWD: Float[Array, "B W D"], rows: CompletionRows
) -> TokenLogprobs:
    """log pi of every target of the rows, and the entropy there, as [B, W]."""
    return _score(decoder, settings, hidden_BWD, rows.targets_BW, rows.trace_BW)


def _score(
    decoder: Decoder,
    settings: NrtSettings,
    hidden_BWD: Float[Array, "B W D"],
    targets_BW: Int[Array, "B W"],
    trace_BW: Bool[Array, "B W"],
) -> TokenLogprobs:
    """Score targets of z at the sampling temperature, among the tokens that the sampler may draw.

    Others, such as t_end and y*, are scored at temperature 1 and among all tokens.
    """
    return decoder.token_logprobs(
        hidden_BWD,
        targets_BW,
        settings.chunk_tokens,
        jnp.where(trace_BW, 1.0 / settings.temperature, 1.0),
        banned_ids=settings.banned_ids,
        banned_BT=trace_BW,
    )
