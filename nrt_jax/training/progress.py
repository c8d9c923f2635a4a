"""What the steps of a run change, and how a checkpoint keeps it."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from nrt_jax.checkpoints.saved_groups import pack_groups, unpack_groups
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.data.pipeline import BatchIterator
from nrt_jax.errors import InputError
from nrt_jax.training.packing import Packer
from nrt_jax.types import Group

FORMAT = 3
"""Version of the JSON beside a checkpoint's arrays, raised when older ones cannot be continued."""


class Prefetched(NamedTuple):
    """The groups of the next step, sampled during this one."""

    data_position: dict[str, Any]
    """Position of the data before the groups' examples were taken."""
    groups: list[Group]


@dataclass
class Progress:
    """What the steps of a run change."""

    state: TrainState
    step: int = 0
    """Steps that are finished."""
    prefetched: Prefetched | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Of the evaluation after the last finished step; empty when there was none."""


def save_progress(
    checkpoints: Checkpoints, progress: Progress, batches: BatchIterator, packer: Packer
) -> None:
    """Save a checkpoint of the last finished step, unless there is one."""
    saved = {
        "format": FORMAT,
        "step": progress.step,
        "data": batches.get_state(),
        "packing": packer.get_state(),
    }
    if progress.prefetched is not None:
        # On restoring, the same examples are taken again.
        saved["data"] = progress.prefetched.data_position
        saved["groups"] = pack_groups(progress.prefetched.groups)
    checkpoints.save(progress.step, progress.state, saved, progress.metrics)


def restore_progress(
    checkpoints: Checkpoints, target: TrainState, batches: BatchIterator, packer: Packer
) -> Progress | None:
    """Restore the newest checkpoint, data and packer included; None when there is no checkpoint.

    Raises InputError when it cannot be continued: see `Checkpoints.restore_newest`, other data, or
    another version of this program.
    """
    restored = checkpoints.restore_newest(target)
    if restored is None:
        return None
    saved, prefetched = restored.progress, None
    if saved.get("format") != FORMAT:
        raise InputError(
            f"{checkpoints.path(restored.step)}: another version of nrt-jax saved it (format "
            f"{saved.get('format')}, this version reads {FORMAT}); continue the run with that "
            "version, or choose another run_dir"
        )
    batches.set_state(saved["data"])
    packer.set_state(saved["packing"])
    if "groups" in saved:
        prefetched = Prefetched(saved["data"], unpack_groups(saved["groups"], next(batches)))
    checkpoints.remove_after(restored.step)
    return Progress(state=restored.state, step=restored.step, prefetched=prefetched)
