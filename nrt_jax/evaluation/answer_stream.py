"""Answers to many questions, each as soon as it is finished.

Traces and answers share the slots of one engine, so that it is full until the last questions:

    x t_start ─► z ─┬─ t_end ──────────► x t_start z t_end prefix ─► y ─► cut before a stop text
                    └─ anything else: never closed, the answer is empty

A model that does not reason begins with y after x.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from nrt_jax.data.detokenizer import Detokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import advance
from nrt_jax.engine.requests import Event, Request, first_sizes, request_key
from nrt_jax.engine.sampling import Sampling
from nrt_jax.engine.scheduler import Scheduler
from nrt_jax.types import Trace

End = Literal["stop", "until", "length"]
"""A token of the model ended the text, a stop text did, or its limit."""
_OF_TRACE, _OF_ANSWER = 0, 1
"""Random streams: an answer must not be drawn with the noise of its trace."""
_NO_TOKENS = np.zeros(0, np.int32)


class Question(NamedTuple):
    """A prompt, and how its trace and its answer are drawn."""

    prompt_tokens: np.ndarray
    """int32: x t_start where a trace comes first, else x."""
    seed: int
    """Of its draws, a signed 64-bit number."""
    max_trace_tokens: int
    """0 for a model that answers directly."""
    max_answer_tokens: int
    """0 for a trace alone."""
    trace_sampling: Sampling = Sampling(0.0)
    answer_sampling: Sampling = Sampling(0.0)
    until: tuple[str, ...] = ()
    """Texts before which the answer is cut; a trace may hold them."""
    prefix_tokens: np.ndarray = _NO_TOKENS
    """What the answer begins with, int32, after the trace."""


class Answered(NamedTuple):
    """What came of a question."""

    trace: Trace | None
    """z; None without one."""
    closed: bool
    """Whether t_end ended the trace; true without a trace."""
    answer: Trace | None
    """y up to the token that completes a stop text; None after a trace that never closed."""
    text: str
    """Of the answer, cut before the first stop text."""
    end: End | None
    """What ended the answer; None where there is none."""


def stream_answers(
    engine: Engine,
    params: Any,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    *,
    steps: int = 16,
) -> Iterator[tuple[int, Answered]]:
    """The index and the answer of each question, in the order in which they are finished.

    An answer depends on its question and the weights alone, up to rounding. `steps` tokens of each
    sequence are decoded per dispatch.
    """
    return _Stream(engine, params, tokenizer, questions, steps).run()


def closed_prompt(prompt: np.ndarray, trace: Trace, end: int) -> np.ndarray:
    """x t_start z t_end, int32, of the prompt x t_start."""
    return np.concatenate([prompt, trace.tokens, [end]]).astype(np.int32)


@dataclass
class _Drawn:
    """One sequence while it is drawn."""

    index: int
    """Of its question."""
    trace: Trace | None
    """The one that it follows, for an answer."""
    detokenizer: Detokenizer | None
    """None for a trace, whose text ends nothing."""
    until: tuple[str, ...] = ()
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    text: str = ""
    end: End | None = None
    ended_by: tuple[int, float] | None = None
    """The token that ended it, with its logprob."""

    def add(self, event: Event) -> bool:
        """Take the new tokens; whether the sequence is at its end."""
        stopped = event.finished == "stop"
        count = len(event.tokens) - stopped
        new = zip(event.tokens[:count].tolist(), event.logprobs[:count].tolist(), strict=True)
        for token, logprob in new:
            self.tokens.append(token)
            self.logprobs.append(logprob)
            if self.detokenizer is not None and self._write(self.detokenizer.feed(token)):
                self.end = "until"
                return True
        if event.finished is None:
            return False
        found = self.detokenizer is not None and self._write(self.detokenizer.flush())
        self.end = "until" if found else event.finished
        if stopped:
            self.ended_by = int(event.tokens[-1]), float(event.logprobs[-1])
        return True

    def _write(self, text: str) -> bool:
        """Append to the text; whether it now has a stop text, before which it is cut."""
        longest = max(map(len, self.until), default=0)
        start = max(0, len(self.text) - longest + 1)
        self.text += text
        found = [self.text.find(stop, start) for stop in self.until]
        cut = min((place for place in found if place >= 0), default=None)
        self.text = self.text[:cut]
        return cut is not None

    def as_trace(self) -> Trace:
        """Everything that was drawn."""
        end_token, end_logprob = self.ended_by or (None, 0.0)
        return Trace(
            tokens=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            end_token=end_token,
            end_logprob=end_logprob,
        )


class _Stream:
    def __init__(
        self,
        engine: Engine,
        params: Any,
        tokenizer: Tokenizer,
        questions: Sequence[Question],
        steps: int,
    ):
        self._tokenizer, self._questions = tokenizer, questions
        first = [Request(question.prompt_tokens, 0, 1, 1) for question in questions]
        sizes = first_sizes(engine, first)
        self._scheduler = Scheduler(engine, params, steps=steps, sizes=sizes)
        self._ahead = engine.max_concurrent_decodes
        """Questions that wait in the scheduler: enough to fill its slots, and few, since an answer
        waits behind them."""
        self._drawn: dict[int, _Drawn] = {}
        """Unfinished sequences by ticket."""

    def run(self) -> Iterator[tuple[int, Answered]]:
        waiting = deque(range(len(self._questions)))
        while waiting or self._scheduler.busy:
            while waiting and self._scheduler.waiting < self._ahead:
                self._begin(waiting.popleft())
            read = advance(self._scheduler)
            for event in [] if read is None else read.events():
                drawn = self._drawn.get(event.ticket)
                if drawn is None or not drawn.add(event):
                    continue
                if event.finished is None:
                    self._scheduler.cancel(event.ticket)
                del self._drawn[event.ticket]
                answered = self._finish(drawn)
                if answered is not None:
                    yield drawn.index, answered

    def _begin(self, index: int) -> None:
        question = self._questions[index]
        if not question.max_trace_tokens:
            self._answer(index, question.prompt_tokens, None)
            return
        limit, sampling = question.max_trace_tokens, question.trace_sampling
        request = Request(question.prompt_tokens, _OF_TRACE, 1, limit, sampling)
        self._submit(request, _Drawn(index, None, None))

    def _answer(self, index: int, before: np.ndarray, trace: Trace | None) -> None:
        question = self._questions[index]
        prompt = np.concatenate([before, question.prefix_tokens]).astype(np.int32)
        sampling = question.answer_sampling._replace(obeys_bans=False)
        request = Request(prompt, _OF_ANSWER, 1, question.max_answer_tokens, sampling)
        text = Detokenizer(self._tokenizer, prompt)
        self._submit(request, _Drawn(index, trace, text, question.until))

    def _submit(self, request: Request, drawn: _Drawn) -> None:
        key = request_key(self._questions[drawn.index].seed)
        self._drawn[self._scheduler.submit(request, key)] = drawn

    def _finish(self, drawn: _Drawn) -> Answered | None:
        """What came of the question; None where its answer is still to be drawn."""
        ended = drawn.as_trace()
        if drawn.detokenizer is not None:
            return Answered(drawn.trace, True, ended, drawn.text, drawn.end)
        question, end = self._questions[drawn.index], self._tokenizer.think_end_id
        closed = ended.end_token == end
        if not closed or not question.max_answer_tokens:
            return Answered(ended, closed, None, "", None)
        self._answer(drawn.index, closed_prompt(question.prompt_tokens, ended, end), ended)
        return None
