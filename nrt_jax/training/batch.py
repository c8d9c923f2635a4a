"""Groups of traces as arrays: the layout of a micro-batch.

Letters: U units, G groups of a unit, K traces a group, P = U * G groups, S tokens of a prompt row,
R branch rows of a unit, W tokens of a row, T predicted tokens of a branch, A answer tokens.

A branch continues a prompt. With z = (z1 z2), y* = (y1 eos):

    branch   t_start  z1     z2     t_end  y1   eos
    input    t_start  z1     z2     t_end  y1
    target   z1       z2     t_end  y1     eos
    t        0        1      2      3      4

so with trace_length = 2, targets t < 2 are z, t = 2 is t_end, and t >= 3 are y*. The model runs
rows, which hold one or several branches (packing.py); the loss is of groups, whose arrays have an
entry for each target of each branch and say where in the rows it is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.training.packing import Lengths, Plan, Shape, Unit
from nrt_jax.types import Group, TokenizedExample


class PromptRows(NamedTuple):
    """One row of prompts a unit."""

    tokens_US: Int[Array, "U S"]
    positions_US: Int[Array, "U S"]
    segments_US: Int[Array, "U S"]
    """Which group of the unit, from 1; 0 is padding."""


class BranchRows(NamedTuple):
    """Rows of branches that continue the prompts of their unit."""

    inputs_URW: Int[Array, "U R W"]
    targets_URW: Int[Array, "U R W"]
    positions_URW: Int[Array, "U R W"]
    segments_URW: Int[Array, "U R W"]
    """Which branch of the row; 0 is padding."""
    prompts_URW: Int[Array, "U R W"]
    """The segment of the prompt that the branch continues."""
    trace_URW: Bool[Array, "U R W"]
    """True where the target is of z."""


class Groups(NamedTuple):
    """What the loss is of: P groups of K traces, or [U, G] of them in a batch."""

    prompt_last_P: Int[Array, "*P"]
    """Place of the prompt's last token in its row."""
    branch_start_PK: Int[Array, "*P K"]
    """Place of the branch's first target among the R * W of its unit."""
    baseline_start_P: Int[Array, "*P"]
    """The same of the empty trace, in the row of baselines."""
    trace_length_PK: Int[Array, "*P K"]
    end_emitted_PK: Bool[Array, "*P K"]
    """Whether the model wrote t_end itself."""
    answer_PA: Int[Array, "*P A"]
    answer_length_P: Int[Array, "*P"]
    sampler_logprob_PKT: Float[Array, "*P K T"]
    """The engine's logprobs of z, and of t_end where the model wrote it; 0 elsewhere."""
    kept_P: Bool[Array, "*P"]
    """Groups that the loss is of; the others are padding."""


class TrainBatch(NamedTuple):
    """A micro-batch; every array's first dim is U."""

    prompts: PromptRows
    traces: BranchRows
    baselines: BranchRows
    groups: Groups
    """With [U, G] in the place of P."""


class SftBatch(NamedTuple):
    """Rows of one or several texts x y*, as inputs and targets."""

    inputs_URW: Int[Array, "U R W"]
    targets_URW: Int[Array, "U R W"]
    positions_URW: Int[Array, "U R W"]
    segments_URW: Int[Array, "U R W"]
    """Which text of the row; 0 is padding."""
    answer_URW: Bool[Array, "U R W"]
    """True where the target is of y*."""


