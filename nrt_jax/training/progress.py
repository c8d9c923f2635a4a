"""What the steps of a run change, and how a checkpoint keeps it."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.checkpoints.inputs import OF_EXAMPLES, RunInputs
from nrt_jax.checkpoints.saved_groups import pack_groups, unpack_groups
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.data.batches import BatchIterator
from nrt_jax.errors import InputError
from nrt_jax.training.packing import Packer
from nrt_jax.types import Group

log = logging.getLogger(__name__)

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
    inputs: RunInputs
    """What the run reads; a checkpoint keeps it."""
    step: int = 0
    """Steps that are finished; below 0 in the warm-up, whose last update is step 0."""
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
        **progress.inputs.to_json(),
    }
    if progress.prefetched is not None:
        # On restoring, the same examples are taken again.
        saved["data"] = progress.prefetched.data_position
        saved["groups"] = pack_groups(progress.prefetched.groups)
    checkpoints.save(progress.step, progress.state, saved, progress.metrics)


def restore_progress(
    checkpoints: Checkpoints,
    target: TrainState,
    batches: BatchIterator,
    packer: Packer,
    inputs: RunInputs,
    allow_changed: Collection[str] = (),
) -> Progress | None:
    """Restore the newest checkpoint, data and packer included; None when there is no checkpoint.

    Raises InputError when it cannot be continued: see `Checkpoints.restore_newest`, other inputs
    than those of `allow_changed`, or another version of this program.
    """
    restored = checkpoints.restore_newest(target)
    if restored is None:
        return None
    saved, prefetched, path = restored.progress, None, checkpoints.path(restored.step)
    check_format(saved, path)
    inputs, changed = inputs.continued(
        RunInputs.from_json(saved), allow_changed, run=path.parent.parent, step=restored.step
    )
    other_examples = not OF_EXAMPLES.isdisjoint(changed)
    _go_to(batches, saved["data"], other_rows_allowed=other_examples)
    packer.set_state(saved["packing"])
    # Groups that wait hold traces of the examples that were; the next step samples its own.
    if "groups" in saved and not other_examples:
        prefetched = Prefetched(saved["data"], unpack_groups(saved["groups"], next(batches)))
    checkpoints.remove_after(restored.step)
    return Progress(restored.state, inputs, step=restored.step, prefetched=prefetched)


def check_format(saved: dict[str, Any], path: Path) -> None:
    """InputError for a checkpoint that another version of this program saved."""
    if saved.get("format") != FORMAT:
        raise InputError(
            f"{path}: another version of nrt-jax saved it (format "
            f"{saved.get('format')}, this version reads {FORMAT}); continue the run with that "
            "version, or choose another run_dir"
        )


def _go_to(batches: BatchIterator, position: dict[str, Any], *, other_rows_allowed: bool) -> None:
    """Go to a saved position of the data, or to the start of data with another number of rows."""
    before, now = position.get("rows"), batches.get_state()["rows"]
    if other_rows_allowed and before != now:
        log.warning("data: %s training rows, before %s: starting at the first", now, before)
        return
    batches.set_state(position)
