"""Exact match: let the model reason and answer, and compare with the reference answer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.records import TokenizedExample, Trace
from nrt_jax.rollout.engine import DecoderEngine
from nrt_jax.rollout.generate import generate
from nrt_jax.rollout.sampler import Sampling
from nrt_jax.rollout.scheduler import Request


@dataclass(frozen=True)
class Answerer:
    """A model that answers: with a trace first when it has a trace engine, directly otherwise."""

    tokenizer: Tokenizer
    trace_engine: DecoderEngine | None
    answer_engine: DecoderEngine
    max_trace_tokens: int
    max_answer_tokens: int
    trace_temperature: float
    """Of the trace; the answer is always the most probable one."""

    def answer(
        self, params: Any, prompts: Sequence[np.ndarray], key: jax.Array
    ) -> list[tuple[Trace | None, Trace]]:
        """Trace and answer of every prompt; t_end is appended to whatever trace there is."""
        if self.trace_engine is None:
            answers = self._generate(self.answer_engine, params, prompts, key)
            return [(None, answer) for answer in answers]
        start, end = self.tokenizer.think_start_id, self.tokenizer.think_end_id
        opened = [np.append(prompt, start).astype(np.int32) for prompt in prompts]
        trace_key, answer_key = jax.random.split(key)
        traces = self._generate(self.trace_engine, params, opened, trace_key)
        closed = [
            np.concatenate([prompt, trace.tokens, [end]]).astype(np.int32)
            for prompt, trace in zip(opened, traces, strict=True)
        ]
        answers = self._generate(self.answer_engine, params, closed, answer_key)
        return list(zip(traces, answers, strict=True))

    def _generate(
        self, engine: DecoderEngine, params: Any, prompts: Sequence[np.ndarray], key: jax.Array
    ) -> list[Trace]:
        traces_it = engine is self.trace_engine
        limit = self.max_trace_tokens if traces_it else self.max_answer_tokens
        sampling = Sampling(temperature=self.trace_temperature if traces_it else 0.0)
        requests = [
            Request(prompt, index, 1, limit, sampling) for index, prompt in enumerate(prompts)
        ]
        return [trace for (trace,) in generate(engine, params, requests, key)]


def evaluate(
    answerer: Answerer,
    params: Any,
    examples: Sequence[TokenizedExample],
    key: jax.Array,
    *,
    samples: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """Metrics over all examples, and the first `samples` of them as readable records.

    An answer is right when its text equals the reference after both are stripped of white space
    and the model ended it with eos.
    """
    answered = answerer.answer(params, [e.prompt_tokens for e in examples], key)
    records = [
        _record(answerer.tokenizer, example, trace, answer)
        for example, (trace, answer) in zip(examples, answered, strict=True)
    ]
    metrics = {"eval/exact_match": float(np.mean([record["correct"] for record in records]))}
    traces = [trace for trace, _ in answered if trace is not None]
    if traces:
        ended = [trace.end_token == answerer.tokenizer.think_end_id for trace in traces]
        metrics["eval/trace_tokens"] = float(np.mean([len(trace.tokens) for trace in traces]))
        metrics["eval/think_end_share"] = float(np.mean(ended))
    return metrics, records[:samples]


def _record(
    tokenizer: Tokenizer, example: TokenizedExample, trace: Trace | None, answer: Trace
) -> dict[str, Any]:
    text = tokenizer.decode(answer.tokens.tolist())
    right = text.strip() == example.example.answer.strip()
    return {
        "index": example.example.index,
        "question": example.example.question,
        "trace": None if trace is None else tokenizer.decode(trace.tokens.tolist()),
        "trace_end": None if trace is None else end_name(tokenizer, trace),
        "answer": text,
        "reference": example.example.answer,
        "correct": right and answer.end_token == tokenizer.eos_id,
    }


def end_name(tokenizer: Tokenizer, trace: Trace) -> str:
    """What ended a sequence: the special token's name, or "length"."""
    return "length" if trace.end_token is None else tokenizer.token(trace.end_token)
