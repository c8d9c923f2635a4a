"""The forward pass: every prompt once, then its K completions and its baseline.

Rows leave this file as [P, K, T] and [P, A]. Letters: those of batch.py.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float

from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.make import trace_banned_ids
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.logprobs import TokenLogprobs
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


class Prompts(NamedTuple):
    """The prompts after one pass."""

    prefix: KVPrefix
    """Keys and values that the completions attend to."""
    last_hidden: Float[Array, "packs groups D"]
    """At the last token of each x."""


def run_prompts(decoder: Decoder, batch: NrtBatch) -> Prompts:
    """Run each x once, for all its completions."""
    hidden, prefix = decoder.hidden(*batch.prompts)
    index = batch.groups.prompt_last_P.reshape(len(hidden), -1, 1)
    return Prompts(prefix, jnp.take_along_axis(hidden, index, axis=1))


def start_logprobs(decoder: Decoder, settings: NrtSettings, prompts: Prompts) -> Float[Array, " P"]:
    """log pi(t_start | x), which all traces of a prompt share."""
    targets = jnp.full(prompts.last_hidden.shape[:2], settings.think_start, jnp.int32)
    logprobs = decoder.token_logprobs(prompts.last_hidden, targets, settings.chunk_tokens)
    return logprobs.logprob_BT.reshape(-1)


def completion_logprobs(
    decoder: Decoder, settings: NrtSettings, prompts: Prompts, batch: NrtBatch
) -> tuple[Float[Array, "P K T"], Float[Array, "P K T"]]:
    """log pi of every target of every completion, and the entropy there.

    Targets of z are scored at the sampling temperature and among the tokens that the sampler may
    draw, t_end and y* at 1 and among all tokens.
    """
    rows = row_logprobs(decoder, settings, prompts.prefix, batch.completions)
    packs = len(batch.prompts.tokens_packs_S)
    start_PK, T = batch.groups.completion_start_PK, batch.groups.sampler_logprob_PKT.shape[2]
    logprob_PKT, entropy_PKT = (unpack(x_BW, start_PK, packs, T) for x_BW in rows)
    return logprob_PKT, entropy_PKT


def baseline_logprobs(
    decoder: Decoder, settings: NrtSettings, prompts: Prompts, batch: NrtBatch
) -> Float[Array, "P A"]:
    """log c_base: y* after an empty trace, `t_start t_end y*`, once per prompt; no gradient."""
    decoder = nnx.merge(*jax.lax.stop_gradient(nnx.split(decoder)))
    prefix = jax.lax.stop_gradient(prompts.prefix)
    rows = row_logprobs(decoder, settings, prefix, batch.baselines)
    # The first target of a baseline is t_end.
    start_P, A = batch.groups.baseline_start_P + 1, batch.groups.answer_PA.shape[1]
    return unpack(rows.logprob_BT, start_P, len(batch.prompts.tokens_packs_S), A)


def row_logprobs(
    decoder: Decoder, settings: NrtSettings, prefix: KVPrefix, rows: CompletionRows
) -> TokenLogprobs:
    """log pi of every target of the rows, and the entropy there, as [B, W]."""
    hidden_BWD, _ = decoder.hidden(
        rows.inputs_BW, rows.positions_BW, rows.segments_BW, prefix, rows.prompts_BW
    )
    inverse_temperature_BW = jnp.where(rows.trace_BW, 1.0 / settings.temperature, 1.0)
    return decoder.token_logprobs(
        hidden_BWD,
        rows.targets_BW,
        settings.chunk_tokens,
        inverse_temperature_BW,
        banned_ids=settings.banned_ids,
        banned_BT=rows.trace_BW,
    )