def flat_groups(tree: Any) -> Any:
    """[U, G, ...] to [P, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def flat_rows(tree: Any) -> Any:
    """[U, R, W] to [U * R, W]."""
    return jax.tree.map(lambda x: x.reshape(-1, x.shape[-1]), tree)


def group_lengths(group: Group) -> Lengths:
    """Tokens of a group, for the packer."""
    example = group.example
    answer = len(example.answer_tokens)
    branches = tuple(len(trace.tokens) + 1 + answer for trace in group.traces)
    return Lengths(len(example.prompt_tokens), branches, 1 + answer)


def nrt_batch(
    groups: Sequence[Group], plan: Plan, *, think_start: int, think_end: int, kept: bool = True
) -> TrainBatch:
    """Lay those of the groups that the plan is of out as arrays; t_end is appended to every trace,
    emitted or not.

    Without `kept` the loss is of none of them.
    """
    shape = plan.shape
    batch = _empty(shape, len(groups[0].traces))
    for u, unit in enumerate(plan.units):
        for g, p in enumerate(unit.groups):
            group = groups[p]
            prompt, answer = group.example.prompt_tokens, group.example.answer_tokens
            row = slice(unit.prompt_starts[g], unit.prompt_starts[g] + len(prompt))
            batch.prompts.tokens_US[u, row] = prompt
            batch.prompts.positions_US[u, row] = np.arange(len(prompt))
            batch.prompts.segments_US[u, row] = g + 1
            for trace, place in zip(group.traces, unit.branch_places[g], strict=True):
                tokens = np.concatenate([[think_start], trace.tokens, [think_end], answer])
                _write(batch.traces, (u, *place), tokens, len(prompt), g)
                row, start = place
                batch.traces.trace_URW[u, row, start : start + len(trace.tokens)] = True
            tokens = np.concatenate([[think_start, think_end], answer])
            _write(batch.baselines, (u, 0, unit.baseline_starts[g]), tokens, len(prompt), g)
            _describe(batch.groups, (u, g), group, unit, shape, think_end)
    batch.groups.kept_P[:] &= kept
    return batch


def _empty(shape: Shape, K: int) -> TrainBatch:
    """Arrays of padding alone."""
    U = shape.units

    def rows(count: int, tokens: int) -> BranchRows:
        ids = partial(np.zeros, (U, count, tokens), np.int32)
        return BranchRows(ids(), ids(), ids(), ids(), ids(), np.zeros((U, count, tokens), bool))

    G, A, T = shape.groups, shape.answer_tokens, shape.branch_tokens
    return TrainBatch(
        PromptRows(*[np.zeros((U, shape.prompt_tokens), np.int32) for _ in range(3)]),
        rows(shape.rows, shape.row_tokens),
        rows(1, shape.baseline_tokens),
        Groups(
            prompt_last_P=np.zeros((U, G), np.int32),
            branch_start_PK=np.zeros((U, G, K), np.int32),
            baseline_start_P=np.zeros((U, G), np.int32),
            trace_length_PK=np.zeros((U, G, K), np.int32),
            end_emitted_PK=np.zeros((U, G, K), bool),
            answer_PA=np.zeros((U, G, A), np.int32),
            answer_length_P=np.zeros((U, G), np.int32),
            sampler_logprob_PKT=np.zeros((U, G, K, T), np.float32),
            kept_P=np.zeros((U, G), bool),
        ),
    )


def _write(
    rows: BranchRows, place: tuple[int, int, int], tokens: np.ndarray, prompt_length: int, g: int
) -> None:
    """Put a branch of group g into its unit, row and place."""
    u, row, start = place
    at = (u, row, slice(start, start + len(tokens) - 1))
    rows.inputs_URW[at], rows.targets_URW[at] = tokens[:-1], tokens[1:]
    rows.positions_URW[at] = prompt_length + np.arange(len(tokens) - 1)
    rows.segments_URW[at] = start + 1  # no other branch of the row starts there
    rows.prompts_URW[at] = g + 1


def _describe(
    groups: Groups, at: tuple[int, int], group: Group, unit: Unit, shape: Shape, think_end: int
) -> None:
    """Write what the loss needs to know of a group."""
    u, g = at
    answer = group.example.answer_tokens
    groups.kept_P[at] = True
    groups.prompt_last_P[at] = unit.prompt_starts[g] + len(group.example.prompt_tokens) - 1
    groups.baseline_start_P[at] = unit.baseline_starts[g]
    groups.answer_PA[u, g, : len(answer)] = answer
    groups.answer_length_P[at] = len(answer)
    for k, (trace, (row, start)) in enumerate(
        zip(group.traces, unit.branch_places[g], strict=True)
    ):
        n = len(trace.tokens)
        groups.branch_start_PK[u, g, k] = row * shape.row_tokens + start
        groups.trace_length_PK[u, g, k] = n
        groups.sampler_logprob_PKT[u, g, k, :n] = trace.logprobs
        if trace.end_token == think_end:
            groups.end_emitted_PK[u, g, k] = True
            groups.sampler_logprob_PKT[u, g, k, n] = trace.end_logprob


class TargetMasks(NamedTuple):
    """Which predicted positions of a branch are z, which is t_end, and which are no padding."""

    trace_PKT: Bool[Array, "P K T"]
    end_PKT: Bool[Array, "P K T"]
    valid_PKT: Bool[Array, "P K T"]


def target_masks(groups: Groups) -> TargetMasks:
    """Masks over the targets, from the lengths alone (see the table at the top of the file)."""
    order_T = jnp.arange(groups.sampler_logprob_PKT.shape[2])[None, None]
    n_PK1, kept_P11 = groups.trace_length_PK[:, :, None], groups.kept_P[:, None, None]
    valid_PKT = order_T <= n_PK1 + groups.answer_length_P[:, None, None]
    return TargetMasks(
        (order_T < n_PK1) & kept_P11, (order_T == n_PK1) & kept_P11, valid_PKT & kept_P11
    )


def answer_mask(groups: Groups) -> Bool[Array, "P A"]:
    """True at the tokens of y*, its eos included."""
    order_A = jnp.arange(groups.answer_PA.shape[1])[None]
    return (order_A < groups.answer_length_P[:, None]) & groups.kept_P[:, None]


def at_answer(x_PKT: Float[Array, "P K T"], groups: Groups) -> Float[Array, "P K A"]:
    """Values at the answer's targets, so that token i of y* has the same place in every trace."""
    start_PK1 = groups.trace_length_PK[:, :, None] + 1
    index_PKA = start_PK1 + jnp.arange(groups.answer_PA.shape[1])[None, None]
    return jnp.take_along_axis(x_PKT, jnp.minimum(index_PKA, x_PKT.shape[2] - 1), axis=2)


