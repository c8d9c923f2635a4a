"""Checkpoints: saved in the background, kept by age and by merit, restored past damage."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from nrt_jax.errors import InputError
from nrt_jax.training.config import CheckpointConfig
from nrt_jax.training.state import TrainState

log = logging.getLogger(__name__)


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    state: TrainState
    progress: dict[str, Any]


class _KeepLatestAndBest(checkpoint_managers.PreservationPolicy):
    """Keep the newest `keep_last`, and the best by `best_metric` among those that have it."""

    def __init__(self, config: CheckpointConfig):
        self._config = config

    def should_preserve(
        self,
        checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        last = len(checkpoints) - self._config.keep_last
        keep = [index >= last for index in range(len(checkpoints))]
        name = self._config.best_metric
        sign = 1 if self._config.best_mode == "max" else -1
        scores = [
            (sign * info.metrics[name], index)
            for index, info in enumerate(checkpoints)
            if name is not None and info.metrics and name in info.metrics
        ]
        if scores:
            keep[max(scores)[1]] = True
        return keep


class Checkpoints:
    """The checkpoints of one run: `state` (arrays) and `progress` (JSON) under one step number."""

    def __init__(self, directory: Path, config: CheckpointConfig):
        options = ocp.CheckpointManagerOptions(
            preservation_policy=_KeepLatestAndBest(config), enable_async_checkpointing=True
        )
        self._manager = ocp.CheckpointManager(
            directory.absolute(),
            options=options,
            item_names=("state", "progress"),
        )

    def save(
        self, step: int, state: TrainState, progress: dict[str, Any], metrics: dict[str, float]
    ) -> None:
        """Copy the state and write it in the background; a step that exists is left alone.

        An error of the write before surfaces here.
        """
        if step in self._manager.all_steps():
            return
        self._manager.save(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardSave(state), progress=ocp.args.JsonSave(progress)
            ),
            metrics=metrics,
        )

    def restore_newest(self, target: TrainState) -> Restored | None:
        """The newest readable checkpoint, in the shapes and shardings of `target`.

        An unreadable one is named in a warning, removed, and the one before is tried. None when
        there is no checkpoint; InputError when there are some and none can be read, or when the
        shapes are those of another model.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        reasons: list[str] = []
        for step in steps:
            try:
                restored = self.restore(step, target)
            except InputError:
                raise
            except Exception as error:  # whatever damage does to a reader
                reason = " ".join(str(error).split())[:200]
                log.warning("checkpoint %d cannot be read, trying the one before: %s", step, reason)
                reasons.append(f"{step}: {reason}")
                continue
            for damaged in steps[: steps.index(step)]:
                self._manager.delete(damaged)
            return restored
        if reasons:
            raise InputError(
                f"{self._manager.directory}: no checkpoint can be read ({reasons[0]}); "
                "restore the directory from a copy, or start again with another run_dir"
            )
        return None

    def restore(self, step: int, target: TrainState) -> Restored:
        """One checkpoint; InputError when it is of another model shape."""
        self._check_shapes(step, target)
        items = self._manager.restore(
            step,
            args=ocp.args.Composite(
                state=ocp.args.StandardRestore(jax.tree.map(_abstract, target)),
                progress=ocp.args.JsonRestore(),
            ),
        )
        return Restored(step, TrainState(*items["state"]), items["progress"])

    def _check_shapes(self, step: int, target: TrainState) -> None:
        saved = self._manager.item_metadata(step)["state"].tree
        saved_params = _shapes(saved["params"] if isinstance(saved, dict) else saved[0])
        for name, shape in _shapes(target.params).items():
            if saved_params.get(name) != shape:
                raise InputError(
                    f"{self._manager.directory}/{step}: {name} has shape "
                    f"{saved_params.get(name)}, the config's model has {shape}; "
                    "use the model config of that run, or another run_dir"
                )

    @property
    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def close(self) -> None:
        """Wait for the writes under way, and raise what went wrong in them."""
        self._manager.wait_until_finished()
        self._manager.close()


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    leaves = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda x: hasattr(x, "shape"))
    return {jax.tree_util.keystr(path): tuple(leaf.shape) for path, leaf in leaves}
