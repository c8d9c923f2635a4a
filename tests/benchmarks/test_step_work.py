"""The work of a step: the count by hand, and the formula against XLA's count of the real loss."""

import pytest

from nrt_jax.config.architecture import Architecture
from nrt_jax.training.packing import Shape
from tests.benchmarks.scripts import load

step_work = load("step_work")
REMATS, LLAMA_8B = step_work.REMATS, step_work.LLAMA_8B
PAPER_LIKE = step_work.Sizes(prompt=300, trace=400, answer=416, traces=8)
BRANCH = 1 + 400 + 416
"""Inputs of t_start z t_end y*, whose eos is no input."""
SMALL = Architecture(
    vocab_size=1000, hidden_size=512, intermediate_size=1024, num_hidden_layers=1, head_dim=128
)


def tokens(parts, remat: str, ours: bool) -> int:
    return step_work.work(parts, remat, LLAMA_8B, ours=ours).tokens


def test_tokens_by_hand():
    theirs = 8 * ((300 + BRANCH) * (1 + 1 + 1 + 2) + (300 + 1 + 416))
    assert tokens(step_work.release_parts(PAPER_LIKE), "full", False) == theirs == 50_416
    ours = step_work.our_parts(PAPER_LIKE)
    assert tokens(ours, "none", True) == 3 * (300 + 8 * BRANCH) + 417
    assert tokens(ours, "full", True) == 4 * (300 + 8 * BRANCH) + 417
    several = step_work.our_parts(PAPER_LIKE, several_updates=True)
    assert tokens(several, "none", True) == tokens(ours, "none", True) + 300


@pytest.mark.parametrize("remat", [remat for remat in REMATS if remat != "full"])
@pytest.mark.parametrize("several_updates", [False, True])
def test_at_most_0_55_of_the_release(remat, several_updates):
    """With `full` it is 0.551 of the tokens."""
    theirs = step_work.work(step_work.release_parts(PAPER_LIKE), "full", LLAMA_8B, ours=False)
    ours = step_work.work(
        step_work.our_parts(PAPER_LIKE, several_updates), remat, LLAMA_8B, ours=True
    )
    assert ours.tokens <= 0.55 * theirs.tokens
    assert ours.dense_flops <= 0.55 * theirs.dense_flops
    assert ours.causal_flops <= 0.55 * theirs.causal_flops


@pytest.mark.parametrize("remat", REMATS)
@pytest.mark.parametrize("sizes", [step_work.Sizes(40, 24, 33, 4), step_work.Sizes(200, 8, 12, 2)])
def test_formula_is_what_the_loss_costs(remat, sizes):
    expected = step_work.counted_by_xla(sizes, SMALL, remat)
    assert step_work.formula(sizes, SMALL, remat) == pytest.approx(expected, rel=0.05)


def test_rows_without_padding_are_the_tokens():
    S, Z, A, K = PAPER_LIKE
    exact = Shape(1, 1, S, K, BRANCH, 1 + A, Z + 1 + A, A)
    for remat in REMATS:
        ours = step_work.work(step_work.our_parts(PAPER_LIKE), remat, LLAMA_8B, ours=True)
        rows = step_work.work(step_work.padded_parts(exact), remat, LLAMA_8B, ours=True)
        assert rows.tokens == ours.tokens
        assert rows.dense_flops == pytest.approx(ours.dense_flops)
