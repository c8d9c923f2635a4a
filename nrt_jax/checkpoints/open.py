"""A trained run as one model: open its newest checkpoint, or the one that is named."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nrt_jax.checkpoints import run_dir
from nrt_jax.checkpoints.run_model import Model, load_tokenizer, open_model
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.models.sharding import spread_mesh


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
