"""Answers as they come, of models whose next token follows from the last one."""

import numpy as np
import pytest

from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.sampling import Sampling
from nrt_jax.evaluation.answer_stream import Answered, Question, stream_answers
from tests.engine.toy import params

EOS, START, END = "<|eos|>", "<|think_start|>", "<|think_end|>"
DIRECT = {"2": "=", "=": "3", "3": EOS}
REASONING = {START: "1", "1": END, END: "=", "=": "3", "3": EOS}


@pytest.fixture
def ask(tokenizer, engines, rig):
    """The answer of a model with these rules to one question."""

    def ask(follows: dict[str, str], *, traces: int = 0, answers: int = 5, **fields) -> Answered:
        prompt = [tokenizer.bos_id, *tokenizer.encode("2")]
        prompt += [tokenizer.think_start_id] if traces else []
        question = Question(np.array(prompt, np.int32), 0, traces, answers, **fields)
        ((index, answered),) = stream_answers(engines[1], rig(follows), tokenizer, [question])
        assert index == 0
        return answered

    return ask


def ids(tokenizer: Tokenizer, *names: str) -> list[int]:
    return [int(tokenizer.backend.token_to_id(name)) for name in names]


def test_a_model_that_does_not_reason_answers_directly(ask, tokenizer):
    answered = ask(DIRECT)
    assert (answered.trace, answered.closed, answered.text, answered.end) == (
        None,
        True,
        "=3",
        "stop",
    )
    assert answered.answer.tokens.tolist() == ids(tokenizer, "=", "3")
    assert answered.answer.end_token == tokenizer.eos_id


def test_the_answer_follows_the_trace_that_closed(ask, tokenizer):
    answered = ask(REASONING, traces=4)
    assert answered.trace.tokens.tolist() == ids(tokenizer, "1")
    assert (answered.closed, answered.text, answered.end) == (True, "=3", "stop")


@pytest.mark.parametrize("instead", [EOS, "1"])
def test_a_trace_that_never_closes_has_an_empty_answer(ask, instead):
    """Neither the end of the sequence nor the limit of the trace closes it."""
    answered = ask(REASONING | {"1": instead}, traces=4)
    assert (answered.closed, answered.answer, answered.text) == (False, None, "")
    assert len(answered.trace.tokens) == (1 if instead == EOS else 4)


def test_stop_texts_and_limits_cut_the_answer_alone(ask, tokenizer):
    answered = ask(REASONING, traces=4, until=("1", "3"))
    assert (answered.text, answered.end) == ("=", "until")
    assert answered.answer.tokens.tolist() == ids(tokenizer, "=", "3")
    answered = ask(REASONING, traces=4, answers=1)
    assert (answered.closed, answered.text, answered.end) == (True, "=", "length")


def test_a_stop_text_may_span_tokens_and_the_first_one_cuts(ask):
    follows = {"2": "1", "1": "+", "+": "3", "3": "=", "=": EOS}
    assert ask(follows, until=("=", "+3")).text == "1"
    assert ask(follows, until=("=",)).text == "1+3"
    assert ask(follows, until=("=3",)).text == "1+3="


def test_what_the_answer_begins_with_follows_the_trace(ask, tokenizer):
    prefix = np.array(ids(tokenizer, "4"), np.int32)
    answered = ask(REASONING | {"4": "3"}, traces=4, prefix_tokens=prefix)
    assert answered.trace.tokens.tolist() == ids(tokenizer, "1")
    assert answered.text == "3"


def test_a_trace_alone_has_no_answer(ask):
    answered = ask(REASONING, traces=4, answers=0)
    assert (answered.closed, answered.answer, answered.end) == (True, None, None)


def test_answers_depend_on_their_seed_and_not_on_the_order(tokenizer, a, engines):
    """More questions than slots, sampled from random weights."""
    weights = params(a)
    prompt = np.array([tokenizer.bos_id, *tokenizer.encode("2")], np.int32)
    drawn = Sampling(1.0)
    questions = [
        Question(prompt, seed, 3 * (seed % 2), 5, trace_sampling=drawn, answer_sampling=drawn)
        for seed in range(10)
    ]

    def answers(order):
        asked = [questions[i] for i in order]
        found = dict(stream_answers(engines[1], weights, tokenizer, asked, steps=2))
        assert sorted(found) == list(range(len(order)))
        return {order[i]: answered for i, answered in found.items()}

    forward, backward = answers(list(range(10))), answers(list(range(9, -1, -1)))
    texts = {i: (answered.text, str(answered.trace)) for i, answered in forward.items()}
    assert texts == {i: (answered.text, str(answered.trace)) for i, answered in backward.items()}
    assert len({answered.text for answered in forward.values()}) > 3, "each has draws of its own"
