"""Where groups go: everyone has a place of its own, little is padding, and shapes are few."""

import csv
import json
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrt_jax.training.packing import (
    Layout,
    Lengths,
    Packer,
    Plan,
    packing_metrics,
)

LARGEST = Lengths(64, (96,) * 4, 40)


@st.composite
def mini_batches(draw, count: int = 3) -> list[list[Lengths]]:
    """Groups of ragged lengths, of one number of traces."""
    traces = draw(st.integers(1, 4))
    group = st.builds(
        lambda prompt, answer, trace_lengths: Lengths(
            prompt, tuple(n + 1 + answer for n in trace_lengths), 1 + answer
        ),
        st.integers(1, 64),
        st.integers(1, 39),
        st.lists(st.integers(0, 56), min_size=traces, max_size=traces),
    )
    return [draw(st.lists(group, min_size=1, max_size=12)) for _ in range(count)]


def check(plans: list[Plan], lengths: list[Lengths], layout: Layout) -> None:
    """Every group is somewhere once, inside its rows, and nothing lies on anything else."""
    assert sorted(p for plan in plans for p in plan.groups) == list(range(len(lengths)))
    for plan in plans:
        shape = plan.shape
        assert shape.packs % layout.shards == 0
        assert len(plan.packs) <= shape.packs
        for tokens in (shape.prompt_tokens, shape.row_tokens, shape.baseline_tokens):
            assert tokens % layout.sequence_shards == 0
        for pack in plan.packs:
            assert len(pack.groups) <= shape.groups
            free = {
                "prompt": np.ones((1, shape.prompt_tokens), bool),
                "rows": np.ones((shape.rows, shape.row_tokens), bool),
                "baseline": np.ones((1, shape.baseline_tokens), bool),
            }

            def take(name: str, row: int, start: int, length: int, free=free) -> None:
                assert start + length <= free[name].shape[1]
                assert free[name][row, start : start + length].all()
                free[name][row, start : start + length] = False

            for g, p in enumerate(pack.groups):
                group = lengths[p]
                assert max(group.completions) <= shape.completion_tokens
                assert group.baseline - 1 <= shape.answer_tokens
                take("prompt", 0, pack.prompt_starts[g], group.prompt)
                take("baseline", 0, pack.baseline_starts[g], group.baseline)
                for (row, start), length in zip(
                    pack.completion_places[g], group.completions, strict=True
                ):
                    take("rows", row, start, length)


@settings(deadline=None, max_examples=15)
@given(
    mini_batches(),
    st.integers(1, 4),
    st.sampled_from([1, 2]),
    st.sampled_from([1, 3]),
    st.booleans(),
)
def test_every_group_has_a_place_of_its_own(batches, micro, shards, sequence_shards, packing):
    layout = Layout(micro * shards, shards, sequence_shards, packing=packing)
    packer = Packer(layout)
    for lengths in batches:
        check(packer.plan(lengths), lengths, layout)


@settings(deadline=None, max_examples=8)
@given(mini_batches(count=8), st.integers(1, 4))
def test_there_are_never_more_shapes_than_allowed(batches, most):
    layout = Layout(2, most_shapes=most, largest=LARGEST)
    packer = Packer(layout)
    for lengths in batches:
        plans = packer.plan(lengths)
        check(plans, lengths, layout)
        assert {plan.shape for plan in plans} <= set(packer.shapes)
    assert len(packer.shapes) <= most


def test_a_micro_batch_takes_no_more_memory_than_one_of_the_largest_groups():
    rng = np.random.default_rng(0)
    layout = Layout(3, largest=LARGEST)
    packer = Packer(layout)
    limit = 3 * (64 + 4 * 96 + 40)
    for _ in range(20):
        lengths = [_random_group(rng) for _ in range(12)]
        for plan in packer.plan(lengths):
            assert plan.slots <= limit


def _random_group(rng: np.random.Generator) -> Lengths:
    answer = int(rng.integers(1, 40))
    completions = tuple(int(n) + 1 + answer for n in rng.integers(0, 56, 4))
    return Lengths(int(rng.integers(1, 64)), completions, 1 + answer)


