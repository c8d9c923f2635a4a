"""Weights & Biases and MLflow: a run that continues is one run there, and no error stops it."""

import json
import logging
import os
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from nrt_jax.checkpoints.run_dir import flat
from nrt_jax.config.load import load_config
from nrt_jax.config.logging import LoggingConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.training import trackers
from nrt_jax.training.logger import MetricsWriter
from nrt_jax.training.setup import setup
from nrt_jax.training.trackers import GuardedTracker, Metrics, wanted

RESOLVED = {"seed": 1, "data": {"path": "train.jsonl"}}


def write(directory: Path, settings: LoggingConfig, after: int, steps: tuple[int, ...]) -> None:
    """What one process of a run writes."""
    writer = MetricsWriter(directory, settings, after=after, total=9, resolved=RESOLVED)
    for step in steps:
        writer.write(step, {"loss/total": step / 7})
    writer.close()


def ids(directory: Path) -> dict[str, str]:
    return json.loads((directory / "trackers.json").read_text())


# --- Weights & Biases ----------------------------------------------------------------------------


@pytest.fixture
def wandb(monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    for name in [name for name in os.environ if name.startswith("WANDB_") and "SILENT" not in name]:
        monkeypatch.delenv(name)
    return pytest.importorskip("wandb", reason="needs wandb")


def offline_records(directory: Path) -> list[tuple[Any, list[tuple[int, float]]]]:
    """What each process wrote for `wandb sync`: the run, and its steps with their loss."""
    from wandb.proto.wandb_internal_pb2 import Record

    found = []
    for path in sorted((directory / "wandb").glob("offline-run-*/*.wandb")):
        records: list[Any] = []
        deadline = time.monotonic() + 60
        # Another process writes the file, and ends some time after us.
        while not any(record.HasField("exit") for record in records):
            assert time.monotonic() < deadline, f"{path} has no end"
            time.sleep(0.1)
            records = [Record.FromString(data) for data in leveldb_records(path.read_bytes()[7:])]
        run = next(record.run for record in records if record.HasField("run"))
        rows = [row_of(record.history) for record in records if record.HasField("history")]
        found.append((run, [(row["_step"], row["loss/total"]) for row in rows]))
    return found


def row_of(history: Any) -> dict[str, Any]:
    """The values of one row by name."""
    items = {item.key or ".".join(item.nested_key): item for item in history.item}
    return {key: json.loads(item.value_json) for key, item in items.items()}


def leveldb_records(content: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format in the first 32 KiB: checksum, length, type, data."""
    while content:
        length, kind = struct.unpack("<HB", content[4:7])
        assert kind == 1, "longer than a block"
        yield content[7 : 7 + length]
        content = content[7 + length :]


def test_a_run_that_continues_is_one_run_of_wandb(tmp_path, wandb, caplog):
    settings = LoggingConfig(
        tensorboard=False,
        wandb_project="reasoning",
        wandb_entity="team",
        wandb_group="sweep",
        wandb_tags=("nrt", "gsm8k"),
        wandb_mode="offline",
    )
    directory = tmp_path / "run"
    directory.mkdir()
    write(directory, settings, after=-1, steps=(0, 1, 2))
    drawn = ids(directory)["wandb"]
    write(directory, settings, after=1, steps=(2, 3))
    assert [r.message for r in caplog.records if r.name.startswith("nrt_jax")] == []
    (first, steps), (second, more) = offline_records(directory)
    for run in (first, second):
        assert (run.run_id, run.project, run.entity) == (drawn, "reasoning", "team")
        assert (run.display_name, run.run_group, list(run.tags)) == (
            "run",
            "sweep",
            ["nrt", "gsm8k"],
        )
    assert steps == [(0, 0.0), (1, 1 / 7), (2, 2 / 7)]
    assert more == [(2, 2 / 7), (3, 3 / 7)]
    # A start anew is another run there; an id of the config is its own.
    write(directory, settings, after=-1, steps=())
    assert ids(directory)["wandb"] != drawn
    write(directory, settings.model_copy(update={"wandb_id": "mine"}), after=1, steps=())
    assert ids(directory)["wandb"] == "mine"


def test_a_login_that_is_missing_is_told(tmp_path, wandb, monkeypatch):
    def refuse(**_):
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(InputError, match=r"wandb_project='p': api_key .*wandb_mode=offline"):
        write(tmp_path, LoggingConfig(wandb_project="p"), after=-1, steps=())


def test_no_network_at_the_start(tmp_path, wandb, monkeypatch, caplog):
    def time_out(**_):
        raise wandb.errors.CommError("Run initialization has timed out\nafter 90.0 sec.")

    monkeypatch.setattr(wandb, "init", time_out)
    write(tmp_path, LoggingConfig(wandb_project="p"), after=-1, steps=(0, 1))
    (warning,) = caplog.messages
    assert warning == (
        "Weights & Biases: no metrics are sent: Run initialization has timed out after 90.0 sec."
    )
    assert len((tmp_path / "metrics.jsonl").read_bytes().splitlines()) == 2


# --- MLflow --------------------------------------------------------------------------------------


def test_a_run_that_continues_is_one_run_of_mlflow(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "store").as_uri()
    settings = LoggingConfig(tensorboard=False, mlflow_experiment="reasoning", mlflow_uri=store)
    directory = tmp_path / "run"
    directory.mkdir()
    write(directory, settings, after=-1, steps=(0, 1))
    write(directory, settings, after=1, steps=(2, 3))
    client = mlflow.MlflowClient(tracking_uri=store)
    experiment = client.get_experiment_by_name("reasoning")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_id, run.info.run_name, run.info.status) == (
        ids(directory)["mlflow"],
        "run",
        "FINISHED",
    )
    assert run.data.params == {name: str(value) for name, value in flat(RESOLVED).items()}
    history = client.get_metric_history(run.info.run_id, "loss/total")
    assert [(m.step, m.value) for m in history] == [(step, step / 7) for step in range(4)]


def test_a_run_that_fails_has_failed_there_too(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs mlflow-skinny")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    store = (tmp_path / "store").as_uri()
    settings = LoggingConfig(tensorboard=False, mlflow_experiment="x", mlflow_uri=store)
    writer = MetricsWriter(tmp_path, settings, after=-1, total=9, resolved={})
    with pytest.raises(ZeroDivisionError), writer:
        raise ZeroDivisionError
    run = mlflow.MlflowClient(tracking_uri=store).get_run(ids(tmp_path)["mlflow"])
    assert run.info.status == "FAILED"


# --- both ----------------------------------------------------------------------------------------


class Flaky:
    """A service that is away at first."""

    id = "1"

    def __init__(self) -> None:
        self.away, self.got = True, []

    def log(self, step: int, metrics: Metrics) -> None:
        if self.away:
            raise ConnectionError("503 Service\nUnavailable")
        self.got.append(step)

    def finish(self, *, failed: bool) -> None:
        if self.away:
            raise ConnectionError("still away")
        self.got.append("failed" if failed else "finished")


def test_metrics_wait_for_a_service_that_is_away(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "RETRY_S", 0.0)
    service = Flaky()
    tracker = GuardedTracker(service, "MLflow")
    for step in (1, 2):
        tracker.log(step, {"loss": 0.0})
    service.away = False
    tracker.log(3, {"loss": 0.0})
    tracker.finish(failed=False)
    assert service.got == [1, 2, 3, "finished"]
    assert caplog.messages == [
        "MLflow: 503 Service Unavailable; training goes on, and metrics.jsonl has all"
    ]


def test_a_service_that_is_away_is_asked_once_in_a_while(caplog):
    service = Flaky()
    tracker = GuardedTracker(service, "MLflow")
    tracker.log(1, {})
    service.away = False
    tracker.log(2, {})
    assert service.got == []
    # The end is worth a try.
    tracker.finish(failed=True)
    assert service.got == [1, 2, "failed"]


def test_the_end_does_not_wait_for_an_upload_forever(monkeypatch, caplog):
    monkeypatch.setattr(trackers, "FINISH_S", 0.05)
    service = Flaky()
    service.finish = lambda **_: __import__("time").sleep(1)
    service.away = False
    GuardedTracker(service, "MLflow").finish(failed=False)
    assert "MLflow: the last metrics are not uploaded yet" in caplog.text


@pytest.mark.parametrize(
    ("setting", "package"), [("wandb_project", "wandb"), ("mlflow_experiment", "mlflow")]
)
def test_a_missing_package_is_reported_before_anything_is_read(
    setting, package, tiny_config, tmp_path, monkeypatch
):
    monkeypatch.setitem(sys.modules, package, None)
    overrides = [f"logging.{setting}=p", f"run_dir={tmp_path / 'run'}", "data.tokenizer=no"]

    config = load_config(RunConfig, [tiny_config], overrides)
    with pytest.raises(InputError) as error, setup(config):
        pass
    assert str(error.value) == (
        f"logging.{setting}='p' needs the {package} package; pip install 'nrt-jax[{package}]', or "
        "set it to null"
    )


def test_a_folder_of_the_same_name_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(InputError, match="needs the wandb package"):
        wanted(LoggingConfig(wandb_project="p"))


def test_no_tracker_is_loaded_unasked(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    write(tmp_path, LoggingConfig(tensorboard=False), after=-1, steps=(1,))
    assert not (tmp_path / "trackers.json").exists()
    assert caplog.messages == []
