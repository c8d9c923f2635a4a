"""Checkpoints of a run in its warm-up; they are removed when that of step 0 is written."""

import shutil
from collections.abc import Collection

from nrt_jax import distributed
from nrt_jax.checkpoints import run_dir
from nrt_jax.checkpoints.inputs import RunInputs
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.config.run import RunConfig
from nrt_jax.training.progress import FORMAT, Progress, check_format


def open_warmup_checkpoints(config: RunConfig) -> Checkpoints:
    """The checkpoints of the warm-up, numbered by its updates."""
    return Checkpoints(
        config.run_dir / run_dir.WARMUP_CHECKPOINTS, config.checkpoint, writable=True
    )


def save_warmup(checkpoints: Checkpoints, progress: Progress, total: int) -> None:
    """Save the state after the last finished of `total` updates, unless there is none.

    The rows of all updates follow from the file of texts and the first rows of the data, so that
    no position of the data is saved.
    """
    if progress.step > -total:
        saved = {"format": FORMAT, **progress.inputs.to_json()}
        checkpoints.save(total + progress.step, progress.state, saved, {})


def restore_warmup(
    config: RunConfig, target: TrainState, inputs: RunInputs, allow_changed: Collection[str]
) -> Progress | None:
    """The newest checkpoint of the warm-up; None when there is none.

    Raises InputError as `restore_progress` does.
    """
    exists = (config.run_dir / run_dir.WARMUP_CHECKPOINTS).is_dir()
    if not distributed.from_first("a checkpoint of the warm-up", exists):
        return None
    checkpoints = open_warmup_checkpoints(config)
    restored = checkpoints.restore_newest(target)
    if restored is not None:
        checkpoints.remove_after(restored.step)
    checkpoints.close()
    if restored is None:
        return None
    check_format(restored.progress, checkpoints.path(restored.step))
    step, before = restored.step - config.warmup.updates, RunInputs.from_json(restored.progress)
    inputs, _ = inputs.continued(before, allow_changed, run=config.run_dir, step=step)
    return Progress(restored.state, inputs, step=step)


def remove_warmup_checkpoints(config: RunConfig) -> None:
    """Remove them, once step 0 is saved; a killed process may have left them."""
    directory = config.run_dir / run_dir.WARMUP_CHECKPOINTS
    if distributed.is_first() and directory.is_dir():
        shutil.rmtree(directory)