def from_rows(
    x_URW: Float[Array, "U R W"], start_UG: Int[Array, "U *G"], length: int
) -> Float[Array, "U *G length"]:
    """Values of the branches that start at `start_UG`; behind their ends these mean nothing."""
    x_UQ = x_URW.reshape(x_URW.shape[0], -1)
    index = start_UG[..., None] + jnp.arange(length).reshape((1,) * start_UG.ndim + (-1,))
    index_UI = jnp.minimum(index, x_UQ.shape[1] - 1).reshape(x_UQ.shape[0], -1)
    return jnp.take_along_axis(x_UQ, index_UI, axis=1).reshape(index.shape)


def sft_lengths(example: TokenizedExample) -> Lengths:
    """Tokens of a row x y*, for the packer: a branch of a prompt of none."""
    length = len(example.prompt_tokens) + len(example.answer_tokens) - 1
    return Lengths(0, (length,), 0)


def sft_batch(examples: Sequence[TokenizedExample], plan: Plan) -> SftBatch:
    """Lay those of the examples that the plan is of out as rows x y*."""
    shape = plan.shape
    size = (shape.units, shape.rows, shape.row_tokens)
    ids = partial(np.zeros, size, np.int32)
    batch = SftBatch(ids(), ids(), ids(), ids(), np.zeros(size, bool))
    for u, unit in enumerate(plan.units):
        for p, ((row, start),) in zip(unit.groups, unit.branch_places, strict=True):
            prompt, answer = examples[p].prompt_tokens, examples[p].answer_tokens
            tokens = np.concatenate([prompt, answer])
            end = start + len(tokens) - 1
            at = (u, row, slice(start, end))
            batch.inputs_URW[at], batch.targets_URW[at] = tokens[:-1], tokens[1:]
            batch.positions_URW[at] = np.arange(len(tokens) - 1)
            batch.segments_URW[at] = start + 1
            batch.answer_URW[u, row, end - len(answer) : end] = True
    return batch
