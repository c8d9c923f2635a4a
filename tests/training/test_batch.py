"""The layout of a training batch: the worked example of the module, and its invariants."""

import numpy as np
import pytest

from nrt_jax.records import Example, Group, TokenizedExample, Trace
from nrt_jax.training.batch import (
    answer_mask,
    at_answer,
    nrt_batch,
    padded_length,
    sft_batch,
    target_masks,
)
from tests.training.worlds import EOS, THINK_END, THINK_START, as_jax, random_groups

X, Z, Y = [4, 5, 6], [7, 8], [9, EOS]


def one_group(end_token=THINK_END) -> Group:
    example = TokenizedExample(
        Example(0, "q", "a"), np.asarray(X, np.int32), np.asarray(Y, np.int32)
    )
    log_probs = np.asarray([-0.5, -0.25], np.float32)
    emitted = -2.0 if end_token is not None else 0.0
    return Group(example, (Trace(np.asarray(Z, np.int32), log_probs, end_token, emitted),))


def batch_of(group: Group):
    return nrt_batch([group], think_start=THINK_START, think_end=THINK_END)


def test_worked_example():
    batch = batch_of(one_group())
    row = [THINK_START, *Z, THINK_END, *Y]
    assert batch.branch_PKW[0, 0, : len(row)].tolist() == row
    assert batch.prompt_PS[0, :3].tolist() == X
    masks = target_masks(as_jax(batch))
    assert masks.trace_PKT[0, 0].tolist() == [True, True, False, False, False, False, False, False]
    assert masks.end_PKT[0, 0].tolist() == [False, False, True, False, False, False, False, False]
    assert masks.valid_PKT[0, 0].tolist() == [True] * 5 + [False] * 3
    targets = batch.branch_PKW[:, :, 1:].astype(np.float32)
    assert at_answer(as_jax(targets), as_jax(batch))[0, 0, :2].tolist() == Y
    assert answer_mask(as_jax(batch))[0].tolist() == [True, True] + [False] * 6


@pytest.mark.parametrize(
    ("end_token", "emitted", "log_prob"),
    [(THINK_END, True, -2.0), (EOS, False, 0), (None, False, 0)],
)
def test_only_a_t_end_that_the_model_wrote_counts_as_emitted(end_token, emitted, log_prob):
    batch = batch_of(one_group(end_token))
    assert batch.end_emitted_PK.tolist() == [[emitted]]
    assert batch.sampler_log_prob_PKT[0, 0, :3].tolist() == [-0.5, -0.25, log_prob]
    # t_end closes the trace all the same.
    assert batch.branch_PKW[0, 0, 3] == THINK_END


def test_every_token_of_every_group_is_somewhere():
    groups = random_groups(5, 3)
    batch = nrt_batch(groups, think_start=THINK_START, think_end=THINK_END)
    masks = target_masks(as_jax(batch))
    for p, group in enumerate(groups):
        for k, trace in enumerate(group.traces):
            targets = batch.branch_PKW[p, k, 1:]
            answer = group.example.answer_tokens
            assert targets[np.asarray(masks.trace_PKT[p, k])].tolist() == trace.tokens.tolist()
            assert targets[np.asarray(masks.end_PKT[p, k])].tolist() == [THINK_END]
            end = len(trace.tokens) + 1
            assert targets[end : end + len(answer)].tolist() == answer.tolist()
            assert int(masks.valid_PKT[p, k].sum()) == end + len(answer)


def test_sft_rows_are_question_then_answer():
    batch = sft_batch([one_group().example])
    assert batch.tokens_BW[0, :5].tolist() == X + Y
    assert (batch.prompt_length_B.tolist(), batch.length_B.tolist()) == ([3], [5])


def test_padded_lengths_are_few_and_waste_under_a_quarter():
    lengths = {padded_length(n) for n in range(1, 4097)}
    assert len(lengths) <= 32
    for n in range(32, 4097):
        assert n <= padded_length(n) < 1.25 * n
    assert [padded_length(n) for n in (1, 8, 9, 40, 65, 100)] == [8, 8, 16, 40, 80, 112]
