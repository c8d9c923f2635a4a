"""A trained run put to use: answer prompts, export the model."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from nrt_jax.data.pipeline import tokenize_prompt
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.exact_match import end_name
from nrt_jax.models import huggingface
from nrt_jax.models.sharding import make_mesh
from nrt_jax.models.token_rows import copy_token_rows
from nrt_jax.training import run_dir
from nrt_jax.training.checkpoint import Checkpoints
from nrt_jax.training.config import RunConfig
from nrt_jax.training.engines import answerer
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.state import (
    Model,
    abstract_decoder,
    init_params,
    init_state,
    read_architecture,
    state_shardings,
)

_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t", r"\\": "\\"}


@dataclass(frozen=True)
class Trained:
    """A run's model at one checkpoint."""

    config: RunConfig
    tokenizer: Tokenizer
    model: Model
    params: Any


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
    mesh = make_mesh(config.mesh)
    tokenizer = Tokenizer.load(
        config.data.tokenizer, config.data.think_start, config.data.think_end
    )
    architecture = read_architecture(config.model)
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    params = init_params(config.model, architecture, mesh, config.seed)
    target = init_state(optimizer, params, state_shardings(optimizer, params, mesh))
    if step is None:
        restored = checkpoints.restore_newest(target)
        assert restored is not None
    else:
        restored = checkpoints.restore(step, target)
    checkpoints.close()
    definition, _ = nnx.split(abstract_decoder(config.model, architecture))
    model = Model(definition, architecture, mesh)
    return Trained(config, tokenizer, model, restored.state.params)


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


def export(path: Path, out: Path, *, dtype: huggingface.StoredDtype, copy_rows: list[str]) -> None:
    """Write a run's model and tokenizer as a Hugging Face directory.

    `copy_rows` holds TOKEN=FROM, each token a vocabulary entry (escapes such as \\n are read).
    """
    trained = load_trained(path)
    params = jax.device_get(trained.params)
    rows = dict(_row_pair(trained.tokenizer, pair) for pair in copy_rows)
    if rows:
        params = copy_token_rows(params, rows)
    huggingface.write_directory(
        out,
        trained.model.architecture,
        params,
        dtype=dtype,
        bos_token_id=trained.tokenizer.bos_id,
        eos_token_id=trained.tokenizer.eos_id,
        copy_tokenizer=trained.tokenizer.copy_to,
    )


def _row_pair(tokenizer: Tokenizer, pair: str) -> tuple[int, int]:
    target, equals, source = pair.partition("=")
    if not equals:
        raise InputError(f"--copy-row {pair}: must look like TOKEN=FROM")
    return _token_id(tokenizer, target, pair), _token_id(tokenizer, source, pair)


def _token_id(tokenizer: Tokenizer, name: str, pair: str) -> int:
    """The entry of that name, or the one token that spells the text."""
    text = re.sub(r"\\[nrt\\]", lambda escape: _ESCAPES[escape[0]], name)
    token_id = tokenizer.backend.token_to_id(text)
    if token_id is not None:
        return token_id
    ids = tokenizer.encode(text)
    if len(ids) == 1 and ids[0] != tokenizer.unk_id:
        return ids[0]
    raise InputError(
        f"--copy-row {pair}: {name!r} is no token of {tokenizer.directory}; use an entry of its "
        "vocabulary"
    )
