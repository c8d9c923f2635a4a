"""Rows of the warm-up as arrays, and their loss.

Letters: those of batch.py. A row with z = (z1 z2), y* = (y1 eos), and the kind of each target:

    row      x1  x2       t_start  z1     z2     t_end   y1      eos
    input    x1  x2       t_start  z1     z2     t_end   y1
    target   x2  t_start  z1       z2     t_end  y1      eos
    kind     -   START    FIRST    TRACE  END    ANSWER  ANSWER

END has no loss where the model did not end z itself: z was cut, or it is the empty trace.
"""

from collections.abc import Sequence
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from nrt_jax.config.warmup import AllStage, RowsStage, WarmupConfig
from nrt_jax.objective.losses import sft_loss
from nrt_jax.objective.masked import masked_count, masked_sum
from nrt_jax.training.batch import write_text
from nrt_jax.training.packing import Lengths, Plan
from nrt_jax.training.update import Metrics
from nrt_jax.types import TokenizedExample


class Kind(IntEnum):
    """What a target is to the loss."""

    NOTHING = 0
    """x, padding, and a t_end that the model did not write."""
    START = 1
    FIRST = 2
    """The first token of z."""
    TRACE = 3
    """A later token of z."""
    END = 4
    ANSWER = 5
    """A token of y*, its eos included."""


class WarmupRow(NamedTuple):
    """A question with a text of the model in the place of z, and the reference answer."""

    example: TokenizedExample
    trace: Int[np.ndarray, "T"]
    """z; the empty trace has no tokens."""
    ended: bool
    """Whether the model ended the text itself, so that t_end belongs behind it."""

    def tokens(self, think_start: int, think_end: int) -> Int[np.ndarray, "T"]:
        """x t_start z t_end y*, and after t_start what a chat template writes there."""
        opened = self.example.trace_prompt(think_start)
        parts = (opened, self.trace, [think_end], self.example.answer_tokens)
        return np.concatenate(parts).astype(np.int32)

    @property
    def kinds(self) -> list[Kind]:
        """The kind of each target, which are the tokens after the first."""
        first, later = [Kind.FIRST] * bool(len(self.trace)), [Kind.TRACE] * (len(self.trace) - 1)
        end = Kind.END if self.ended else Kind.NOTHING
        answer = [Kind.ANSWER] * len(self.example.answer_tokens)
        x = [Kind.NOTHING] * (len(self.example.prompt_tokens) - 1)
        after_start = [Kind.NOTHING] * len(self.example.after_start_tokens)
        return [*x, Kind.START, *after_start, *first, *later, end, *answer]


class WarmupBatch(NamedTuple):
    """Packed rows, as inputs and targets."""

    inputs_BW: Int[Array, "B W"]
    targets_BW: Int[Array, "B W"]
    positions_BW: Int[Array, "B W"]
    segments_BW: Int[Array, "B W"]
    """Which of the texts of the row; 0 is padding."""
    kind_BW: Int[Array, "B W"]


def warmup_lengths(row: WarmupRow) -> Lengths:
    """Token counts of a row, for the packer: a completion of an empty prompt."""
    return Lengths(0, (len(row.kinds),), 0)


def warmup_batch(
    rows: Sequence[WarmupRow], plan: Plan, *, think_start: int, think_end: int
) -> WarmupBatch:
    """Pack the planned rows."""
    shape = plan.shape
    ids = partial(np.zeros, (shape.packs * shape.rows, shape.row_tokens), np.int32)
    batch = WarmupBatch(ids(), ids(), ids(), ids(), ids())
    for i, pack in enumerate(plan.packs):
        for member, ((row, start),) in zip(pack.groups, pack.completion_places, strict=True):
            tokens = rows[member].tokens(think_start, think_end)
            at = write_text(batch, (i * shape.rows + row, start), tokens)
            batch.kind_BW[at] = rows[member].kinds
    return batch


def kind_weights(warmup: WarmupConfig, stage: RowsStage | AllStage) -> Float[np.ndarray, "kinds"]:
    """Weight of each kind of target in the loss of a stage."""
    first = stage.first_token_weight if isinstance(stage, AllStage) else stage.trace_weight
    weights = {
        Kind.NOTHING: 0.0,
        Kind.START: warmup.start_weight,
        Kind.FIRST: first,
        Kind.TRACE: stage.trace_weight,
        Kind.END: warmup.end_weight,
        Kind.ANSWER: 1.0,
    }
    return np.asarray([weights[kind] for kind in Kind], np.float32)


def warmup_loss(
    params: Any,
    batch: WarmupBatch,
    weight_of_kind: Float[Array, "kinds"],
    total_weight: Float[Array, ""],
    definition: nnx.GraphDef,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Metrics]:
    """-sum w_i log pi(target_i) / total_weight, the sum of the weights of the whole update.

    The metrics are mean logprobs in nats: `start` of t_start, `end` of t_end where the model ended
    z, and per token `trace` and `answer`.
    """
    decoder = nnx.merge(definition, params)
    hidden_BWD, _ = decoder.hidden(batch.inputs_BW, batch.positions_BW, batch.segments_BW)
    scores = decoder.token_logprobs(hidden_BWD, batch.targets_BW, chunk_tokens)
    weight_BW = weight_of_kind[batch.kind_BW]
    loss = masked_sum(weight_BW * sft_loss(scores.logprob_BT), weight_BW) / total_weight
    kind_BW = batch.kind_BW
    masks = {
        "start": kind_BW == Kind.START,
        "trace": (kind_BW == Kind.FIRST) | (kind_BW == Kind.TRACE),
        "end": kind_BW == Kind.END,
        "answer": kind_BW == Kind.ANSWER,
    }
    logprob_BW = jax.lax.stop_gradient(scores.logprob_BT)
    means = {
        f"warmup/{name}_logprob": (masked_sum(logprob_BW, mask_BW), masked_count(mask_BW))
        for name, mask_BW in masks.items()
    }
    return loss, Metrics({"warmup/loss": loss}, means, {})
