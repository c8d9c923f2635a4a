"""Checkpoints: saved in the background, kept by age and by metric, restored despite damage."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import jax
import orbax.checkpoint as ocp
from orbax.checkpoint import checkpoint_managers

from nrt_jax import distributed
from nrt_jax.checkpoints.fingerprint import by_path, fingerprints
from nrt_jax.checkpoints.orbax_noise import silence_abandoned_io, without_messages
from nrt_jax.checkpoints.saved_groups import read_arrays
from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.config.checkpoint import CheckpointConfig
from nrt_jax.errors import InputError, RunFailed

log = logging.getLogger(__name__)

MetricByStep = dict[int, float]
"""The value of best_metric by step, for the checkpoints that have one."""


class Restored(NamedTuple):
    """A checkpoint read back."""

    step: int
    state: Any
    """A TrainState, or the part of one that was asked for."""
    progress: dict[str, Any]


class _Damaged(Exception):
    """A checkpoint that cannot be read, or whose bits differ from those that were saved."""


@contextmanager
def _damage() -> Iterator[None]:
    """Turn whatever a reader raises for a damaged file into _Damaged, without Orbax's messages."""
    with without_messages():
        try:
            yield
        except Exception as error:
            raise _Damaged(_one_line(error)) from error


class _KeepBest(checkpoint_managers.PreservationPolicy):
    """Keep the best by `best_metric` among the checkpoints that have it.

    Orbax's BestN forgets at a restart the metrics of earlier checkpoints, unless the manager reads
    all of them when it is opened; it then fails where one is damaged.
    """

    def __init__(self, mode: str, metric_by_step: MetricByStep):
        self._sign = 1 if mode == "max" else -1
        self._metric_by_step = metric_by_step

    def should_preserve(
        self,
        checkpoints: Sequence[Any],
        *,
        context: checkpoint_managers.PreservationContext,
    ) -> list[bool]:
        metrics = self._metric_by_step
        steps = [info.step for info in checkpoints]
        # Of equal ones the newest.
        best = max(
            (step for step in steps if step in metrics),
            key=lambda step: (self._sign * metrics[step], step),
            default=None,
        )
        return [step == best for step in steps]


