"""The figures of a diagnosis, against numbers worked out by hand and plain loops."""

import dataclasses
import math

import numpy as np
import pytest

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.task_tokenizers import write_quickstart_tokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.evaluation.estimates import t_quantile
from nrt_jax.training.answer_logprobs import Context, ContextLogprobs
from nrt_jax.training.diagnosis import (
    Scored,
    answer_figures,
    format_weight_share,
    logprobs_by_question,
    mean_over_questions,
    score_groups,
    shuffled_donors,
    trace_figures,
)
from nrt_jax.training.health import examine
from nrt_jax.types import Trace
from tests.training import worlds

# --- intervals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (5, 2.57058), (9, 2.26216), (30, 2.04227)],
)
def test_quantiles_of_student(degrees, quantile):
    """From any table of the distribution."""
    assert t_quantile(degrees) == pytest.approx(quantile, rel=2e-3)


def test_the_interval_of_a_mean_by_hand():
    """s = 1 and t = 4.303, so half of it is 4.303 / sqrt(3)."""
    estimate = mean_over_questions([1.0, 2.0, 3.0])
    assert estimate == pytest.approx((2.0, 2.0 - 2.48414, 2.0 + 2.48414), rel=1e-5)
    assert mean_over_questions([5.0]) == (5.0, None, None)


# --- donors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [2, 3, 17])
@pytest.mark.parametrize("seed", range(3))
def test_every_question_gets_the_traces_of_another_and_all_are_used(count, seed):
    prompts = [[i, i + 1] for i in range(count)]
    donors = shuffled_donors(prompts, seed)
    assert donors is not None
    assert sorted(donors) == list(range(count))
    assert all(donor != i for i, donor in enumerate(donors))
    assert donors == shuffled_donors(prompts, seed)


def test_donors_follow_the_seed():
    prompts = [[i] for i in range(17)]
    assert shuffled_donors(prompts, 0) != shuffled_donors(prompts, 1)


def test_a_question_that_stands_twice_is_never_its_own_donor():
    prompts = [[1], [2], [1], [1]]
    donors = shuffled_donors(prompts, 0)
    assert donors is not None
    assert all(prompts[donor] != prompts[i] for i, donor in enumerate(donors))
    assert shuffled_donors([[1], [1]], 0) is None


# --- figures --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_quickstart_tokenizer(directory)
    return Tokenizer.load(directory, "<|think_start|>", "<|think_end|>")


def a_trace(length: int, end: int | None) -> Trace:
    return Trace(np.full(length, 5, np.int32), np.zeros(length, np.float32), end, 0.0)


def test_how_traces_end_by_hand(tokenizer):
    (group,) = worlds.random_groups(1, 1)
    eos, end = tokenizer.eos_id, tokenizer.think_end_id
    traces = (a_trace(0, eos), a_trace(0, end), a_trace(3, end), a_trace(5, None))
    groups = [type(group)(group.example, traces)]
    figures = {k: v.value for k, v in trace_figures(groups, tokenizer).items()}
    assert figures == {
        "trace/empty_share": 0.5,
        "trace/empty_other_share": 0.25,
        "trace/end_think_end_share": 0.5,
        "trace/end_other_share": 0.25,
        "trace/end_length_share": 0.25,
        "trace/tokens": 2.0,
        "trace/median_tokens": 1.5,
    }


def test_one_long_trace_among_empty_ones_hides_nothing(tokenizer):
    """The first batch of SmolLM2 whose think tokens are copies of eos: 8 of 16 traces are empty."""
    (group,) = worlds.random_groups(1, 1)
    eos = tokenizer.eos_id
    lengths = [0] * 8 + [1] * 6 + [2]
    traces = (*(a_trace(length, eos) for length in lengths), a_trace(64, None))
    figures = trace_figures([type(group)(group.example, traces)], tokenizer)
    assert (figures["trace/empty_share"].value, figures["trace/tokens"].value) == (0.5, 4.5)
    config = RunConfig.model_validate(
        {"model": {"path": "m"}, "data": {"source": "chain_addition"}}
    )
    stops = [f.figure for f in examine(figures, config) if f.level == "stop"]
    assert stops == ["trace/median_tokens"]


