"""Answer prompts with any model that opens: `nrt-jax generate`."""

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np

from nrt_jax.checkpoints.abstract_model import answering_mesh
from nrt_jax.checkpoints.open import OpenModel, open_model
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.detokenizer import decode_after
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.held_out import end_name, make_answerer
from nrt_jax.objective.rewards import score_rewards
from nrt_jax.types import Example, SuffixLogprobs


def answer_prompts(
    path: Path,
    prompts: Sequence[str],
    *,
    temperature: float = 0.0,
    seed: int = 0,
    references: Sequence[str] | None = None,
    overrides: Sequence[str] = (),
) -> Iterator[str]:
    """For each prompt its trace (where the model reasons) and its answer, as printable text.

    With one reference answer per prompt, also its reward and logprob after the trace. Raises
    InputError for a prompt or an answer that would be a bad row, and for references without traces.
    """
    mesh_of = partial(answering_mesh, slots=jax.device_count())
    opened = open_model(path, overrides, mesh_of=mesh_of)
    if references is not None:
        _check_references(opened, path, prompts, references)
    rows = RowTokenizer(opened.config.data, opened.tokenizer)
    tokens = [_prompt_tokens(rows, prompt, opened=opened.reasons) for prompt in prompts]
    answerer = make_answerer(_engine_config(opened, temperature), opened.model, opened.tokenizer)
    key, scored = jax.random.key(seed), [None] * len(prompts)
    if references is None:
        answered = answerer.answer(opened.params, tokens, key)
    else:
        answers = _answer_tokens(rows, prompts, references)
        answered, scores = answerer.answer_and_score(opened.params, tokens, answers, key)
        scored = _score_lines(scores, opened.config.objective)
    tokenizer, written = opened.tokenizer, zip(prompts, tokens, answered, scored, strict=True)
    for prompt, before, (trace, answer), score in written:
        lines = [f"prompt  {prompt}"]
        if trace is not None:
            text, end = decode_after(tokenizer, before, trace.tokens), end_name(tokenizer, trace)
            lines.append(f"trace   {text}   [{len(trace.tokens)} tokens, ended by {end}]")
            before = np.concatenate([before, trace.tokens, [tokenizer.think_end_id]])
        lines.append(f"answer  {decode_after(tokenizer, before, answer.tokens)}")
        yield "\n".join(lines if score is None else [*lines, score])


def _engine_config(opened: OpenModel, temperature: float) -> RunConfig:
    """The config for weights as they were read, independent of the devices of the rollouts."""
    config = opened.config
    rollout = config.rollout.model_copy(
        update={"slots": opened.model.mesh.size, "dtype": None, "cache_dtype": None}
    )
    evaluation = config.evaluation.model_copy(update={"trace_temperature": temperature})
    return config.model_copy(update={"rollout": rollout, "evaluation": evaluation})


def _check_references(
    opened: OpenModel, path: Path, prompts: Sequence[str], references: Sequence[str]
) -> None:
    if not opened.reasons:
        raise InputError(
            f"--score: {path} answers without a trace (method {opened.config.method}); name a "
            "model of method nrt, or leave it out"
        )
    if len(references) != len(prompts):
        raise InputError(
            f"--score: {len(references)} answers for {len(prompts)} prompts; give one for each "
            "--prompt, in the same order, or none"
        )


def _score_lines(scores: Sequence[SuffixLogprobs], objective: ObjectiveConfig) -> list[str]:
    reward_PK, baseline_P = score_rewards(scores, objective)
    return [
        f"score   R {reward_K[0]:.4g}, after the empty trace {baseline:.4g}; "
        f"log c {score.samples_KA.mean():.4g} nats per token"
        for reward_K, baseline, score in zip(reward_PK, baseline_P, scores, strict=True)
    ]


def _prompt_tokens(rows: RowTokenizer, prompt: str, *, opened: bool) -> np.ndarray:
    try:
        return rows.of_question(prompt, opened=opened)
    except BadRow as bad:
        raise InputError(f"--prompt: {bad.detail}") from None


def _answer_tokens(
    rows: RowTokenizer, prompts: Sequence[str], references: Sequence[str]
) -> list[np.ndarray]:
    """y* of each prompt as in a row: its last token is eos."""
    answers = []
    for prompt, reference in zip(prompts, references, strict=True):
        row = rows.of_example(Example(0, prompt, reference))
        if isinstance(row, BadRow):
            raise InputError(f"--score: {row.detail}")
        answers.append(row.answer_tokens)
    return answers
