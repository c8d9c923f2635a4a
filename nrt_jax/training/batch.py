"""Groups of traces as the arrays of a micro-batch.

Letters: P prompts (groups), K traces per prompt, B rows, W tokens of a row, S tokens of a prompt
row, T predicted tokens of a completion, A answer tokens.

A completion continues a prompt. With z = (z1 z2), y* = (y1 eos):

    completion  t_start  z1     z2     t_end  y1   eos
    input       t_start  z1     z2     t_end  y1
    target      z1       z2     t_end  y1     eos
    t           0        1      2      3      4

so with trace_length = 2, targets t < 2 are z, t = 2 is t_end, and t >= 3 are y*. The decoder runs
packed rows, which hold one or several completions (packing.py). The loss takes [P, K, T] and
[P, A]: `unpack` finds each completion's values in the rows.

A chat template may write white space after t_start. Then t_start and that space, but for its last
token, end the prompt's row, and the last token is the first input in the place of t_start.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.training.packing import Lengths, Pack, Plan, Shape
from nrt_jax.types import Group, TokenizedExample, reward_sources


class PromptRows(NamedTuple):
    """The prompts of each pack, in one row."""

    tokens_packs_S: Int[Array, "packs S"]
    positions_packs_S: Int[Array, "packs S"]
    segments_packs_S: Int[Array, "packs S"]
    """Number of the group in its pack, from 1; 0 is padding."""


class CompletionRows(NamedTuple):
    """Rows of completions, pack by pack; a pack's rows continue the prompts of the pack."""

    inputs_BW: Int[Array, "B W"]
    targets_BW: Int[Array, "B W"]
    positions_BW: Int[Array, "B W"]
    segments_BW: Int[Array, "B W"]
    """Which completion of the row; 0 is padding."""
    prompts_BW: Int[Array, "B W"]
    """Segment of the prompt that the completion continues."""
    trace_BW: Bool[Array, "B W"]
    """True where the target is a token of z."""


class GroupArrays(NamedTuple):
    """Lengths, answers and sampler logprobs of the groups, pack by pack."""

    prompt_last_P: Int[Array, " P"]
    """Index of x's last token, which predicts t_start, in its row."""
    completion_start_PK: Int[Array, "P K"]
    """Index of the completion's first target in the concatenated rows of its pack."""
    baseline_start_P: Int[Array, " P"]
    """The same of the empty trace's completion, in the row of baselines."""
    trace_length_PK: Int[Array, "P K"]
    reward_source_PK: Int[Array, "P K"]
    """From whose log c the reward comes: see `reward_sources`."""
    end_emitted_PK: Bool[Array, "P K"]
    """Whether the model wrote t_end itself."""
    cut_PK: Bool[Array, "P K"]
    """Whether the limit ended the trace."""
    answer_PA: Int[Array, "P A"]
    answer_length_P: Int[Array, " P"]
    sampler_logprob_PKT: Float[Array, "P K T"]
    """The engine's logprobs of z, and of t_end where the model wrote it; 0 elsewhere."""
    kept_P: Bool[Array, " P"]
    """True for groups that are part of the loss; the others are padding."""


class ScoredAnswers(NamedTuple):
    """log c of y* under the weights that drew the traces, scored by the engine; 0 at padding."""

    log_c_base_PA: Float[Array, "P A"]
    log_c_PKA: Float[Array, "P K A"] | None
    """None where only the empty traces were scored."""


class NrtBatch(NamedTuple):
    """A micro-batch; the first dim of every array is split over the devices, pack by pack."""

    prompts: PromptRows
    completions: CompletionRows
    baselines: CompletionRows
    """Completions with an empty trace, one row per pack."""
    groups: GroupArrays
    scored: ScoredAnswers | None = None
    """None where the engine scored nothing."""


class SftBatch(NamedTuple):
    """Rows of one or several texts x y*, as inputs and targets."""

    inputs_BW: Int[Array, "B W"]
    targets_BW: Int[Array, "B W"]
    positions_BW: Int[Array, "B W"]
    segments_BW: Int[Array, "B W"]
    """Which text of the row; 0 is padding."""
    answer_BW: Bool[Array, "B W"]
    """True where the target is a token of y*."""


@runtime_checkable
class TextRows(Protocol):
    """What rows of texts have in common, whatever they predict."""

    @property
    def inputs_BW(self) -> Int[Array, "B W"]: ...
    @property
    def targets_BW(self) -> Int[Array, "B W"]: ...
    @property
    def positions_BW(self) -> Int[Array, "B W"]: ...
    @property
    def segments_BW(self) -> Int[Array, "B W"]: ...


# --- groups to arrays ----------------------------------------------------------------------------


def group_lengths(group: Group) -> Lengths:
    """Token counts of a group, for the packer."""
    answer = len(group.example.answer_tokens)
    completions = tuple(len(trace.tokens) + 1 + answer for trace in group.traces)
    return Lengths(_prompt_length(group.example), completions, 1 + answer)


