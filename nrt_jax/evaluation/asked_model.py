"""A model that benchmarks ask: its prompts, its limits, and its engines."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import numpy as np

from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.checkpoints.open import OpenModel
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.decode_state import bucket
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.make import answer_stop_ids, make_engine, trace_banned_ids
from nrt_jax.engine.programs import Programs
from nrt_jax.engine.scorer import Continuation, Scored, Scorer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.answer_log import seed_of
from nrt_jax.evaluation.answer_stream import Answered, Question, stream_answers
from nrt_jax.evaluation.contexts import Context, ContextTokens
from nrt_jax.evaluation.requests import Asked

log = logging.getLogger(__name__)

FULL_ENGINES = 2
"""Questions of one prompt bucket that are worth an engine of their own, in times its slots."""


@dataclass(frozen=True)
class AskedModel:
    """Weights, and how they are asked."""

    config: RunConfig
    model: Model
    tokenizer: Tokenizer
    params: Any = field(repr=False)
    programs: Programs = field(repr=False)

    @classmethod
    def of(cls, opened: OpenModel) -> "AskedModel":
        """A model that was opened; it computes in the dtype of its weights."""
        own = {"dtype": None, "cache_dtype": None}
        rollout = opened.config.rollout.model_copy(update=own)
        config = opened.config.model_copy(update={"rollout": rollout})
        programs = Programs(opened.model.mesh)
        return cls(config, opened.model, opened.tokenizer, opened.params, programs)

    @property
    def reasons(self) -> bool:
        """Whether a trace comes before an answer."""
        return self.config.method == "nrt"

    @cached_property
    def contexts(self) -> ContextTokens:
        """Builds its prompts."""
        return ContextTokens(self.config.data, self.tokenizer, reasons=self.reasons)

    @cached_property
    def _scorer(self) -> Scorer:
        return Scorer(self.model.definition, self.model.mesh)

    @property
    def trace_limit(self) -> int:
        """Longest trace in tokens; 0 where there is none."""
        return self.config.rollout.max_trace_tokens if self.reasons else 0

    def answer(
        self, asked: Sequence[Asked], *, answers: bool = True
    ) -> Iterator[tuple[int, Answered]]:
        """The index and the answer of each request, as they come; or the trace alone.

        A trace is drawn as its answer, but greedy ones at evaluation.trace_temperature. Raises
        InputError for a prompt that leaves no room, before anything is drawn.
        """
        questions = self._questions(asked, answers=answers)
        slots = self.config.rollout.slots
        for batch in batches(questions, FULL_ENGINES * slots):
            # An empty slot costs as much per step as a full one.
            engine = self._engine([questions[i] for i in batch], min(slots, len(batch)))
            answered = stream_answers(
                engine,
                self.params,
                self.tokenizer,
                [questions[i] for i in batch],
                steps=self.config.rollout.decode_steps,
            )
            yield from ((batch[i], of_question) for i, of_question in answered)

    def closed_prompt(self, context: Context, trace: Sequence[int]) -> np.ndarray:
        """What a given answer follows, int32: x t_start z t_end, or x without reasoning."""
        prompt = self.contexts.prompt(context)
        if not self.reasons:
            return prompt
        return np.concatenate([prompt, trace, [self.tokenizer.think_end_id]]).astype(np.int32)

    def score(self, continuations: Sequence[Continuation]) -> Iterator[tuple[int, Scored]]:
        """The index and the log-likelihood of each given answer, as they come."""
        return self._scorer.score(self.params, continuations)

    def _questions(self, asked: Sequence[Asked], *, answers: bool) -> list[Question]:
        shortened, questions = 0, []
        for request in asked:
            try:
                question = self._question(request, answers=answers)
                fitted = self._fitted(question)
            except InputError as error:
                raise InputError(f"{request.name}: {error}") from None
            shortened += _limits(fitted) != _limits(question)
            questions.append(fitted)
        if shortened:
            log.warning(
                "%d of %d prompts leave less than the limits of trace and answer before the "
                "model's %d positions; theirs are shorter",
                shortened,
                len(asked),
                self.model.architecture.max_position_embeddings,
            )
        return questions

    def _question(self, asked: Asked, *, answers: bool) -> Question:
        sampling, config = asked.drawing.sampling, self.config
        of_trace = sampling
        if not sampling.temperature:
            of_trace = sampling._replace(temperature=config.evaluation.trace_temperature)
        limit = asked.drawing.max_tokens or config.evaluation.max_answer_tokens
        return Question(
            prompt_tokens=self.contexts.prompt(asked.context),
            seed=seed_of(asked.key),
            max_trace_tokens=self.trace_limit,
            max_answer_tokens=limit if answers else 0,
            trace_sampling=of_trace,
            answer_sampling=sampling,
            until=asked.drawing.until,
            prefix_tokens=self.contexts.prefix(asked.context),
        )

    def _fitted(self, question: Question) -> Question:
        """With limits that the model's positions hold: each gets its own, or half of the room."""
        positions = self.model.architecture.max_position_embeddings
        room = positions - _longest_prompt(question._replace(max_trace_tokens=0))
        if question.max_trace_tokens:
            room -= 1  # of t_end
        trace = min(
            question.max_trace_tokens, max(room - max(1, question.max_answer_tokens), room // 2)
        )
        if room - trace < 1 or trace < min(1, question.max_trace_tokens):
            raise InputError(
                f"its prompt has {len(question.prompt_tokens)} tokens, which leaves no room in the "
                f"model's {positions} positions; leave the task out by --tasks"
            )
        answer = min(question.max_answer_tokens, room - trace)
        return question._replace(max_trace_tokens=trace, max_answer_tokens=answer)

    def _engine(self, questions: Sequence[Question], slots: int) -> Engine:
        limits = [max(_limits(question)) for question in questions]
        banned = trace_banned_ids(self.config, self.tokenizer) if self.reasons else frozenset()
        return make_engine(
            self.config,
            self.model,
            slots=slots,
            longest_prompt=max(map(_longest_prompt, questions)),
            new_tokens=max(limits),
            stop_ids=answer_stop_ids(self.config, self.tokenizer),
            # Those of the traces; an answer does not obey them.
            banned_ids=banned,
            programs=self.programs,
        )


def _limits(question: Question) -> tuple[int, int]:
    return question.max_trace_tokens, question.max_answer_tokens


def _longest_prompt(question: Question) -> int:
    """Tokens before the answer after the longest trace, t_end included."""
    of_trace = question.max_trace_tokens + 1 if question.max_trace_tokens else 0
    return len(question.prompt_tokens) + of_trace + len(question.prefix_tokens)


def batches(questions: Sequence[Question], enough: int) -> list[list[int]]:
    """Indices of questions that one engine answers, the longest answers of each first.

    All slots of an engine are as long as its longest sequence, so that only answers of one bucket
    of limits go together. Of these, prompts of one bucket go together where there are `enough` of
    them to keep an engine full; otherwise with those of the next bucket.
    """
    order = sorted(range(len(questions)), key=lambda i: (*_buckets(questions[i]), i))
    made: list[list[int]] = []
    limit_of_last = 0
    for (limit, _), indices in groupby(order, key=lambda i: _buckets(questions[i])):
        if made and len(made[-1]) < enough and limit == limit_of_last:
            made[-1] += indices
        else:
            made.append(list(indices))
        limit_of_last = limit
    return [sorted(batch, key=lambda i: _longest_first(questions[i], i)) for batch in made]


def _buckets(question: Question) -> tuple[int, int]:
    """Of the longest of trace and answer, and of the prompt."""
    return bucket(max(_limits(question))), bucket(len(question.prompt_tokens))


def _longest_first(question: Question, index: int) -> tuple[int, int, int]:
    return -sum(_limits(question)), -len(question.prompt_tokens), index
