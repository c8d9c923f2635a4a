"""The rows of the warm-up and their loss, against loops over one sequence at a time."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.warmup import AllStage, RowsStage, WarmupConfig
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.warmup_batch import (
    Kind,
    WarmupRow,
    kind_weights,
    warmup_batch,
    warmup_lengths,
    warmup_loss,
)
from nrt_jax.types import Example, TokenizedExample
from tests.training import worlds
from tests.training.plain_loss import Policy, log_softmax

DEFINITION, PARAMS = worlds.tiny_decoder()
POLICY = Policy(DEFINITION, PARAMS, worlds.THINK_START, worlds.THINK_END)
THINK = {"think_start": worlds.THINK_START, "think_end": worlds.THINK_END}
WARMUP = WarmupConfig(train="all", start_weight=2.0, end_weight=3.0)
STAGE = AllStage(trace_weight=0.25, first_token_weight=0.75)


def rows() -> list[WarmupRow]:
    """A text that ended, one that was cut, the empty trace, and a text of one token."""
    examples = [group.example for group in worlds.random_groups(4, 1, seed=3)]
    rng = np.random.default_rng(0)
    traces = [worlds.tokens(rng, length) for length in (4, 6, 0, 1)]
    return [
        WarmupRow(example, trace, ended)
        for example, trace, ended in zip(examples, traces, (True, False, False, True), strict=True)
    ]


def plain(row: WarmupRow, warmup: WarmupConfig, stage: AllStage) -> tuple[float, float, dict]:
    """Weighted cross-entropy of one row, the sum of its weights, and logprobs by name."""
    x, answer = row.example.prompt_tokens.tolist(), row.example.answer_tokens.tolist()
    z = row.trace.tolist()
    sequence = [*x, worlds.THINK_START, *z, worlds.THINK_END, *answer]
    log_pi = log_softmax(POLICY._logits(np.asarray(sequence, np.int32)))
    loss = total = 0.0
    named: dict[str, list[float]] = {"start": [], "trace": [], "end": [], "answer": []}
    for i in range(len(x), len(sequence)):
        value, place = log_pi[i - 1, sequence[i]], i - len(x)
        if place == 0:
            name, weight = "start", warmup.start_weight
        elif place <= len(z):
            first = place == 1
            name, weight = "trace", stage.first_token_weight if first else stage.trace_weight
        elif place == len(z) + 1:
            name, weight = "end", warmup.end_weight if row.ended else 0.0
        else:
            name, weight = "answer", 1.0
        loss, total = loss - weight * value, total + weight
        if name != "end" or row.ended:
            named[name].append(value)
    return loss, total, named


def batches_of(some: list[WarmupRow], packer: Packer):
    plans = packer.plan([warmup_lengths(row) for row in some])
    return [worlds.as_jax(warmup_batch(some, plan, **THINK)) for plan in plans]


def loss_of(some: list[WarmupRow], packer: Packer):
    """Loss, means of the metrics and gradient, over all micro-batches."""
    weights = kind_weights(WARMUP, STAGE)
    total = sum(weights[row.kinds].sum() for row in some)

    def loss_fn(params, batch):
        how = (jnp.asarray(weights), jnp.float32(total), DEFINITION, 4096)
        return warmup_loss(params, batch, *how)

    metrics, gradient = worlds.summed(loss_fn, PARAMS, batches_of(some, packer))
    means = {name: float(value / count) for name, (value, count) in metrics.means.items()}
    return float(metrics.sums["warmup/loss"]), means, gradient


def test_the_kinds_of_the_example_at_the_top_of_the_file():
    example = TokenizedExample(
        Example(0, "q", "a"), np.asarray([5, 6], np.int32), np.asarray([7, 1], np.int32)
    )
    row = WarmupRow(example, np.asarray([8, 9], np.int32), ended=True)
    assert row.tokens(2, 3).tolist() == [5, 6, 2, 8, 9, 3, 7, 1]
    start, first, trace, end, answer = Kind.START, Kind.FIRST, Kind.TRACE, Kind.END, Kind.ANSWER
    assert row.kinds == [Kind.NOTHING, start, first, trace, end, answer, answer]
    cut = row._replace(ended=False)
    assert cut.kinds == [Kind.NOTHING, start, first, trace, Kind.NOTHING, answer, answer]
    empty = WarmupRow(example, np.zeros(0, np.int32), ended=False)
    assert empty.kinds == [Kind.NOTHING, start, Kind.NOTHING, answer, answer]
    # A template that writes two tokens of white space after t_start.
    spaced = row._replace(example=replace(example, after_start_tokens=np.asarray([4, 4], np.int32)))
    assert spaced.tokens(2, 3).tolist() == [5, 6, 2, 4, 4, 8, 9, 3, 7, 1]
    space = [Kind.NOTHING, Kind.NOTHING]
    assert spaced.kinds == [Kind.NOTHING, start, *space, first, trace, end, answer, answer]
    assert [len(r.tokens(2, 3)) - 1 for r in (row, cut, empty)] == [
        warmup_lengths(r).completions[0] for r in (row, cut, empty)
    ]


def test_the_weights_of_the_stages():
    kinds = [Kind.NOTHING, Kind.START, Kind.FIRST, Kind.TRACE, Kind.END, Kind.ANSWER]
    assert kind_weights(WARMUP, STAGE)[kinds].tolist() == [0, 2, 0.75, 0.25, 3, 1]
    assert kind_weights(WARMUP, RowsStage(trace_weight=0.5))[kinds].tolist() == [
        *(0, 2, 0.5, 0.5, 3, 1)
    ]


PACKERS = {"a row each": Layout(4, packing=False), "packed": Layout(2), "in two": Layout(2, 2)}


@pytest.mark.parametrize("name", PACKERS)
def test_the_loss_is_that_of_plain_loops(name):
    some = rows()
    loss, means, _ = loss_of(some, Packer(PACKERS[name]))
    sums = [plain(row, WARMUP, STAGE) for row in some]
    expected = sum(s[0] for s in sums) / sum(s[1] for s in sums)
    assert loss == pytest.approx(expected, rel=1e-5)
    for part in ("start", "trace", "end", "answer"):
        values = [value for _, _, named in sums for value in named[part]]
        assert means[f"warmup/{part}_logprob"] == pytest.approx(np.mean(values), rel=1e-5)


def test_t_end_has_no_gradient_where_the_model_did_not_write_it():
    """Another token behind a cut text changes nothing but what follows it, and y* is left out."""
    (row,) = rows()[1:2]
    weights = kind_weights(WARMUP, STAGE) * (np.arange(len(Kind)) != Kind.ANSWER)
    (batch,) = batches_of([row], Packer(Layout(1, packing=False)))

    def loss_with(end: int) -> float:
        at_end = batch.targets_BW == worlds.THINK_END
        changed = batch._replace(targets_BW=jnp.where(at_end, end, batch.targets_BW))
        how = (jnp.asarray(weights), jnp.float32(1), DEFINITION, 4096)
        return float(warmup_loss(PARAMS, changed, *how)[0])

    assert loss_with(worlds.THINK_END) == loss_with(7)
    assert row.trace.tolist().count(worlds.THINK_END) == 0
