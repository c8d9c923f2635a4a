"""The layout of a training batch: the worked example of the module, and its invariants."""

import dataclasses

import numpy as np
import pytest

from nrt_jax.objective.rewards import padded_length
from nrt_jax.training.batch import (
    answer_mask,
    answer_values,
    group_lengths,
    sft_batch,
    sft_lengths,
    target_masks,
    unpack,
)
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.types import Example, Group, TokenizedExample, Trace
from tests.training.worlds import EOS, THINK_END, THINK_START, batch_of, random_groups

X, Z, Y = [4, 5, 6], [7, 8], [9, EOS]


def one_group(end_token=THINK_END) -> Group:
    example = TokenizedExample(
        Example(0, "q", "a"), np.asarray(X, np.int32), np.asarray(Y, np.int32)
    )
    logprobs = np.asarray([-0.5, -0.25], np.float32)
    emitted = -2.0 if end_token is not None else 0.0
    return Group(example, (Trace(np.asarray(Z, np.int32), logprobs, end_token, emitted),))


def packers(count: int) -> list[Packer]:
    """Without packing, and with, so that packs and rows hold several."""
    return [Packer(Layout(count, packing=packing)) for packing in (False, True)]


def test_worked_example():
    batch = batch_of([one_group()])
    row = [THINK_START, *Z, THINK_END, *Y]
    assert batch.completions.inputs_BW[0].tolist() == [*row[:-1], 0, 0, 0]
    assert batch.completions.targets_BW[0].tolist() == [*row[1:], 0, 0, 0]
    assert batch.completions.positions_BW[0].tolist() == [3, 4, 5, 6, 7, 0, 0, 0]
    assert batch.completions.trace_BW[0].tolist() == [True] * 2 + [False] * 6
    assert batch.baselines.inputs_BW[0, :3].tolist() == [THINK_START, THINK_END, Y[0]]
    assert batch.prompts.tokens_packs_S[0, :3].tolist() == X
    groups = batch.groups
    masks = target_masks(groups)
    assert masks.trace_PKT[0, 0].tolist() == [True, True, False, False, False, False, False, False]
    assert masks.end_PKT[0, 0].tolist() == [False, False, True, False, False, False, False, False]
    assert masks.valid_PKT[0, 0].tolist() == [True] * 5 + [False] * 3
    targets_PKT = unpack(
        batch.completions.targets_BW.astype(float), groups.completion_start_PK, packs=1, length=8
    )
    assert answer_values(targets_PKT, groups)[0, 0].tolist() == Y
    assert answer_mask(groups)[0].tolist() == [True, True]


def test_white_space_after_t_start_goes_before_the_trace():
    """Two tokens (10, 11) of it: t_start and the first end the prompt's row."""
    after_start = np.asarray([10, 11], np.int32)
    group = one_group()
    example = dataclasses.replace(group.example, after_start_tokens=after_start)
    batch = batch_of([dataclasses.replace(group, example=example)])
    row = [11, *Z, THINK_END, *Y]
    assert batch.prompts.tokens_packs_S[0, :6].tolist() == [*X, THINK_START, 10, 0]
    assert batch.groups.prompt_last_P.tolist() == [2]  # predicts t_start
    assert batch.completions.inputs_BW[0].tolist() == [*row[:-1], 0, 0, 0]
    assert batch.completions.targets_BW[0].tolist() == [*row[1:], 0, 0, 0]
    assert batch.completions.positions_BW[0].tolist() == [5, 6, 7, 8, 9, 0, 0, 0]
    assert batch.baselines.inputs_BW[0, :3].tolist() == [11, THINK_END, Y[0]]


@pytest.mark.parametrize(
    ("end_token", "emitted", "logprob"),
    [(THINK_END, True, -2.0), (EOS, False, 0), (None, False, 0)],
)
def test_only_a_t_end_that_the_model_wrote_counts_as_emitted(end_token, emitted, logprob):
    batch = batch_of([one_group(end_token)])
    assert batch.groups.end_emitted_PK.tolist() == [[emitted]]
    assert batch.groups.sampler_logprob_PKT[0, 0, :3].tolist() == [-0.5, -0.25, logprob]
    # t_end closes the trace all the same.
    assert batch.completions.inputs_BW[0, 3] == THINK_END


