"""Exact match: let the model reason and answer, and compare with the reference answer.

`evaluation.extract` says what of both is compared.

Letters: P prompts, K traces per prompt.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.checkpoints.open import find_model
from nrt_jax.config.run import RunConfig
from nrt_jax.data.bad_rows import shorten
from nrt_jax.data.pipeline import Dataset
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate, generate_and_score
from nrt_jax.engine.make import answer_stop_ids, make_engine, trace_engine
from nrt_jax.engine.programs import Programs
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.evaluation.answer_stream import closed_prompt
from nrt_jax.evaluation.extract import Extract, make_extract
from nrt_jax.objective.rewards import score_rewards
from nrt_jax.types import SuffixLogprobs, TokenizedExample, Trace

ScoreRewards = Callable[
    [Sequence[SuffixLogprobs]], tuple[Float[np.ndarray, "P K"], Float[np.ndarray, " P"]]
]
"""Rewards after each trace and after the empty trace, from the logprobs of the answers."""


@dataclass(frozen=True)
class Answerer:
    """Answers prompts: after a trace where it has a trace engine, directly otherwise."""

    tokenizer: Tokenizer
    trace_engine: Engine | None
    answer_engine: Engine
    max_trace_tokens: int
    max_answer_tokens: int
    trace_temperature: float
    """Of the trace; answers are greedy."""
    decode_steps: int = 16
    """Tokens of each sequence that are decoded per dispatch."""
    extract: Extract = field(default_factory=partial(make_extract, "whole"))
    """What of an answer counts."""
    score_rewards: ScoreRewards | None = None
    """Computes rewards of the reference answers, for an evaluation that measures them."""

    def prompt(self, example: TokenizedExample) -> np.ndarray:
        """What to continue, int32: x t_start where a trace comes first, else x."""
        if self.trace_engine is None:
            return example.prompt_tokens
        return example.trace_prompt(self.tokenizer.think_start_id)

    def answer(
        self, params: Any, prompts: Sequence[np.ndarray], key: jax.Array
    ) -> list[tuple[Trace | None, Trace]]:
        """Trace and answer of each prompt; t_end is appended to every trace, also a cut one.

        A prompt is x t_start where a trace comes first, else x.
        """
        if self.trace_engine is None:
            requests = self._requests(prompts, self.max_answer_tokens, Sampling(0.0))
            answers = self._generate(self.answer_engine, params, requests, key)
            return [(None, answer) for answer in answers]
        trace_key, answer_key = jax.random.split(key)
        requests = self._trace_requests(prompts)
        traces = self._generate(self.trace_engine, params, requests, trace_key)
        return self._answer_after(params, requests, traces, answer_key)

    def answer_and_score(
        self,
        params: Any,
        prompts: Sequence[np.ndarray],
        references: Sequence[np.ndarray],
        key: jax.Array,
    ) -> tuple[list[tuple[Trace | None, Trace]], list[SuffixLogprobs]]:
        """As `answer`, with the logprobs of each reference (eos included) after its trace."""
        assert self.trace_engine is not None, "without a trace there is nothing to score after"
        trace_key, answer_key = jax.random.split(key)
        requests = self._trace_requests(prompts, references)
        groups, scores = generate_and_score(
            self.trace_engine, params, requests, trace_key, steps=self.decode_steps
        )
        traces = [trace for (trace,) in groups]
        return self._answer_after(params, requests, traces, answer_key), scores

    def _answer_after(
        self, params: Any, requests: Sequence[Request], traces: Sequence[Trace], key: jax.Array
    ) -> list[tuple[Trace | None, Trace]]:
        end = self.tokenizer.think_end_id
        closed = [
            closed_prompt(request.prompt_tokens, trace, end)
            for request, trace in zip(requests, traces, strict=True)
        ]
        after = self._requests(closed, self.max_answer_tokens, Sampling(0.0))
        answers = self._generate(self.answer_engine, params, after, key)
        return list(zip(traces, answers, strict=True))

    def _trace_requests(
        self, prompts: Sequence[np.ndarray], references: Sequence[np.ndarray] | None = None
    ) -> list[Request]:
        sampling = Sampling(self.trace_temperature)
        requests = self._requests(prompts, self.max_trace_tokens, sampling)
        if references is None:
            return requests
        end = [self.tokenizer.think_end_id]
        suffixes = [np.concatenate([end, answer]).astype(np.int32) for answer in references]
        return [
            request._replace(suffix_tokens=suffix)
            for request, suffix in zip(requests, suffixes, strict=True)
        ]

    def _requests(
        self, prompts: Sequence[np.ndarray], limit: int, sampling: Sampling
    ) -> list[Request]:
        return [Request(prompt, index, 1, limit, sampling) for index, prompt in enumerate(prompts)]

    def _generate(
        self, engine: Engine, params: Any, requests: Sequence[Request], key: jax.Array
    ) -> list[Trace]:
        groups = generate(engine, params, requests, key, steps=self.decode_steps)
        return [trace for (trace,) in groups]


def make_answerer(
    config: RunConfig, model: Model, tokenizer: Tokenizer, programs: Programs | None = None
) -> Answerer:
    """What evaluation and `nrt-jax generate` answer with: NRT reasons first, SFT does not.

    Its engines, and the others of `programs`, share what is compiled for equal sizes.
    """
    programs = Programs(model.mesh) if programs is None else programs
    traces, reasons = None, config.method == "nrt"
    longest = config.data.max_prompt_tokens
    if reasons:
        longest += config.rollout.max_trace_tokens + 2
        traces = trace_engine(config, model, tokenizer, num_samples=1, programs=programs)
    answer_tokens = config.evaluation.max_answer_tokens
    answer_engine = make_engine(
        config,
        model,
        slots=config.rollout.slots,
        longest_prompt=longest,
        new_tokens=answer_tokens,
        stop_ids=answer_stop_ids(config, tokenizer),
        programs=programs,
    )
    scores = reasons and config.evaluation.score_references
    return Answerer(
        tokenizer=tokenizer,
        trace_engine=traces,
        answer_engine=answer_engine,
        max_trace_tokens=config.rollout.max_trace_tokens,
        max_answer_tokens=answer_tokens,
        trace_temperature=config.evaluation.trace_temperature,
        decode_steps=config.rollout.decode_steps,
        extract=make_extract(config.evaluation.extract),
        score_rewards=partial(score_rewards, objective=config.objective) if scores else None,
    )


def evaluation_answerer(
    config: RunConfig,
    model: Model,
    tokenizer: Tokenizer,
    dataset: Dataset,
    programs: Programs | None = None,
) -> Answerer | None:
    """The answerer of a training's evaluations; None when there is nothing to evaluate.

    Raises InputError when `evaluation.extract` finds an answer in no reference.
    """
    if not config.evaluation.examples or not dataset.eval:
        return None
    answerer = make_answerer(config, model, tokenizer, programs)
    check_references(answerer.extract, dataset.eval)
    return answerer


def check_has_questions(path: Path, overrides: Sequence[str]) -> None:
    """InputError for a path whose model has no data of its own, unless the overrides name some."""
    if find_model(path).kind != "run" and not any(o.startswith("data.source=") for o in overrides):
        raise InputError(
            f"{path}: a directory names no questions; add data.source=jsonl data.path=FILE "
            "data.eval_rows=N, or name a run"
        )


def check_references(extract: Extract, examples: Sequence[TokenizedExample]) -> None:
    """InputError when no example has a reference in which there is an answer."""
    references = [reference for example in examples for reference in _references(example)]
    if not any(map(extract.of_reference, references)):
        raise InputError(
            f"evaluation.extract={extract.name}: finds no answer in any of the {len(references)} "
            f"reference answers, such as {shorten(references[0])}; set another"
        )


class Evaluated(NamedTuple):
    """What an evaluation found."""

    metrics: dict[str, float]
    records: list[dict[str, Any]]
    """One per example, to read."""
    traces: list[Trace | None]
    """One per example; None where the model answers directly."""


def evaluate(
    answerer: Answerer, params: Any, examples: Sequence[TokenizedExample], key: jax.Array
) -> Evaluated:
    """Answer all examples, and compare with their references.

    An answer is right when what `answerer.extract` finds in it is what it finds in the reference,
    or in one of its aliases, and the model ended it with eos: neither an answer that was cut nor a
    trace counts. With `score_rewards`: the mean reward of the reference answer after the
    trace and after the empty trace, and its logprob after the trace in nats per token.
    """
    prompts = [answerer.prompt(example) for example in examples]
    scored = {}
    if answerer.score_rewards is None:
        answered = answerer.answer(params, prompts, key)
    else:
        references = [example.answer_tokens for example in examples]
        answered, scores = answerer.answer_and_score(params, prompts, references, key)
        scored = _reference_metrics(scores, answerer.score_rewards)
    records = [
        _record(answerer, example, trace, answer)
        for example, (trace, answer) in zip(examples, answered, strict=True)
    ]
    metrics = {"eval/exact_match": float(np.mean([record["correct"] for record in records]))}
    if answerer.extract.name != "whole":
        found = [record["extracted"] is not None for record in records]
        metrics["eval/extracted_share"] = float(np.mean(found))
    traces = [trace for trace, _ in answered]
    if sampled := [trace for trace in traces if trace is not None]:
        ended = [trace.end_token == answerer.tokenizer.think_end_id for trace in sampled]
        metrics["eval/trace_tokens"] = float(np.mean([len(trace.tokens) for trace in sampled]))
        metrics["eval/think_end_share"] = float(np.mean(ended))
    return Evaluated(metrics | scored, records, traces)


def _reference_metrics(
    scores: Sequence[SuffixLogprobs], score_rewards: ScoreRewards
) -> dict[str, float]:
    reward_PK, baseline_P = score_rewards(scores)
    log_c_P = [score.samples_KA.mean() for score in scores]
    return {
        "eval/reward": float(np.mean(reward_PK)),
        "eval/baseline": float(np.mean(baseline_P)),
        "eval/reference_logprob": float(np.mean(log_c_P)),
    }


def _record(
    answerer: Answerer, example: TokenizedExample, trace: Trace | None, answer: Trace
) -> dict[str, Any]:
    tokenizer, extract = answerer.tokenizer, answerer.extract
    text = tokenizer.decode(answer.tokens.tolist())
    references = _references(example)
    right = extract.is_right(text, references)
    record = {
        "index": example.example.index,
        "question": example.example.question,
        "trace": None if trace is None else tokenizer.decode(trace.tokens.tolist()),
        "trace_end": None if trace is None else end_name(tokenizer, trace),
        "answer": text,
        "reference": example.example.answer,
        "correct": right and answer.end_token == tokenizer.eos_id,
    }
    if example.example.user_text:
        record["user_text"] = example.example.user_text
    if extract.name == "whole":
        return record
    accepted = [extract.of_reference(reference) for reference in references]
    return record | {"extracted": extract.of_answer(text), "accepted": accepted}


def _references(example: TokenizedExample) -> list[str]:
    return [example.example.answer, *example.example.aliases]


def end_name(tokenizer: Tokenizer, trace: Trace) -> str:
    """The name of the token that ended a sequence, or "length"."""
    return "length" if trace.end_token is None else tokenizer.token(trace.end_token)