def _prompt_length(example: TokenizedExample) -> int:
    """Tokens of the prompt's row: all that precede the first input of a completion."""
    return len(example.prompt_tokens) + len(example.after_start_tokens)


def nrt_batch(
    groups: Sequence[Group], plan: Plan, *, think_start: int, think_end: int, kept: bool = True
) -> NrtBatch:
    """Pack the planned groups into arrays; t_end follows every trace, emitted or not.

    `kept=False` excludes all of them from the loss.
    """
    shape = plan.shape
    batch = _empty(shape, groups[0])
    for i, pack in enumerate(plan.packs):
        for g, member in enumerate(pack.groups):
            group = groups[member]
            *prompt, first = group.example.trace_prompt(think_start)
            answer = group.example.answer_tokens
            at = (i, slice(pack.prompt_starts[g], pack.prompt_starts[g] + len(prompt)))
            batch.prompts.tokens_packs_S[at] = prompt
            batch.prompts.positions_packs_S[at] = np.arange(len(prompt))
            batch.prompts.segments_packs_S[at] = g + 1
            for trace, (row, start) in zip(group.traces, pack.completion_places[g], strict=True):
                tokens = np.concatenate([[first], trace.tokens, [think_end], answer])
                b = i * shape.rows + row
                _write_completion(batch.completions, (b, start), tokens, len(prompt), g)
                batch.completions.trace_BW[b, start : start + len(trace.tokens)] = True
            tokens = np.concatenate([[first, think_end], answer])
            start = pack.baseline_starts[g]
            _write_completion(batch.baselines, (i, start), tokens, len(prompt), g)
            p = i * shape.groups + g
            _write_places(batch.groups, p, group, pack, shape)
            _write_group(batch.groups, p, group, think_end)
            if batch.scored is not None:
                _write_scored(batch.scored, p, group)
    batch.groups.kept_P[:] &= kept
    return batch


def _empty(shape: Shape, like: Group) -> NrtBatch:
    """Arrays that hold padding alone, for groups with as many traces and the scores of `like`."""

    def rows(count: int, tokens: int) -> CompletionRows:
        ids = partial(np.zeros, (count, tokens), np.int32)
        return CompletionRows(ids(), ids(), ids(), ids(), ids(), np.zeros((count, tokens), bool))

    packs, A, T = shape.packs, shape.answer_tokens, shape.completion_tokens
    P, K, scored = packs * shape.groups, len(like.traces), None
    if like.log_c_base_A is not None:
        log_c_PKA = None if like.log_c_KA is None else np.zeros((P, K, A), np.float32)
        scored = ScoredAnswers(np.zeros((P, A), np.float32), log_c_PKA)
    return NrtBatch(
        PromptRows(*[np.zeros((packs, shape.prompt_tokens), np.int32) for _ in range(3)]),
        rows(packs * shape.rows, shape.row_tokens),
        rows(packs, shape.baseline_tokens),
        GroupArrays(
            prompt_last_P=np.zeros(P, np.int32),
            completion_start_PK=np.zeros((P, K), np.int32),
            baseline_start_P=np.zeros(P, np.int32),
            trace_length_PK=np.zeros((P, K), np.int32),
            reward_source_PK=np.zeros((P, K), np.int32),
            end_emitted_PK=np.zeros((P, K), bool),
            cut_PK=np.zeros((P, K), bool),
            answer_PA=np.zeros((P, A), np.int32),
            answer_length_P=np.zeros(P, np.int32),
            sampler_logprob_PKT=np.zeros((P, K, T), np.float32),
            kept_P=np.zeros(P, bool),
        ),
        scored,
    )


def _write_completion(
    rows: CompletionRows, place: tuple[int, int], tokens: np.ndarray, prompt_length: int, g: int
) -> None:
    """Write a completion of the pack's group g at its row and first token."""
    at = write_text(rows, place, tokens, position=prompt_length)
    rows.prompts_BW[at] = g + 1


def write_text(
    rows: TextRows, place: tuple[int, int], tokens: np.ndarray, position: int = 0
) -> tuple[int, slice]:
    """Write a text as inputs and targets at its row and first token; the index of its inputs.

    `position` is that of its first token: the number of tokens that it continues.
    """
    b, start = place
    at = (b, slice(start, start + len(tokens) - 1))
    rows.inputs_BW[at], rows.targets_BW[at] = tokens[:-1], tokens[1:]
    rows.positions_BW[at] = position + np.arange(len(tokens) - 1)
    rows.segments_BW[at] = start + 1  # no other text of the row starts there
    return at


def _write_places(arrays: GroupArrays, p: int, group: Group, pack: Pack, shape: Shape) -> None:
    """Write where the rows hold a group's prompt, completions and baseline."""
    g = p % shape.groups
    arrays.prompt_last_P[p] = pack.prompt_starts[g] + len(group.example.prompt_tokens) - 1
    arrays.baseline_start_P[p] = pack.baseline_starts[g]
    starts = [row * shape.row_tokens + start for row, start in pack.completion_places[g]]
    arrays.completion_start_PK[p] = starts