class Checkpoints:
    """The checkpoints of one run: `state` (arrays) and `progress` (JSON) under one step number.

    With `writable` the half-written checkpoints of a killed process are removed; without it nothing
    in the directory changes, so that a run can be read while it trains.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, *, writable: bool):
        silence_abandoned_io()
        self._best_metric = config.best_metric
        self._metric_by_step: MetricByStep = {}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                [
                    checkpoint_managers.LatestN(config.keep_last),
                    _KeepBest(config.best_mode, self._metric_by_step),
                ]
            ),
            create=writable,
            cleanup_tmp_directories=writable,
            # Otherwise the manager reads files of every checkpoint, and fails where one is damaged.
            lightweight_initialize=True,
        )
        handlers = {
            "state": ocp.PyTreeCheckpointHandler(),
            "progress": ocp.JsonCheckpointHandler(),
        }
        self._manager = ocp.CheckpointManager(
            directory.absolute(), options=options, item_handlers=handlers
        )
        for step in self.steps if writable and config.best_metric else ():
            self._note_metric(step, self._saved_metrics(step))

    @property
    def steps(self) -> list[int]:
        """Steps that have a complete checkpoint, oldest first."""
        return sorted(self._manager.all_steps())

    def path(self, step: int) -> Path:
        """The directory of a checkpoint."""
        return Path(self._manager.directory) / str(step)

    def save(
        self, step: int, state: TrainState, progress: dict[str, Any], metrics: Mapping[str, float]
    ) -> None:
        """Copy the state and write it in the background; a step that exists is left alone.

        `metrics` were measured with exactly these weights. Older checkpoints are removed when this
        one is complete. Raises RunFailed when this save or the one before it cannot be written.
        """
        if step in self.steps:
            return
        self._note_metric(step, metrics)
        progress = progress | {"metrics": dict(metrics), "fingerprints": fingerprints(state)}
        items = ocp.args.Composite(
            state=ocp.args.PyTreeSave(state), progress=ocp.args.JsonSave(progress)
        )
        try:
            self._manager.save(step, args=items)
        except Exception as error:
            raise self._failure(error) from error

    def restore_newest(self, target: Any) -> Restored | None:
        """The newest readable checkpoint, in the shapes and shardings of `target`.

        `target` is a TrainState, or a dict with some of its fields; then only these are read. A
        warning names each damaged checkpoint, and the one before it is tried. Returns None when
        there is no checkpoint. Raises InputError when none of them can be read, when the newest
        readable one is of another model, and for the first damaged one in several processes.
        """
        reasons: dict[int, str] = {}
        for step in reversed(distributed.from_first("the checkpoints", self.steps)):
            try:
                restored = self._restore(step, target)
            except _Damaged as damage:
                if distributed.process_count() > 1:
                    # The others may have read it, and wait for this process.
                    raise self._remove(step, damage) from damage
                reasons[step] = str(damage)
                continue
            for damaged, reason in reasons.items():
                log.warning("checkpoint %d cannot be read, using %d: %s", damaged, step, reason)
            return restored
        if reasons:
            newest = max(reasons)
            raise InputError(
                f"{self._manager.directory}: none of the checkpoints {sorted(reasons)} can be read "
                f"({newest}: {reasons[newest]}); restore one from a copy, or choose another run_dir"
            )
        return None

    def restore(self, step: int, target: Any) -> Restored:
        """Restore one checkpoint like `restore_newest`; InputError when it cannot be read."""
        try:
            return self._restore(step, target)
        except _Damaged as damage:
            raise InputError(
                f"{self.path(step)}: cannot be read ({damage}); "
                f"use another of the checkpoints {self.steps}"
            ) from damage

    def _remove(self, step: int, damage: _Damaged) -> InputError:
        return InputError(
            f"{self.path(step)}: process {distributed.process_index()} cannot read it ({damage}); "
            "move it away, and the same command goes on from the checkpoint before it"
        )

    def remove_after(self, step: int) -> None:
        """Remove the checkpoints of later steps: they are damaged, and will be written again."""
        for later in [later for later in self.steps if later > step]:
            self._manager.delete(later)
            self._metric_by_step.pop(later, None)

    def wait(self) -> None:
        """Wait until what was saved is written; RunFailed when it cannot be."""
        try:
            self._manager.wait_until_finished()
        except Exception as error:
            raise self._failure(error) from error

    def close(self) -> None:
        """Wait for writes in progress; RunFailed when one of them failed."""
        try:
            self._manager.close()
        except Exception as error:
            raise self._failure(error) from error

    def _restore(self, step: int, target: Any) -> Restored:
        state = ocp.args.PyTreeRestore(
            jax.tree.map(_abstract, target),
            restore_args=jax.tree.map(_restore_args, target),
            partial_restore=isinstance(target, dict),
        )
        items = ocp.args.Composite(state=state, progress=ocp.args.JsonRestore())
        with _damage():
            metadata = self._manager.item_metadata(step)["state"]
            if metadata is None:
                raise ValueError("the description of its arrays is missing")
            saved = metadata.tree
            if isinstance(target, dict):
                saved = {field: saved[field] for field in target}
        self._check_shapes(step, _shapes(saved), _shapes(target))
        with _damage():
            restored = self._manager.restore(step, args=items)
            state, progress = restored["state"], restored["progress"]
            now, then = fingerprints(state), progress["fingerprints"]
            if "groups" in progress:
                read_arrays(progress["groups"])
        changed = [name for name in now if now[name] != then.get(name)]
        if changed:
            raise _Damaged(f"{changed[0]} is not what was saved")
        return Restored(step, state, progress)

    def _check_shapes(self, step: int, saved: "_Shapes", wanted: "_Shapes") -> None:
        for name in (*wanted, *saved):
            if saved.get(name) != wanted.get(name):
                raise InputError(
                    f"{self.path(step)}: {name}: {_described(saved.get(name))} in "
                    f"the checkpoint, {_described(wanted.get(name))} in this model and optimizer; "
                    "continue with those of that run, or choose another run_dir"
                )

    def _note_metric(self, step: int, metrics: Mapping[str, float]) -> None:
        value = metrics.get(self._best_metric) if self._best_metric else None
        if value is not None and math.isfinite(value):
            self._metric_by_step[step] = value

    def _saved_metrics(self, step: int) -> Mapping[str, float]:
        only = ocp.args.Composite(progress=ocp.args.JsonRestore())
        try:
            with _damage():
                return dict(self._manager.restore(step, args=only)["progress"]["metrics"])
        except _Damaged:  # it cannot be the best; restoring it reports the damage
            return {}

    def _failure(self, error: Exception) -> RunFailed:
        return RunFailed(
            f"{self._manager.directory}: a checkpoint could not be written ({_one_line(error)}); "
            "those before it are unharmed: make room or allow writing there, then run the same "
            "command again"
        )


def _abstract(leaf: jax.Array | jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def _restore_args(leaf: jax.Array | jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
    return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)


_Shapes = dict[str, tuple[int, ...]]


def _shapes(tree: Any) -> _Shapes:
    return {name: tuple(leaf.shape) for name, leaf in by_path(tree).items()}


def _described(shape: tuple[int, ...] | None) -> str:
    return "is not" if shape is None else f"has shape {shape}"


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # The cause stands first or, after the names of nested files, last.
    return text if len(text) <= 200 else f"{text[:98]} ... {text[-97:]}"
