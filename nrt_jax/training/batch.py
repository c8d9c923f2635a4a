"""Groups of traces as arrays: the layout of one training batch.

Letters: P prompts, K traces a prompt, S prompt tokens, W branch tokens, A answer tokens,
T = W - 1 predicted tokens.

A branch continues a prompt. With z = (z1 z2), y* = (y1 eos):

    branch   t_start  z1     z2     t_end  y1   eos
    input    t_start  z1     z2     t_end  y1
    target   z1       z2     t_end  y1     eos
    t        0        1      2      3      4

so with trace_length = 2, targets t < 2 are z, t = 2 is t_end, and t >= 3 are y*.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.records import Group, TokenizedExample


class TrainBatch(NamedTuple):
    """P prompts with K traces each; every array's first dim is P."""

    prompt_PS: Int[Array, "P S"]
    prompt_length_P: Int[Array, "P"]
    branch_PKW: Int[Array, "P K W"]
    trace_length_PK: Int[Array, "P K"]
    end_emitted_PK: Bool[Array, "P K"]
    """Whether the model wrote t_end itself."""
    answer_PA: Int[Array, "P A"]
    answer_length_P: Int[Array, "P"]
    sampler_log_prob_PKT: Float[Array, "P K T"]
    """The engine's log-probs of z, and of t_end where the model wrote it; 0 elsewhere."""
    kept_P: Bool[Array, "P"] | None = None
    """Groups that the loss is of, the others being padding; None: all."""


class SftBatch(NamedTuple):
    """Rows x y*; y* starts at prompt_length."""

    tokens_BW: Int[Array, "B W"]
    prompt_length_B: Int[Array, "B"]
    length_B: Int[Array, "B"]


def padded_length(length: int) -> int:
    """Round up to one of four lengths an octave, 8 at least: few shapes, under 25 % of padding."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


def nrt_batch(groups: Sequence[Group], *, think_start: int, think_end: int) -> TrainBatch:
    """Lay groups out as arrays; t_end is appended to every trace, emitted or not."""
    P, K = len(groups), len(groups[0].traces)
    examples = [group.example for group in groups]
    longest = max(
        len(trace.tokens) + len(group.example.answer_tokens) + 2
        for group in groups
        for trace in group.traces
    )
    W = padded_length(longest - 1) + 1
    prompt_PS, prompt_length_P = _pad([example.prompt_tokens for example in examples])
    answer_PA, answer_length_P = _pad([example.answer_tokens for example in examples])
    branch_PKW = np.zeros((P, K, W), np.int32)
    sampler_PKT = np.zeros((P, K, W - 1), np.float32)
    trace_length_PK = np.zeros((P, K), np.int32)
    end_emitted_PK = np.zeros((P, K), bool)
    for p, group in enumerate(groups):
        for k, trace in enumerate(group.traces):
            n = len(trace.tokens)
            answer = group.example.answer_tokens
            row = np.concatenate([[think_start], trace.tokens, [think_end], answer])
            branch_PKW[p, k, : len(row)] = row
            sampler_PKT[p, k, :n] = trace.log_probs
            trace_length_PK[p, k] = n
            if trace.end_token == think_end:
                end_emitted_PK[p, k] = True
                sampler_PKT[p, k, n] = trace.end_log_prob
    return TrainBatch(
        prompt_PS,
        prompt_length_P,
        branch_PKW,
        trace_length_PK,
        end_emitted_PK,
        answer_PA,
        answer_length_P,
        sampler_PKT,
    )


def kept_first(
    kept_P: Bool[np.ndarray, "P"], *, mini_batch: int, micro_count: int
) -> Int[np.ndarray, "P"]:
    """Order of the groups in which each mini-batch's first micro-batches hold those that are kept.

    Micro-batch i of a mini-batch takes its rows i, i + micro_count, ... (step.micro_batches):

        kept                 no   yes  no   yes
        order, 2 micro-batches   1    0    3    2      micro-batch 0: groups 1, 3; 1: groups 0, 2
    """
    order_P = np.arange(len(kept_P))
    for start in range(0, len(kept_P), mini_batch):
        rows = slice(start, start + mini_batch)
        sorted_rows = start + np.argsort(~kept_P[rows], kind="stable")
        order_P[rows] = sorted_rows.reshape(micro_count, -1).T.reshape(-1)
    return order_P


def sft_batch(examples: Sequence[TokenizedExample]) -> SftBatch:
    """Lay x y* out as rows."""
    rows = [np.concatenate([e.prompt_tokens, e.answer_tokens]) for e in examples]
    tokens_BW, length_B = _pad(rows, extra=1)
    prompt_length_B = np.asarray([len(e.prompt_tokens) for e in examples], np.int32)
    return SftBatch(tokens_BW, prompt_length_B, length_B)


def _pad(rows: Sequence[np.ndarray], extra: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Right-pad with zeros to one length; `extra` is what the length has beyond a bucket."""
    lengths = np.asarray([len(row) for row in rows], np.int32)
    padded = np.zeros((len(rows), padded_length(int(lengths.max()) - extra) + extra), np.int32)
    for row, target in zip(rows, padded, strict=True):
        target[: len(row)] = row
    return padded, lengths


class TargetMasks(NamedTuple):
    """Which predicted positions of a branch are z, which is t_end, and which are no padding."""

    trace_PKT: Bool[Array, "P K T"]
    end_PKT: Bool[Array, "P K T"]
    valid_PKT: Bool[Array, "P K T"]


def target_masks(batch: TrainBatch) -> TargetMasks:
    """Masks over the targets, from the lengths alone (see the table at the top of the file)."""
    order_T = jnp.arange(batch.branch_PKW.shape[2] - 1)[None, None]
    n_PK1, kept_P11 = batch.trace_length_PK[:, :, None], kept_mask(batch)[:, None, None]
    valid_PKT = order_T <= n_PK1 + batch.answer_length_P[:, None, None]
    return TargetMasks(
        (order_T < n_PK1) & kept_P11, (order_T == n_PK1) & kept_P11, valid_PKT & kept_P11
    )


def kept_mask(batch: TrainBatch) -> Bool[Array, "P"]:
    """True for the groups that the loss is of."""
    return jnp.ones(batch.prompt_PS.shape[0], bool) if batch.kept_P is None else batch.kept_P


def answer_mask(batch: TrainBatch) -> Bool[Array, "P A"]:
    """True at the tokens of y*, its eos included."""
    order_A = jnp.arange(batch.answer_PA.shape[1])[None]
    return (order_A < batch.answer_length_P[:, None]) & kept_mask(batch)[:, None]


def at_answer(x_PKT: Float[Array, "P K T"], batch: TrainBatch) -> Float[Array, "P K A"]:
    """Values at the answer's targets, so that token i of y* has the same place in every trace."""
    start_PK1 = batch.trace_length_PK[:, :, None] + 1
    index_PKA = start_PK1 + jnp.arange(batch.answer_PA.shape[1])[None, None]
    return jnp.take_along_axis(x_PKT, jnp.minimum(index_PKA, x_PKT.shape[2] - 1), axis=2)