def test_each_answer_is_scored_after_own_and_other_traces(tokenizer):
    """A made-up scorer tells of each row what it was asked."""
    groups = worlds.random_groups(3, 2)
    # A chat template that writes white space after t_start.
    spaced = dataclasses.replace(groups[1].example, after_start_tokens=np.array([9], np.int32))
    groups[1] = dataclasses.replace(groups[1], example=spaced)
    donors = shuffled_donors([g.example.prompt_tokens.tolist() for g in groups], 4)
    assert donors is not None
    asked, (start, end) = {}, (tokenizer.think_start_id, tokenizer.think_end_id)

    def score(params, examples, contexts):
        assert params == "weights"
        for i, of_example in enumerate(contexts):
            asked[i] = [context.tokens.tolist() for context in of_example]
        return [
            [
                ContextLogprobs(
                    answer_A=np.full(len(e.answer_tokens), -float(c)),
                    answer_entropy_A=np.full(len(e.answer_tokens), 0.25),
                    entropy_T=np.full(c, 0.5),
                )
                for c, _ in enumerate(of_e)
            ]
            for e, of_e in zip(examples, contexts, strict=True)
        ]

    scored = score_groups(score, "weights", groups, tokenizer, seed=4)
    for i, group in enumerate(groups):
        traces = [*group.traces, *groups[donors[i]].traces]
        opened = [start, 9] if i == 1 else [start]
        closed = [[*opened, *trace.tokens.tolist(), end] for trace in traces]
        assert asked[i] == [[], [*opened, end], *closed]
        of_i = scored[i]
        assert (of_i.direct_A[0], of_i.empty_A[0]) == (0, -1)
        # The second trace is empty, and takes the logprobs after the empty trace.
        assert of_i.own_KA[:, 0].tolist() == [-2, -1]
        assert of_i.shuffled_KA is not None
        assert of_i.shuffled_KA[:, 0].tolist() == [-4, -1]
        assert [len(entropy) for entropy in of_i.entropies] == [2, 3]


SCORED = [
    Scored(
        direct_A=np.log([0.5, 0.5]),
        empty_A=np.log([0.5, 0.25]),
        own_KA=np.log([[0.5, 0.5], [0.5, 0.125]]),
        shuffled_KA=np.log([[0.25, 0.25], [0.25, 0.25]]),
        entropies=[np.array([1.0, 2.0]), np.array([])],
    ),
    Scored(
        direct_A=np.log([0.25]),
        empty_A=np.log([0.125]),
        own_KA=np.log([[0.0625], [0.0625]]),
        shuffled_KA=np.log([[0.125], [0.0625]]),
        entropies=[np.array([3.0]), np.array([6.0])],
    ),
]
"""Two questions with answers of two tokens and of one, and two traces each."""


def test_the_figures_of_two_questions_by_hand():
    """In units of log 2: direct -1 and -2, empty -1.5 and -3, own -1.5 and -4, others' -2, -3.5."""
    figures = answer_figures(SCORED, ObjectiveConfig(scheme="logp"))
    for context, values in logprobs_by_question(SCORED).items():
        assert len(values) == len(SCORED)
        assert np.mean(values) == pytest.approx(figures[f"logprob/{context}"].value), context
    unit = math.log(2)
    means = {
        "logprob/direct": -1.5,
        "logprob/empty": -2.25,
        "logprob/own": -2.75,
        "logprob/shuffled": -2.75,
        "logprob/empty_minus_direct": -0.75,
        "logprob/own_minus_empty": -0.5,
        "logprob/shuffled_minus_empty": -0.5,
        "logprob/own_minus_shuffled": 0.0,
    }
    for name, mean in means.items():
        assert figures[name].value == pytest.approx(mean * unit, abs=1e-6), name
    # Paired: the differences of the two questions are 0.5 and -0.5, so s = 0.7071 and t = 12.706.
    low, high = figures["logprob/own_minus_shuffled"][1:]
    assert (low, high) == pytest.approx((-12.7062 * 0.5 * unit, 12.7062 * 0.5 * unit), rel=1e-4)
    assert figures["trace/entropy"].value == 3.0
    # The rewards are -2, -4 against -3, and -4, -4 against -3; none of the second group is above.
    assert figures["reward/above_baseline_share"].value == 0.25
    assert figures["reward/zero_std_share"].value == 0.5


def test_weights_due_to_the_format_by_hand():
    """s is -log c_base, d the same directly after x: the weight is the format's if d < s / 2."""
    tokens = [
        (0.9, 0.1),  # sure without think tokens, surprised by them: the format's
        (0.2, 0.1),  # difficult either way
        (0.9, 0.6),  # s below log 2: hardly a weight
        (0.1, 0.9),  # the empty trace helps
    ]
    direct, base = (np.log(column) for column in zip(*tokens, strict=True))
    nothing = np.zeros((1, 4))
    scored = [Scored(direct, base, nothing, None, [])]
    assert format_weight_share(scored) == 0.25


def test_without_another_question_there_is_no_control():
    figures = answer_figures([SCORED[0]._replace(shuffled_KA=None)], ObjectiveConfig())
    assert not [name for name in figures if "shuffled" in name]
    assert figures["logprob/own"].low is None


def test_one_trace_per_prompt_has_no_std():
    scored = [of_p._replace(own_KA=of_p.own_KA[:1]) for of_p in SCORED]
    assert "reward/zero_std_share" not in answer_figures(scored, ObjectiveConfig())


def test_empty_traces_have_entropy_0():
    scored = [of_p._replace(entropies=[np.zeros(0)] * 2) for of_p in SCORED]
    assert answer_figures(scored, ObjectiveConfig())["trace/entropy"].value == 0.0


def test_contexts_are_their_parts():
    context = Context(np.array([1]), np.array([2, 3]), np.array([4]))
    assert context.tokens.tolist() == [1, 2, 3, 4]
