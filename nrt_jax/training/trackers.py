"""Weights & Biases and MLflow: a run directory is one run there, however often it continues."""

import importlib
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

from nrt_jax.atomic_files import write_atomically
from nrt_jax.config.load import flat
from nrt_jax.config.logging import LoggingConfig
from nrt_jax.errors import InputError

log = logging.getLogger(__name__)

TRACKERS_FILE = "trackers.json"
"""The run's id at each service, in the run directory."""
RETRY_S, FINISH_S = 60.0, 120.0
"""Seconds after a failure until the service is asked again, and that a last upload may take."""
_MLFLOW_PARAMS, _MLFLOW_VALUE = 100, 6000
"""Parameters of one request, and characters of one of their values."""

Metrics = Mapping[str, float | int]


@runtime_checkable
class Tracker(Protocol):
    """A service that shows the metrics of runs; making one starts the run there, or goes on."""

    id: str
    """Of the run at the service."""

    def log(self, step: int, metrics: Metrics) -> None:
        """Send metrics of a step; it may have some already."""
        ...

    def finish(self, *, failed: bool) -> None:
        """End the run there."""
        ...


class TrackedRun(NamedTuple):
    """What a tracker is told about a run."""

    directory: Path
    config: dict[str, Any]
    """The resolved config."""
    id: str | None
    """Of the run that continues; None for a new one."""


class Wandb:
    """A run of Weights & Biases."""

    name, package = "Weights & Biases", "wandb"

    def __init__(self, settings: LoggingConfig, run: TrackedRun):
        import wandb  # pyright: ignore[reportMissingImports]
        import wandb.errors as problems  # pyright: ignore[reportMissingImports]

        self.id = settings.wandb_id or run.id or uuid.uuid4().hex[:8]
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                entity=settings.wandb_entity,
                id=self.id,
                resume="allow",
                name=settings.wandb_name or run.directory.name,
                group=settings.wandb_group,
                tags=list(settings.wandb_tags),
                mode=settings.wandb_mode,
                dir=str(run.directory),
                config=run.config,
                # Settings that may change when a run continues, such as its mesh.
                allow_val_change=True,
            )
        except (problems.UsageError, problems.AuthenticationError) as error:
            raise InputError(
                f"logging.wandb_project={settings.wandb_project!r}: {error}; log in with `wandb "
                "login`, set WANDB_API_KEY, or set logging.wandb_mode=offline"
            ) from error

    def log(self, step: int, metrics: Metrics) -> None:
        """Send metrics of a step, unless the service has later ones from before a kill."""
        # It takes no negative steps, which those of a warm-up are.
        if max(step, 0) >= self._run.step:
            self._run.log(dict(metrics), step=max(step, 0))

    def finish(self, *, failed: bool) -> None:
        """Upload what is left, and end the run."""
        self._run.finish(exit_code=int(failed))


class Mlflow:
    """A run of MLflow."""

    name, package = "MLflow", "mlflow"

    def __init__(self, settings: LoggingConfig, run: TrackedRun):
        # By default a server that is away would hold up every step for minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        from mlflow import MlflowClient  # pyright: ignore[reportMissingImports]

        self._client = MlflowClient(tracking_uri=settings.mlflow_uri)
        if run.id is not None:
            self.id = run.id
            self._client.update_run(self.id, status="RUNNING")
            return
        name = settings.mlflow_experiment
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        title = settings.mlflow_name or run.directory.name
        self.id = self._client.create_run(number, run_name=title).info.run_id
        self._log_config(run.config)

    def _log_config(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param  # pyright: ignore[reportMissingImports]

        params = [Param(key, str(value)[:_MLFLOW_VALUE]) for key, value in flat(config).items()]
        for start in range(0, len(params), _MLFLOW_PARAMS):
            self._client.log_batch(self.id, params=params[start : start + _MLFLOW_PARAMS])

    def log(self, step: int, metrics: Metrics) -> None:
        """Send metrics of a step; those of a step that is taken again are sent again."""
        from mlflow.entities import Metric  # pyright: ignore[reportMissingImports]

        now = int(time.time() * 1000)
        values = [Metric(key, value, now, step) for key, value in metrics.items()]
        self._client.log_batch(self.id, metrics=values)

    def finish(self, *, failed: bool) -> None:
        """End the run."""
        self._client.set_terminated(self.id, status="FAILED" if failed else "FINISHED")


def wanted(settings: LoggingConfig) -> list[type[Wandb] | type[Mlflow]]:
    """The trackers that a config names. InputError when the package of one cannot be imported."""
    named = {
        Wandb: ("wandb_project", settings.wandb_project),
        Mlflow: ("mlflow_experiment", settings.mlflow_experiment),
    }
    found = [tracker for tracker, (_, value) in named.items() if value is not None]
    for tracker in found:
        key, value = named[tracker]
        try:
            module = importlib.import_module(tracker.package)
            # A folder `wandb` in the working directory imports as an empty package.
            missing = module.__file__ is None
        except ImportError:
            missing = True
        if missing:
            raise InputError(
                f"logging.{key}={value!r} needs the {tracker.package} package; "
                f"pip install 'nrt-jax[{tracker.package}]', or set it to null"
            )
    return found


def open_trackers(
    settings: LoggingConfig, directory: Path, config: dict[str, Any], *, continues: bool
) -> "list[GuardedTracker]":
    """Start the run at each service that the config names, or go on with it.

    A service that cannot be reached is reported and left out. Raises InputError for a login that
    is missing.
    """
    path = directory / TRACKERS_FILE
    ids: dict[str, str] = json.loads(path.read_bytes()) if continues and path.exists() else {}
    opened = []
    for kind in wanted(settings):
        try:
            tracker = kind(settings, TrackedRun(directory, config, ids.get(kind.package)))
        except InputError:
            raise
        except Exception as error:
            log.warning("%s: no metrics are sent: %s", kind.name, _one_line(error))
            continue
        ids[kind.package] = tracker.id
        write_atomically(path, json.dumps(ids).encode() + b"\n")
        opened.append(GuardedTracker(tracker, kind.name))
    return opened


class GuardedTracker:
    """A tracker whose errors stop no training: metrics wait until the service can be reached."""

    def __init__(self, tracker: Tracker, name: str):
        self._tracker, self._name = tracker, name
        self._waiting: list[tuple[int, Metrics]] = []
        self._warned, self._not_before = False, 0.0

    def log(self, step: int, metrics: Metrics) -> None:
        """Send these metrics, and those that wait, unless the service failed a moment ago."""
        self._waiting.append((step, metrics))
        if time.monotonic() >= self._not_before:
            self._guarded(self._send)

    def finish(self, *, failed: bool) -> None:
        """Send what waits and end the run there, in a limited time."""

        def end() -> None:
            self._guarded(self._send)
            self._guarded(lambda: self._tracker.finish(failed=failed))

        thread = threading.Thread(target=end, daemon=True)
        thread.start()
        thread.join(FINISH_S)
        if thread.is_alive():
            self._warn("the last metrics are not uploaded yet")

    def _send(self) -> None:
        while self._waiting:
            self._tracker.log(*self._waiting[0])
            self._waiting.pop(0)

    def _guarded(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._not_before = time.monotonic() + RETRY_S
            self._warn(_one_line(error))

    def _warn(self, problem: str) -> None:
        if not self._warned:
            log.warning("%s: %s; training goes on, and metrics.jsonl has all", self._name, problem)
        self._warned = True


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