def _write_group(arrays: GroupArrays, p: int, group: Group, think_end: int) -> None:
    """Write a group's answer, and the lengths and sampler logprobs of its traces."""
    answer = group.example.answer_tokens
    arrays.kept_P[p] = True
    arrays.answer_PA[p, : len(answer)] = answer
    arrays.answer_length_P[p] = len(answer)
    arrays.reward_source_PK[p] = reward_sources(group.traces)
    for k, trace in enumerate(group.traces):
        length = len(trace.tokens)
        arrays.trace_length_PK[p, k] = length
        arrays.sampler_logprob_PKT[p, k, :length] = trace.logprobs
        arrays.cut_PK[p, k] = trace.end_token is None
        if trace.end_token == think_end:
            arrays.end_emitted_PK[p, k] = True
            arrays.sampler_logprob_PKT[p, k, length] = trace.end_logprob


def _write_scored(arrays: ScoredAnswers, p: int, group: Group) -> None:
    """Write the engine's log c of a group's answer."""
    length = len(group.example.answer_tokens)
    arrays.log_c_base_PA[p, :length] = group.log_c_base_A
    if arrays.log_c_PKA is not None:
        arrays.log_c_PKA[p, :, :length] = group.log_c_KA


# --- rows to [P, K, T] ---------------------------------------------------------------------------


def unpack(
    x_BW: Float[Array, "B W"], start: Int[Array, "P *K"], packs: int, length: int
) -> Float[Array, "P *K length"]:
    """Values of the completions that start at `start` in their packs.

    Values behind the end of a completion belong to another one, and must be masked.
    """
    x_packs = x_BW.reshape(packs, -1)
    index = start.reshape(packs, -1, 1) + jnp.arange(length)[None, None]
    index = jnp.minimum(index, x_packs.shape[1] - 1).reshape(packs, -1)
    return jnp.take_along_axis(x_packs, index, axis=1).reshape(*start.shape, length)


class TargetMasks(NamedTuple):
    """Which targets of a completion are z, which is t_end, and which are not padding."""

    trace_PKT: Bool[Array, "P K T"]
    end_PKT: Bool[Array, "P K T"]
    valid_PKT: Bool[Array, "P K T"]


def target_masks(groups: GroupArrays) -> TargetMasks:
    """Masks over the targets, from the lengths (see the table at the top of the file)."""
    t = jnp.arange(groups.sampler_logprob_PKT.shape[2])[None, None]
    length_PK1, kept_P11 = groups.trace_length_PK[:, :, None], groups.kept_P[:, None, None]
    valid_PKT = t <= length_PK1 + groups.answer_length_P[:, None, None]
    masks = TargetMasks(t < length_PK1, t == length_PK1, valid_PKT)
    return TargetMasks(*(mask_PKT & kept_P11 for mask_PKT in masks))


def answer_mask(groups: GroupArrays) -> Bool[Array, "P A"]:
    """True at the tokens of y*, its eos included."""
    order_1A = jnp.arange(groups.answer_PA.shape[1])[None]
    return (order_1A < groups.answer_length_P[:, None]) & groups.kept_P[:, None]


def answer_values(x_PKT: Float[Array, "P K T"], groups: GroupArrays) -> Float[Array, "P K A"]:
    """Values at the targets of y*: token i of y* has index i in every trace."""
    start_PK1 = groups.trace_length_PK[:, :, None] + 1
    index_PKA = start_PK1 + jnp.arange(groups.answer_PA.shape[1])[None, None]
    return jnp.take_along_axis(x_PKT, jnp.minimum(index_PKA, x_PKT.shape[2] - 1), axis=2)


# --- supervised rows -----------------------------------------------------------------------------


def sft_lengths(example: TokenizedExample) -> Lengths:
    """Token counts of a text x y*, for the packer: a completion of an empty prompt."""
    length = len(example.prompt_tokens) + len(example.answer_tokens) - 1
    return Lengths(0, (length,), 0)


def sft_batch(examples: Sequence[TokenizedExample], plan: Plan) -> SftBatch:
    """Pack the planned examples into rows x y*."""
    shape = plan.shape
    size = (shape.packs * shape.rows, shape.row_tokens)
    ids = partial(np.zeros, size, np.int32)
    batch = SftBatch(ids(), ids(), ids(), ids(), np.zeros(size, bool))
    for i, pack in enumerate(plan.packs):
        for member, ((row, start),) in zip(pack.groups, pack.completion_places, strict=True):
            prompt, answer = examples[member].prompt_tokens, examples[member].answer_tokens
            tokens = np.concatenate([prompt, answer])
            b, inputs = write_text(batch, (i * shape.rows + row, start), tokens)
            batch.answer_BW[b, inputs.stop - len(answer) : inputs.stop] = True
    return batch