@pytest.mark.parametrize("packer", packers(5), ids=["a row each", "packed"])
def test_every_token_of_every_group_is_somewhere(packer):
    groups = random_groups(5, 3)
    batch = batch_of(groups, packer)
    (plan,) = packer.plan([group_lengths(group) for group in groups])
    masks = target_masks(batch.groups)
    T = batch.groups.sampler_logprob_PKT.shape[-1]
    start_PK = batch.groups.completion_start_PK
    targets_PKT, segments_PKT, prompts_PKT = (
        unpack(x_BW.astype(float), start_PK, len(plan.packs), T).astype(int)
        for x_BW in (
            batch.completions.targets_BW,
            batch.completions.segments_BW,
            batch.completions.prompts_BW,
        )
    )
    seen_BW = np.zeros(batch.completions.inputs_BW.shape, int)
    for i, pack in enumerate(plan.packs):
        for g, member in enumerate(pack.groups):
            example, p = groups[member].example, i * plan.shape.groups + g
            prompt_S = batch.prompts.segments_packs_S[i] == g + 1
            prompt = batch.prompts.tokens_packs_S[i]
            assert prompt[prompt_S].tolist() == example.prompt_tokens.tolist()
            assert prompt[int(batch.groups.prompt_last_P[p])] == example.prompt_tokens[-1]
            for k, trace in enumerate(groups[member].traces):
                trace_T, end_T, valid_T = (np.asarray(mask_PKT[p, k]) for mask_PKT in masks)
                assert targets_PKT[p, k][trace_T].tolist() == trace.tokens.tolist()
                assert targets_PKT[p, k][end_T].tolist() == [THINK_END]
                answer = targets_PKT[p, k][valid_T][len(trace.tokens) + 1 :]
                assert answer.tolist() == example.answer_tokens.tolist()
                assert len(set(segments_PKT[p, k][valid_T].tolist())) == 1
                assert set(prompts_PKT[p, k][valid_T].tolist()) == {g + 1}
                row, start = pack.completion_places[g][k]
                seen_BW[i * plan.shape.rows + row, start : start + valid_T.sum()] += 1
    # Nothing lies on anything else, and all the rest is padding.
    assert seen_BW.max() == 1
    np.testing.assert_array_equal(seen_BW == 1, batch.completions.segments_BW != 0)


@pytest.mark.parametrize("packer", packers(6), ids=["a row each", "packed"])
def test_sft_rows_are_question_then_answer(packer):
    examples = [group.example for group in random_groups(6, 1)]
    (plan,) = packer.plan([sft_lengths(example) for example in examples])
    batch = sft_batch(examples, plan)
    found = []
    for i, pack in enumerate(plan.packs):
        for p, ((row, start),) in zip(pack.groups, pack.completion_places, strict=True):
            text = np.concatenate([examples[p].prompt_tokens, examples[p].answer_tokens])
            at = (i * plan.shape.rows + row, slice(start, start + len(text) - 1))
            assert batch.inputs_BW[at].tolist() == text[:-1].tolist()
            assert batch.targets_BW[at].tolist() == text[1:].tolist()
            assert batch.positions_BW[at].tolist() == list(range(len(text) - 1))
            answer = batch.targets_BW[at][batch.answer_BW[at]]
            assert answer.tolist() == examples[p].answer_tokens.tolist()
            found.append(p)
    assert sorted(found) == list(range(6))


def test_padded_lengths_are_few_and_waste_under_a_quarter():
    lengths = {padded_length(n) for n in range(1, 4097)}
    assert len(lengths) <= 32
    for n in range(32, 4097):
        assert n <= padded_length(n) < 1.25 * n
    assert [padded_length(n) for n in (1, 8, 9, 40, 65, 100)] == [8, 8, 16, 40, 80, 112]
