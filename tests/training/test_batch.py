"""The layout of a training batch: the worked example of the module, and its invariants."""

import jax
import numpy as np
import pytest

from nrt_jax.objective.rewards import padded_length
from nrt_jax.training.batch import (
    answer_mask,
    at_answer,
    flat_groups,
    from_rows,
    group_lengths,
    sft_batch,
    sft_lengths,
    target_masks,
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
    """Without packing, and with, so that units and rows hold several."""
    return [Packer(Layout(count, packing=packing)) for packing in (False, True)]


def test_worked_example():
    batch = batch_of([one_group()])
    row = [THINK_START, *Z, THINK_END, *Y]
    assert batch.traces.inputs_URW[0, 0].tolist() == [*row[:-1], 0, 0, 0]
    assert batch.traces.targets_URW[0, 0].tolist() == [*row[1:], 0, 0, 0]
    assert batch.traces.positions_URW[0, 0].tolist() == [3, 4, 5, 6, 7, 0, 0, 0]
    assert batch.traces.trace_URW[0, 0].tolist() == [True] * 2 + [False] * 6
    assert batch.baselines.inputs_URW[0, 0, :3].tolist() == [THINK_START, THINK_END, Y[0]]
    assert batch.prompts.tokens_US[0, :3].tolist() == X
    groups = flat_groups(batch.groups)
    masks = target_masks(groups)
    assert masks.trace_PKT[0, 0].tolist() == [True, True, False, False, False, False, False, False]
    assert masks.end_PKT[0, 0].tolist() == [False, False, True, False, False, False, False, False]
    assert masks.valid_PKT[0, 0].tolist() == [True] * 5 + [False] * 3
    targets = from_rows(batch.traces.targets_URW.astype(float), batch.groups.branch_start_PK, 8)
    assert at_answer(flat_groups(targets), groups)[0, 0].tolist() == Y
    assert answer_mask(groups)[0].tolist() == [True, True]


@pytest.mark.parametrize(
    ("end_token", "emitted", "logprob"),
    [(THINK_END, True, -2.0), (EOS, False, 0), (None, False, 0)],
)
def test_only_a_t_end_that_the_model_wrote_counts_as_emitted(end_token, emitted, logprob):
    batch = batch_of([one_group(end_token)])
    assert batch.groups.end_emitted_PK.tolist() == [[[emitted]]]
    assert batch.groups.sampler_logprob_PKT[0, 0, 0, :3].tolist() == [-0.5, -0.25, logprob]
    # t_end closes the trace all the same.
    assert batch.traces.inputs_URW[0, 0, 3] == THINK_END


@pytest.mark.parametrize("packer", packers(5), ids=["a row each", "packed"])
def test_every_token_of_every_group_is_somewhere(packer):
    groups = random_groups(5, 3)
    batch = batch_of(groups, packer)
    (plan,) = packer.plan([group_lengths(group) for group in groups])
    masks = jax.vmap(target_masks)(batch.groups)
    seen_URW = np.zeros(batch.traces.inputs_URW.shape, int)
    for u, unit in enumerate(plan.units):
        for g, p in enumerate(unit.groups):
            example = groups[p].example
            prompt_S = batch.prompts.segments_US[u] == g + 1
            assert batch.prompts.tokens_US[u][prompt_S].tolist() == example.prompt_tokens.tolist()
            last = int(batch.groups.prompt_last_P[u, g])
            assert batch.prompts.tokens_US[u, last] == example.prompt_tokens[-1]
            T = batch.groups.sampler_logprob_PKT.shape[-1]
            targets_KT, segments_KT, prompts_KT = (
                from_rows(x.astype(float), batch.groups.branch_start_PK, T)[u, g].astype(int)
                for x in (
                    batch.traces.targets_URW,
                    batch.traces.segments_URW,
                    batch.traces.prompts_URW,
                )
            )
            for k, trace in enumerate(groups[p].traces):
                trace_T, end_T, valid_T = (np.asarray(mask[u, g, k]) for mask in masks)
                assert targets_KT[k][trace_T].tolist() == trace.tokens.tolist()
                assert targets_KT[k][end_T].tolist() == [THINK_END]
                answer = targets_KT[k][valid_T][len(trace.tokens) + 1 :]
                assert answer.tolist() == example.answer_tokens.tolist()
                assert len(set(segments_KT[k][valid_T].tolist())) == 1
                assert set(prompts_KT[k][valid_T].tolist()) == {g + 1}
                row, start = unit.branch_places[g][k]
                seen_URW[u, row, start : start + valid_T.sum()] += 1
    # Nothing lies on anything else, and all the rest is padding.
    assert seen_URW.max() == 1
    np.testing.assert_array_equal(seen_URW == 1, batch.traces.segments_URW != 0)


@pytest.mark.parametrize("packer", packers(6), ids=["a row each", "packed"])
def test_sft_rows_are_question_then_answer(packer):
    examples = [group.example for group in random_groups(6, 1)]
    (plan,) = packer.plan([sft_lengths(example) for example in examples])
    batch = sft_batch(examples, plan)
    found = []
    for u, unit in enumerate(plan.units):
        for p, ((row, start),) in zip(unit.groups, unit.branch_places, strict=True):
            text = np.concatenate([examples[p].prompt_tokens, examples[p].answer_tokens])
            at = (u, row, slice(start, start + len(text) - 1))
            assert batch.inputs_URW[at].tolist() == text[:-1].tolist()
            assert batch.targets_URW[at].tolist() == text[1:].tolist()
            assert batch.positions_URW[at].tolist() == list(range(len(text) - 1))
            answer = batch.targets_URW[at][batch.answer_URW[at]]
            assert answer.tolist() == examples[p].answer_tokens.tolist()
            found.append(p)
    assert sorted(found) == list(range(6))


def test_padded_lengths_are_few_and_waste_under_a_quarter():
    lengths = {padded_length(n) for n in range(1, 4097)}
    assert len(lengths) <= 32
    for n in range(32, 4097):
        assert n <= padded_length(n) < 1.25 * n
    assert [padded_length(n) for n in (1, 8, 9, 40, 65, 100)] == [8, 8, 16, 40, 80, 112]
