"""Requests of lm-eval, each with what decides its answer."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from nrt_jax.engine.sampling import Sampling
from nrt_jax.engine.scorer import Scored
from nrt_jax.errors import InputError
from nrt_jax.evaluation.answer_log import AnswerRow, answer_key
from nrt_jax.evaluation.contexts import Context, read_context

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

_KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}


class Drawing(NamedTuple):
    """How a task wants its answers drawn: lm-eval's `generation_kwargs`."""

    temperature: float
    """0 is greedy."""
    top_p: float
    top_k: int
    until: tuple[str, ...]
    max_tokens: int | None
    """Of the answer alone; None for the model's own limit."""

    @property
    def sampling(self) -> Sampling:
        """For the engine."""
        return Sampling(self.temperature, top_p=self.top_p, top_k=self.top_k)


def read_drawing(task: str, values: Mapping[str, Any]) -> Drawing:
    """The settings of a task; InputError for one that is not known here.

    `do_sample: true` without a temperature is T = 1; `do_sample: false` is T = 0.
    """
    if unknown := sorted(set(values) - _KNOWN):
        raise InputError(
            f"task {task}: generation_kwargs.{unknown[0]} is not known; use {', '.join(_KNOWN)}"
        )
    samples = values.get("do_sample", bool(values.get("temperature", 0)))
    until = values.get("until") or ()
    limit = values.get("max_gen_toks")
    return Drawing(
        temperature=float(values.get("temperature", 1.0)) if samples else 0.0,
        top_p=float(values.get("top_p", 1.0)),
        top_k=int(values.get("top_k", 0)),
        until=(until,) if isinstance(until, str) else tuple(until),
        max_tokens=None if limit is None else int(limit),
    )


class Asked(NamedTuple):
    """A request for an answer."""

    task: str
    document: int
    repeat: int
    context: Context
    drawing: Drawing
    key: str
    """Names its answer in the log, and its draws."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"task {self.task}, document {self.document}"

    def row(self, **values: Any) -> AnswerRow:
        """A row of the log for it."""
        return AnswerRow(
            key=self.key,
            task=self.task,
            document=self.document,
            choice=0,
            repeat=self.repeat,
            **values,
        )


def asked_answers(requests: Sequence["Instance"], *settings: Any) -> list[Asked]:
    """The requests of `generate_until`, of which lm-eval repeats those with several samples.

    `settings` are what else decides an answer.
    """
    seen: Counter[tuple] = Counter()
    asked = []
    for request in requests:
        task, document = str(request.task_name), int(request.doc_id or 0)
        text, values = cast(tuple[Any, Any], request.args)
        repeat = seen[task, document, request.idx]
        seen[task, document, request.idx] += 1
        drawing = read_drawing(task, values)
        key = answer_key("answer", task, document, request.idx, repeat, text, drawing, settings)
        asked.append(Asked(task, document, repeat, read_context(text), drawing, key))
    return asked


class Given(NamedTuple):
    """A request for the log-likelihood of a given answer."""

    task: str
    document: int
    choice: int
    context: Context
    answer: str
    key: str

    @property
    def name(self) -> str:
        """For messages."""
        return f"task {self.task}, document {self.document}"

    def row(self, tokens: int, scored: Scored) -> AnswerRow:
        """A row of the log for it."""
        return AnswerRow(
            key=self.key,
            task=self.task,
            document=self.document,
            choice=self.choice,
            repeat=0,
            answer=self.answer,
            answer_tokens=tokens,
            answer_logprob=scored.logprob,
            is_greedy=scored.is_greedy,
        )


def given_answers(requests: Sequence["Instance"], *settings: Any) -> list[Given]:
    """The requests of `loglikelihood`; `settings` are what else decides a score."""
    given = []
    for request in requests:
        task, document = str(request.task_name), int(request.doc_id or 0)
        text, answer = cast(tuple[Any, Any], request.args)
        key = answer_key("score", task, document, request.idx, text, answer, settings)
        given.append(Given(task, document, request.idx, read_context(text), answer, key))
    return given


def of_document(given: Given, drawing: Drawing, *settings: Any) -> Asked:
    """The request for the trace after which a document's given answers are scored."""
    key = answer_key("trace", given.task, given.document, given.context, drawing, settings)
    return Asked(given.task, given.document, 0, given.context, drawing, key)
