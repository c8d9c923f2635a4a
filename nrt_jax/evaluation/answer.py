"""A trained run put to use: open one of its checkpoints, answer prompts."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from nrt_jax.checkpoints.open import Trained, load_trained
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.pipeline import tokenize_prompt
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.held_out import answerer, end_name
from nrt_jax.objective.rewards import score_rewards
from nrt_jax.types import Example, SuffixLogprobs


def answer_prompts(
    path: Path,
    prompts: Sequence[str],
    temperature: float,
    seed: int,
    references: Sequence[str] | None = None,
) -> Iterator[str]:
    """For each prompt, its trace (where the run reasons) and its answer, as printable text.

    With reference answers, one a prompt, also how sure the trace makes the model of it. Raises
    InputError for a prompt or an answer that would be a bad row, and for answers without a trace.
    """
    trained = load_trained(path)
    if references is not None:
        _check_references(trained, path, prompts, references)
    tokens = [_prompt_tokens(trained, prompt) for prompt in prompts]
    model = answerer(_here(trained, temperature), trained.model, trained.tokenizer)
    key, scored = jax.random.key(seed), [None] * len(prompts)
    if references is None:
        answered = model.answer(trained.params, tokens, key)
    else:
        answers = _answer_tokens(trained, prompts, references)
        answered, scores = model.answer_and_score(trained.params, tokens, answers, key)
        scored = _score_lines(scores, trained.config.objective)
    for prompt, (trace, answer), score in zip(prompts, answered, scored, strict=True):
        lines = [f"prompt  {prompt}"]
        if trace is not None:
            text = trained.tokenizer.decode(trace.tokens.tolist())
            end = end_name(trained.tokenizer, trace)
            lines.append(f"trace   {text}   [{len(trace.tokens)} tokens, ended by {end}]")
        lines.append(f"answer  {trained.tokenizer.decode(answer.tokens.tolist())}")
        yield "\n".join(lines if score is None else [*lines, score])


def _here(trained: Trained, temperature: float) -> RunConfig:
    """The config for the weights as they were read, whatever machine the run sampled on."""
    config = trained.config
    rollout = config.rollout.model_copy(
        update={
            "slots": trained.model.mesh.size,
            "mesh": None,
            "devices": None,
            "dtype": None,
            "cache_dtype": None,
        }
    )
    evaluation = config.evaluation.model_copy(update={"trace_temperature": temperature})
    return config.model_copy(update={"rollout": rollout, "evaluation": evaluation})


def _check_references(
    trained: Trained, path: Path, prompts: Sequence[str], references: Sequence[str]
) -> None:
    if trained.config.method != "nrt":
        raise InputError(
            f"--score: {path} was trained by {trained.config.method}, which answers without a "
            "trace; name a run of method nrt, or leave it out"
        )
    if len(references) != len(prompts):
        raise InputError(
            f"--score: {len(references)} answers for {len(prompts)} prompts; give one for each "
            "--prompt, in the same order, or none"
        )


def _score_lines(scores: Sequence[SuffixLogprobs], objective: ObjectiveConfig) -> list[str]:
    reward_PK, baseline_P = score_rewards(scores, objective)
    return [
        f"score   R {reward_K[0]:.4g}, after no trace {baseline:.4g}; "
        f"log c {score.samples_KA.mean():.4g} nats a token"
        for reward_K, baseline, score in zip(reward_PK, baseline_P, scores, strict=True)
    ]


def _prompt_tokens(trained: Trained, prompt: str) -> np.ndarray:
    try:
        return tokenize_prompt(prompt, trained.config.data, trained.tokenizer)
    except InputError as error:
        raise InputError(f"--prompt: {error}") from None


def _answer_tokens(
    trained: Trained, prompts: Sequence[str], references: Sequence[str]
) -> list[np.ndarray]:
    """y* of each prompt as a row's: eos is its last token."""
    rows, answers = RowTokenizer(trained.config.data, trained.tokenizer), []
    for prompt, reference in zip(prompts, references, strict=True):
        row = rows.of_example(Example(0, prompt, reference))
        if isinstance(row, BadRow):
            raise InputError(f"--score: {row.detail}")
        answers.append(row.answer_tokens)
    return answers
