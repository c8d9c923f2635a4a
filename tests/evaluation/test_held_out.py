"""Exact match of models rigged to answer as we say, and of one that has to be followed."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

from nrt_jax.errors import InputError
from nrt_jax.evaluation.extract import make_extract
from nrt_jax.evaluation.held_out import Answerer, check_references, end_name, evaluate
from nrt_jax.types import Example, TokenizedExample, Trace
from tests.engine.toy import greedy
from tests.models.tiny import decoder

EOS, START, END = "<|eos|>", "<|think_start|>", "<|think_end|>"


def make(tokenizer, trace_engine, answer_engine) -> Answerer:
    return Answerer(
        tokenizer=tokenizer,
        trace_engine=trace_engine,
        answer_engine=answer_engine,
        max_trace_tokens=6,
        max_answer_tokens=3,
        trace_temperature=0.0,
    )


@pytest.fixture
def direct(tokenizer, engines) -> Answerer:
    return make(tokenizer, None, engines[1])


@pytest.fixture
def reasoning(tokenizer, engines) -> Answerer:
    return make(tokenizer, *engines)


@pytest.fixture
def examples(tokenizer):
    """(question, reference answer) pairs to tokenized examples, numbered from 100."""

    def make(*pairs: tuple[str, str]) -> list[TokenizedExample]:
        return [
            TokenizedExample(
                Example(100 + row, question, answer),
                np.asarray([tokenizer.bos_id, *tokenizer.encode(question)], np.int32),
                np.asarray([*tokenizer.encode(answer), tokenizer.eos_id], np.int32),
            )
            for row, (question, answer) in enumerate(pairs)
        ]

    return make


def score(answerer, params, examples, samples=10):
    found = evaluate(answerer, params, examples, jax.random.key(0))
    return found.metrics, found.records[:samples]


ANSWERS_3 = {"2": "=", "4": "=", "=": "3", "3": EOS}


def test_right_answers_are_counted(direct, rig, examples):
    rows = examples(("1+2", "=3"), ("0+4", "=4"), ("1+4", "=3"), ("2+2", "=33"), ("4+4", "3"))
    metrics, records = score(direct, rig(ANSWERS_3), rows)
    assert metrics == {"eval/exact_match": pytest.approx(0.4)}
    assert [record["correct"] for record in records] == [True, False, True, False, False]
    assert records[1] == {
        "index": 101,
        "question": "0+4",
        "trace": None,
        "trace_end": None,
        "answer": "=3",
        "reference": "=4",
        "correct": False,
    }


def test_a_sample_of_a_chat_has_its_question_alone(direct, rig, examples):
    (row,) = examples(("1+2", "=3"))
    chat = dataclasses.replace(row.example, user_text="What is 1+2?")
    row = dataclasses.replace(row, example=chat)
    _, (record,) = score(direct, rig(ANSWERS_3), [row])
    assert (record["question"], record["user_text"]) == ("1+2", "What is 1+2?")


@pytest.mark.parametrize(
    ("after_3", "limit"), [(END, 3), ("<|pad|>", 3), ("3", 2)], ids=["t_end", "pad", "length"]
)
def test_an_answer_must_end_with_eos(direct, rig, examples, after_3, limit):
    answerer = dataclasses.replace(direct, max_answer_tokens=limit)
    metrics, records = score(answerer, rig(ANSWERS_3 | {"3": after_3}), examples(("1+2", "=3")))
    assert records[0]["answer"] == "=3"
    assert metrics["eval/exact_match"] == 0


def test_white_space_around_an_answer_does_not_count(direct, rig, examples):
    with_break = {"2": "\n", "\n": "3", "3": EOS}
    metrics, records = score(direct, rig(with_break), examples(("2", "3"), ("2", "\n3 ")))
    assert records[0]["answer"] == "\n3"
    assert metrics["eval/exact_match"] == 1


def test_what_is_extracted_is_compared(direct, rig, examples):
    """The last number of "=3", which the references say in other ways."""
    answerer = dataclasses.replace(direct, extract=make_extract("last_number"))
    rows = examples(("1+2", "3"), ("0+4", "1+2=3"), ("1+4", "=2"), ("3+3", "=33"))
    aliased = dataclasses.replace(rows[2].example, aliases=("4", "3.0"))
    rows.append(dataclasses.replace(rows[2], example=aliased))
    metrics, records = score(answerer, rig(ANSWERS_3 | {"3": EOS}), rows)
    assert [record["correct"] for record in records] == [True, True, False, False, True]
    assert metrics["eval/exact_match"] == pytest.approx(0.6)
    assert metrics["eval/extracted_share"] == pytest.approx(0.8)
    assert [record["extracted"] for record in records] == ["3", "3", "3", None, "3"]
    assert records[4]["accepted"] == ["2", "4", "3"]


def test_nothing_of_a_trace_and_of_a_cut_answer_is_extracted(reasoning, rig, examples):
    """x t_start 3 3 3 ..., cut and closed by t_end, then no answer; or one without an end."""
    answerer = dataclasses.replace(reasoning, extract=make_extract("last_number"))
    for follows, extracted in (({END: EOS}, None), ({END: "="}, None), ({END: "3"}, "333")):
        model = rig({START: "3", "3": "3", "=": EOS} | follows)
        metrics, (record,) = score(answerer, model, examples(("1+2", "=3")))
        assert record["trace"] == "333333"
        assert (record["extracted"], record["correct"]) == (extracted, False)
        assert metrics["eval/exact_match"] == 0


def test_references_without_an_answer(tokenizer):
    """Known before anything is trained."""
    numbers = np.zeros(1, np.int32)
    row = TokenizedExample(Example(0, "q", "seven"), numbers, numbers)
    with pytest.raises(InputError) as caught:
        check_references(make_extract("last_number"), [row])
    assert str(caught.value) == (
        "evaluation.extract=last_number: finds no answer in any of the 1 reference answers, such "
        "as 'seven'; set another"
    )
    check_references(make_extract("any_of"), [row])


def test_the_trace_comes_between_the_think_tokens(reasoning, rig, examples):
    """x t_start 1 t_end =3 eos: the answer follows t_end, the trace t_start."""
    model = rig({START: "1", "1": END, END: "=", "=": "3", "3": EOS})
    metrics, records = score(reasoning, model, examples(("1+2", "=3"), ("1+1", "=2")), samples=1)
    assert metrics == {
        "eval/exact_match": 0.5,
        "eval/trace_tokens": 1.0,
        "eval/think_end_share": 1.0,
    }
    assert len(records) == 1
    assert (records[0]["trace"], records[0]["trace_end"]) == ("1", END)


def test_the_trace_follows_what_the_template_writes_after_t_start(
    reasoning, rig, examples, tokenizer
):
    """x t_start break 1 t_end =3 eos, where t_start alone would be followed by =."""
    model = rig({START: "=", "\n": "1", "1": END, END: "=", "=": "3", "3": EOS})
    (row,) = examples(("1+2", "=3"))
    opened = dataclasses.replace(
        row, after_start_tokens=np.asarray(tokenizer.encode("\n"), np.int32)
    )
    metrics, (record,) = score(reasoning, model, [opened])
    assert (record["trace"], record["answer"], metrics["eval/exact_match"]) == ("1", "=3", 1.0)


@pytest.mark.parametrize(
    ("after_1", "trace", "end"),
    [("1", "111111", "length"), (EOS, "1", EOS), ("<|bos|>", "1", "<|bos|>")],
    ids=["limit", "eos", "bos"],
)
def test_think_end_is_appended_to_whatever_trace_there_is(
    reasoning, rig, examples, after_1, trace, end
):
    model = rig({START: "1", "1": after_1, END: "=", "=": "3", "3": EOS})
    metrics, records = score(reasoning, model, examples(("1+2", "=3")))
    assert metrics["eval/exact_match"] == 1
    assert metrics["eval/think_end_share"] == 0
    assert metrics["eval/trace_tokens"] == len(trace)
    assert (records[0]["trace"], records[0]["trace_end"]) == (trace, end)


def test_the_answer_sees_question_and_trace(reasoning, tokenizer, a):
    """An ordinary model, followed token by token with whole forwards."""
    rows = ([7, 8], [9, 10, 16, 11])
    start = tokenizer.think_start_id
    prompts = [np.asarray([tokenizer.bos_id, *row, start], np.int32) for row in rows]
    stop_ids = tokenizer.special_ids
    params = nnx.split(decoder(a))[1]
    answered = reasoning.answer(params, prompts, jax.random.key(0))
    for opened, (trace, answer) in zip(prompts, answered, strict=True):
        assert (trace.tokens.tolist(), trace.end_token) == greedy(a, opened, 6, stop_ids)
        closed = np.concatenate([opened, trace.tokens, [tokenizer.think_end_id]])
        assert (answer.tokens.tolist(), answer.end_token) == greedy(a, closed, 3, stop_ids)


def test_sampled_answers_repeat_with_their_key_alone(reasoning, tokenizer, a):
    answerer = dataclasses.replace(reasoning, trace_temperature=1.0)
    params = nnx.split(decoder(a))[1]
    prompts = [np.asarray([tokenizer.bos_id, 7, 8, tokenizer.think_start_id], np.int32)] * 8

    def draw(seed):
        answered = answerer.answer(params, prompts, jax.random.key(seed))
        return [(t.tokens.tolist(), y.tokens.tolist()) for t, y in answered]

    first = draw(0)
    assert first == draw(0) != draw(1)
    assert len({str(pair) for pair in first}) > 4


def test_answers_are_greedy_whatever_the_temperature_of_the_trace(reasoning, tokenizer, a):
    answerer = dataclasses.replace(reasoning, trace_temperature=1.0)
    params = nnx.split(decoder(a))[1]
    prompts = [np.asarray([tokenizer.bos_id, 7, 8, tokenizer.think_start_id], np.int32)] * 4
    answered = answerer.answer(params, prompts, jax.random.key(0))
    assert len({str(trace.tokens) for trace, _ in answered}) > 1
    for trace, answer in answered:
        closed = np.concatenate([prompts[0], trace.tokens, [tokenizer.think_end_id]])
        expected = greedy(a, closed, 3, tokenizer.special_ids)
        assert (answer.tokens.tolist(), answer.end_token) == expected


def rewards_am(scores):
    """Means of the probabilities, in plain NumPy."""
    rewards = np.asarray([np.exp(score.samples_KA).mean(axis=1) for score in scores])
    return rewards, np.asarray([np.exp(score.empty_A).mean() for score in scores])


def test_references_are_scored_after_the_trace(reasoning, rig, examples, a):
    """x t_start 1 t_end =3 eos: right answers are all but sure, others all but impossible."""
    model = rig({START: "1", "1": END, END: "=", "=": "3", "3": EOS})
    judged = dataclasses.replace(reasoning, score_rewards=rewards_am)
    rows = examples(("1+2", "=3"), ("1+1", "=2"))
    metrics, records = score(judged, model, rows)
    plain, plain_records = score(reasoning, model, rows)
    assert records == plain_records
    assert plain.items() <= metrics.items()
    assert metrics.keys() - plain.keys() == {
        "eval/reward",
        "eval/baseline",
        "eval/reference_logprob",
    }
    # A score of 10 times the norm of a one-hot row; after "2", which nothing follows, 25 are alike.
    gap, alike = 10 * np.sqrt(a.hidden_size), np.log(a.vocab_size)
    log_c = np.asarray([[0, 0, 0], [0, -gap, -alike]])
    assert metrics["eval/reward"] == pytest.approx(np.exp(log_c).mean(), rel=1e-5)
    assert metrics["eval/reference_logprob"] == pytest.approx(log_c.mean(), rel=1e-3)
    # The next token depends on the last alone, so it is the same after an empty trace.
    assert metrics["eval/baseline"] == pytest.approx(metrics["eval/reward"], rel=1e-5)


def test_end_name(tokenizer):
    def ended_by(token):
        return end_name(tokenizer, Trace(np.zeros(0, np.int32), np.zeros(0), token, 0.0))

    assert ended_by(None) == "length"
    assert ended_by(tokenizer.eos_id) == EOS
