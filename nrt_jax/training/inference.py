"""A trained run put to use: open one of its checkpoints, answer prompts."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from nrt_jax.data.pipeline import tokenize_prompt
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.exact_match import end_name
from nrt_jax.models.sharding import spread_mesh
from nrt_jax.training import run_dir
from nrt_jax.training.checkpoint import Checkpoints
from nrt_jax.training.config import RunConfig
from nrt_jax.training.engines import answerer
from nrt_jax.training.model import Model, load_tokenizer, open_model


@dataclass(frozen=True)
class Trained:
    """A run's model at one checkpoint."""

    config: RunConfig
    tokenizer: Tokenizer
    model: Model
    params: Any
    step: int


def load_trained(path: Path) -> Trained:
    """Open `RUN` (its newest checkpoint that can be read) or `RUN/checkpoints/STEP`.

    Reads only, so the run may still be training. Raises InputError when there is no such run or
    checkpoint.
    """
    directory, step = _run_and_step(path)
    config = run_dir.load_run(directory)
    checkpoints = Checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint, writable=False)
    if not checkpoints.steps:
        raise InputError(f"{directory}: has no checkpoint yet; train it first")
    if step is not None and step not in checkpoints.steps:
        raise InputError(f"{path}: no such checkpoint; there are {checkpoints.steps}")
    tokenizer = load_tokenizer(config)
    model = open_model(config, tokenizer, spread_mesh)
    target = {"params": model.target}
    if step is None:
        restored = checkpoints.restore_newest(target)
        assert restored is not None
    else:
        restored = checkpoints.restore(step, target)
    checkpoints.close()
    return Trained(config, tokenizer, model, restored.state["params"], restored.step)


def _run_and_step(path: Path) -> tuple[Path, int | None]:
    if path.parent.name == run_dir.CHECKPOINTS and path.name.isdigit():
        return path.parent.parent, int(path.name)
    return path, None


def answer_prompts(
    path: Path, prompts: Sequence[str], temperature: float, seed: int
) -> Iterator[str]:
    """For each prompt, its trace (where the run reasons) and its answer, as printable text."""
    trained = load_trained(path)
    config = trained.config.model_copy(
        update={
            "evaluation": trained.config.evaluation.model_copy(
                update={"trace_temperature": temperature}
            ),
            "rollout": trained.config.rollout.model_copy(update={"slots": trained.model.mesh.size}),
        }
    )
    tokens = [_prompt_tokens(trained, prompt) for prompt in prompts]
    answered = answerer(config, trained.model, trained.tokenizer).answer(
        trained.params, tokens, jax.random.key(seed)
    )
    for prompt, (trace, answer) in zip(prompts, answered, strict=True):
        lines = [f"prompt  {prompt}"]
        if trace is not None:
            text = trained.tokenizer.decode(trace.tokens.tolist())
            end = end_name(trained.tokenizer, trace)
            lines.append(f"trace   {text}   [{len(trace.tokens)} tokens, ended by {end}]")
        lines.append(f"answer  {trained.tokenizer.decode(answer.tokens.tolist())}")
        yield "\n".join(lines)


def _prompt_tokens(trained: Trained, prompt: str) -> np.ndarray:
    try:
        return tokenize_prompt(prompt, trained.config.data, trained.tokenizer)
    except InputError as error:
        raise InputError(f"--prompt: {error}") from None
