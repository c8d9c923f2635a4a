"""Which questions share an engine, and limits where the model's positions are few."""

import numpy as np
import pytest

from nrt_jax.checkpoints.open import open_model
from nrt_jax.errors import InputError
from nrt_jax.evaluation.answer_stream import Question
from nrt_jax.evaluation.asked_model import AskedModel, batches
from nrt_jax.evaluation.contexts import Context
from nrt_jax.evaluation.requests import Asked, Drawing
from tests.data.made_tokenizers import write_made_tokenizer
from tests.training.runs import write_model

USER = Context(({"role": "user", "content": "How many?"},))


def question(length: int, limit: int = 8) -> Question:
    return Question(np.zeros(length, np.int32), 0, 0, limit)


def asked(max_tokens: int, context: Context = USER) -> Asked:
    return Asked("gsm8k", 3, 0, context, Drawing(0.0, 1.0, 0, (), max_tokens), "ab" * 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> AskedModel:
    """Reasons in up to 40 tokens; 128 positions."""
    folder = tmp_path_factory.mktemp("model")
    write_model(folder, vocab_size=700, max_position_embeddings=128)
    write_made_tokenizer("llama3", folder)
    overrides = ["method=nrt", "data.template=tulu", "rollout.max_trace_tokens=40"]
    return AskedModel.of(open_model(folder, overrides))


def test_prompts_of_one_bucket_share_an_engine_that_they_fill():
    questions = [question(n) for n in (100, 10, 200, 12, 90, 14)]
    assert batches(questions, 2) == [[5, 3, 1], [0, 4], [2]]
    assert batches(questions, 3) == [[5, 3, 1], [2, 0, 4]]
    assert batches(questions, 7) == [[2, 0, 4, 5, 3, 1]], "too few for engines of their own"


def test_the_longest_answers_begin_first():
    questions = [question(10), question(10, limit=12), question(12)]
    assert batches(questions, 1) == [[1, 2, 0]]


def test_short_answers_do_not_pay_for_the_slots_of_long_ones():
    questions = [question(10, limit=2048), question(10), question(200), question(10, limit=2000)]
    assert batches(questions, 7) == [[2, 1], [0, 3]]


@pytest.mark.parametrize(
    ("answer", "spare", "trace", "fitted"),
    [(10, 60, 40, 10), (30, 60, 30, 30), (100, 60, 30, 30), (5, 30, 25, 5), (100, 3, 1, 2)],
)
def test_trace_and_answer_have_their_limits_or_half_of_the_room(
    model, answer, spare, trace, fitted
):
    """`spare` positions are left for both, beside t_end."""
    long = question(128 - 1 - spare, answer)._replace(max_trace_tokens=40)
    limits = model._fitted(long)
    assert (limits.max_trace_tokens, limits.max_answer_tokens) == (trace, fitted)


def test_a_prompt_without_room_is_named_before_anything_is_drawn(model):
    long = Context(({"role": "user", "content": "How many? " * 60},))
    with pytest.raises(
        InputError,
        match=r"task gsm8k, document 3: its prompt has \d+ tokens, which leaves no room in the "
        r"model's 128 positions; leave the task out by --tasks",
    ):
        next(model.answer([asked(10), asked(10, long)]))


def test_a_greedy_task_leaves_the_trace_its_own_temperature(model):
    """And a sampled one draws both alike."""
    warm = asked(10)._replace(drawing=Drawing(0.7, 0.9, 0, (), 10))
    drawn = model._question(warm, answers=True)
    assert drawn.trace_sampling == drawn.answer_sampling == warm.drawing.sampling
    model.config.evaluation.__dict__["trace_temperature"] = 0.5
    greedy = model._question(asked(10), answers=True)
    assert (greedy.trace_sampling.temperature, greedy.answer_sampling.temperature) == (0.5, 0.0)