def test_without_packing_there_is_one_completion_per_row_and_one_group_per_pack():
    lengths = [Lengths(4, (3, 3), 2), Lengths(9, (20, 2), 3)]
    (plan,) = Packer(Layout(2, packing=False)).plan(lengths)
    assert [pack.groups for pack in plan.packs] == [[1], [0]]
    for pack in plan.packs:
        assert sorted(pack.completion_places[0]) == [(0, 0), (1, 0)]


def test_worked_example():
    """The picture at the top of the module."""
    lengths = [Lengths(4, (5, 5), 3), Lengths(2, (3, 2), 2)]
    packer = Packer(Layout(1, equal_keys=20, largest=Lengths(8, (8, 8), 8)))
    (plan,) = packer.plan(lengths)
    (pack,) = plan.packs
    assert (pack.groups, pack.prompt_starts, pack.baseline_starts) == ([0, 1], [0, 4], [0, 3])
    assert plan.shape[2:6] == (8, 2, 8, 8)
    assert pack.completion_places == [[(0, 0), (1, 0)], [(0, 5), (1, 5)]]
    metrics = packing_metrics([plan], packer)
    assert metrics["batch/padding_share"] == pytest.approx(1 - (6 + 15 + 5) / (8 + 16 + 8))


def test_shapes_are_taken_again_after_a_checkpoint():
    rng = np.random.default_rng(1)
    batches = [[_random_group(rng) for _ in range(8)] for _ in range(6)]
    whole = Packer(Layout(4, most_shapes=4, largest=LARGEST))
    expected = [[plan.shape for plan in whole.plan(lengths)] for lengths in batches]
    first = Packer(whole.layout)
    for lengths in batches[:3]:
        first.plan(lengths)
    second = Packer(whole.layout)
    second.set_state(json.loads(json.dumps(first.get_state())))
    shapes = [[plan.shape for plan in second.plan(lengths)] for lengths in batches[3:]]
    assert shapes == expected[3:]
    other = Packer(Layout(2, most_shapes=4, largest=LARGEST))
    other.set_state(first.get_state())
    assert other.shapes == []


def gsm8k(data) -> list[tuple[str, str]]:
    rows = (data / "gsm8k" / "train.jsonl").read_text().splitlines()[:400]
    return [(row["question"], row["answer"]) for row in map(json.loads, rows)]


def flan(data) -> list[tuple[str, str]]:
    pairs = []
    for path in sorted((data / "flan_cot").glob("*.tsv")):
        with path.open() as file:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))[:80]
        # Question and answer; the third column is the rationale that nobody needs here.
        pairs += [(row[0], row[1]) for row in rows]
    return pairs


def capped(rng: np.random.Generator, limit: int) -> int:
    """As of a model that does not know when to stop."""
    return limit


def spread(rng: np.random.Generator, limit: int) -> int:
    return int(min(limit, rng.lognormal(np.log(limit / 4), 0.8)))


@pytest.mark.parametrize("trace_length", [capped, spread])
@pytest.mark.parametrize("read", [gsm8k, flan])
@pytest.mark.parametrize(
    ("prompts", "micro", "traces", "limit"), [(64, 8, 8, 512), (16, 4, 4, 256), (32, 32, 8, 128)]
)
def test_less_than_15_percent_of_real_data_is_padding(
    shared_data, read: Callable, trace_length: Callable, prompts, micro, traces, limit
):
    tokenizers = pytest.importorskip("tokenizers")
    path = shared_data / "tokenizers" / "mistral_v3_fast" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))
    pairs = [[len(tokenizer.encode(text).ids) for text in pair] for pair in read(shared_data)]
    rng = np.random.default_rng(0)
    longest = max(answer for _, answer in pairs)
    largest = Lengths(512, (limit + 1 + longest,) * traces, 1 + longest)
    layout = Layout(micro, equal_keys=26_000, most_shapes=16, largest=largest)
    packer, steps = Packer(layout), []
    for _ in range(6):
        chosen = [pairs[i] for i in rng.permutation(len(pairs))[:prompts]]
        lengths = [
            Lengths(
                prompt,
                tuple(trace_length(rng, limit) + 1 + answer for _ in range(traces)),
                1 + answer,
            )
            for prompt, answer in chosen
        ]
        plans = packer.plan(lengths)
        check(plans, lengths, layout)
        steps.append(packing_metrics(plans, packer)["batch/padding_share"])
    assert np.mean(steps) < 0.15
    assert len(packer.shapes) <= 16
