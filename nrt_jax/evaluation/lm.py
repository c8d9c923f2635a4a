"""lm-eval's model: it answers through our engine, and keeps every answer as it comes.

lm-eval sees one process. All processes of a mesh run the same requests; process 0 has the log.
"""

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from tqdm import tqdm

from nrt_jax import distributed
from nrt_jax.engine.scorer import Continuation
from nrt_jax.errors import InputError
from nrt_jax.evaluation.answer_log import CLOSED, AnswerLog, AnswerRow
from nrt_jax.evaluation.answer_stream import Answered
from nrt_jax.evaluation.asked_model import AskedModel
from nrt_jax.evaluation.contexts import of_conversation
from nrt_jax.evaluation.held_out import end_name
from nrt_jax.evaluation.requests import (
    Asked,
    Drawing,
    Given,
    asked_answers,
    given_answers,
    of_document,
)

log = logging.getLogger(__name__)

AFTER_TRACE = "_after_trace"
"""Tasks whose names end so score given answers after a sampled trace."""
SCORED_TOGETHER = 512
"""Given answers that are scored and kept together, whole documents of them."""
_TRACE_DRAWING = Drawing(temperature=1.0, top_p=1.0, top_k=0, until=(), max_tokens=None)
"""Of those traces."""


class LoggedLM(LM):
    """What the models behind lm-eval share: conversations as text, and the log of answers."""

    def __init__(self, answers: AnswerLog, *, seed: int):
        super().__init__()
        self.answers, self.seed = answers, seed
        self.keys: dict[tuple[str, int], list[str]] = defaultdict(list)
        """Rows of sampled answers and traces by task and document."""

    @property
    def tokenizer_name(self) -> str:
        """lm-eval names its cache of prompts by this, which is not used."""
        return ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The turns as text; the model's own template renders them later."""
        return of_conversation(chat_history, opens_answer=add_generation_prompt).to_text()

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answers, without their traces and cut before stop texts."""
        asked = asked_answers(requests, self.seed, *self.settings())
        for request in asked:
            self.keys[request.task, request.document].append(request.key)
        self._ask_missing("answers", asked, self.rows)
        return [self._answer(request.key) for request in asked]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """Refused: no task of reasoning asks for the perplexity of whole texts."""
        raise InputError(
            f"task {requests[0].task_name}: asks for the perplexity of whole texts, which is not "
            "measured here; leave it out"
        )

    def settings(self) -> tuple[Any, ...]:
        """What decides an answer besides the request, its seed and the model."""
        raise NotImplementedError

    def rows(self, asked: Sequence[Asked]) -> Iterator[AnswerRow]:
        """The answers, as they come."""
        raise NotImplementedError

    def _answer(self, key: str) -> str:
        # Processes without the log only compute.
        return (self.answers[key].answer or "") if distributed.is_first() else ""

    def _ask_missing(
        self,
        what: str,
        asked: Sequence[Asked],
        rows: Callable[[Sequence[Asked]], Iterator[AnswerRow]],
    ) -> None:
        missing = self._missing(what, asked)
        with self._bar(what, len(asked), len(asked) - len(missing)) as bar:
            for row in rows(missing) if missing else ():
                self.answers.add(row)
                bar.update()

    def _missing(self, what: str, asked: Sequence[Any]) -> list[Any]:
        """Those that the log of process 0 does not have."""
        known = [request.key in self.answers for request in asked]
        known = distributed.from_first(what, known)
        return [request for request, there in zip(asked, known, strict=True) if not there]

    def _bar(self, what: str, total: int, done: int) -> tqdm:
        """Shown on a terminal alone, by process 0."""
        disable = None if distributed.is_first() else True
        return tqdm(
            desc=what, total=total, initial=done, unit="", dynamic_ncols=True, disable=disable
        )


class EngineLM(LoggedLM):
    """A model of ours, in this process."""

    def __init__(self, asked: AskedModel, answers: AnswerLog, *, seed: int = 0):
        super().__init__(answers, seed=seed)
        self.model = asked

    def settings(self) -> tuple[Any, ...]:
        evaluation = self.model.config.evaluation
        return (
            self.model.trace_limit,
            evaluation.trace_temperature if self.model.reasons else 0.0,
            evaluation.max_answer_tokens,
        )

    def rows(self, asked: Sequence[Asked]) -> Iterator[AnswerRow]:
        return self._rows(asked, answers=True)

    def _rows(self, asked: Sequence[Asked], *, answers: bool) -> Iterator[AnswerRow]:
        for index, answered in self.model.answer(asked, answers=answers):
            yield self._row(asked[index], answered, answers=answers)

    def _row(self, asked: Asked, answered: Answered, *, answers: bool) -> AnswerRow:
        tokenizer, trace, answer = self.model.tokenizer, answered.trace, answered.answer
        values: dict[str, Any] = {"answer": answered.text if answers else None}
        if trace is not None and not answers:
            values["trace_ids"] = trace.tokens.tolist()
        if trace is not None:
            values["trace"] = tokenizer.decode(trace.tokens)
            values["trace_end"] = CLOSED if answered.closed else end_name(tokenizer, trace)
            values["trace_tokens"] = len(trace.tokens)
            values["trace_logprob"] = float(trace.logprobs.sum()) + trace.end_logprob
        if answer is not None:
            values["answer_end"] = answered.end
            values["answer_tokens"] = len(answer.tokens)
            values["answer_logprob"] = float(answer.logprobs.sum()) + answer.end_logprob
        return asked.row(**values)

    # Given answers

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """The log-likelihoods of given answers in nats, and whether each is the greedy one.

        After x; of a model that reasons after the empty trace, x t_start t_end, and in tasks named
        `..._after_trace` after a sampled one. A trace that never closes gets its t_end.
        """
        given = given_answers(requests, self.seed, *self.settings())
        by_task: dict[str, list[Given]] = defaultdict(list)
        for request in given:
            by_task[request.task].append(request)
        for task, of_task in by_task.items():
            self._score_task(task, of_task)
        if not distributed.is_first():
            return [(0.0, False)] * len(given)
        rows = [self.answers[request.key] for request in given]
        return [(row.answer_logprob, bool(row.is_greedy)) for row in rows]

    def _score_task(self, task: str, given: Sequence[Given]) -> None:
        trace_keys = {}
        if task.endswith(AFTER_TRACE) and self.model.reasons:
            trace_keys = self._draw_traces(task, given)
        missing = {request.key for request in self._missing(f"scores of {task}", given)}
        with self._bar(f"scores of {task}", len(given), len(given) - len(missing)) as bar:
            for chunk in _chunks(given):
                # Whole chunks, also of a run that goes on: what is scored together decides how the
                # last digit of a log-likelihood is rounded.
                if any(request.key in missing for request in chunk):
                    traces = self._drawn(chunk, trace_keys) if trace_keys else {}
                    self.answers.add(*self._scores(chunk, traces))
                    bar.update(sum(request.key in missing for request in chunk))

    def _draw_traces(self, task: str, given: Sequence[Given]) -> dict[int, str]:
        """Sample one trace per document; the keys of their rows by document."""
        by_document = {request.document: request for request in given}
        asked = [
            of_document(request, _TRACE_DRAWING, self.seed, *self.settings())
            for request in by_document.values()
        ]
        for request in asked:
            self.keys[request.task, request.document].append(request.key)
        self._ask_missing(f"traces of {task}", asked, partial(self._rows, answers=False))
        return {request.document: request.key for request in asked}

    def _drawn(self, given: Sequence[Given], keys: dict[int, str]) -> dict[int, list[int]]:
        """The trace of each document, which process 0 tells the others."""
        documents = sorted({request.document for request in given})
        traces = []
        if distributed.is_first():
            traces = [self.answers[keys[document]].trace_ids or [] for document in documents]
        traces = distributed.from_first("traces", traces)
        return dict(zip(documents, traces, strict=True))

    def _scores(self, given: Sequence[Given], traces: dict[int, list[int]]) -> list[AnswerRow]:
        continuations = [self._continuation(request, traces) for request in given]
        rows = []
        for index, scored in self.model.score(continuations):
            request, tokens = given[index], len(continuations[index].tokens)
            rows.append(request.row(tokens, scored))
        return rows

    def _continuation(self, given: Given, traces: dict[int, list[int]]) -> Continuation:
        try:
            prefix, answer = self.model.contexts.given_answer(given.context, given.answer)
            before = self.model.closed_prompt(given.context, traces.get(given.document, []))
        except InputError as error:
            raise InputError(f"{given.name}: {error}") from None
        return Continuation(np.concatenate([before, prefix]).astype(np.int32), answer)


def _chunks(given: Sequence[Given]) -> Iterator[list[Given]]:
    """Given answers of whole documents, about `SCORED_TOGETHER` at a time."""
    chunk: list[Given] = []
    for _, document in groupby(given, key=lambda request: request.document):
        chunk += document
        if len(chunk) >= SCORED_TOGETHER:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
