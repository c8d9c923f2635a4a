"""A run directory that cannot be used or continued, a full disk: one line, nothing is harmed."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.training.runs import REPOSITORY, TinyRun, assert_same, write_model

SFT = ("method=sft",)


# --- the run directory ----------------------------------------------------------------------------


def test_a_file_in_its_place(refused, tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        line = refused(f"run_dir={tmp_path}/{name}")
        assert line.startswith(f"run_dir {tmp_path}/{name}: ")
        assert line.endswith("; choose a directory that you may write to")


def test_other_files_in_it(refused, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    assert "holds notes.txt but no config.yaml, so it is no run" in refused()
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_a_read_only_file_system(tiny_config):
    line = run_in_namespace(tiny_config, "mount -t tmpfs -o ro none {run}")
    assert line.endswith("Read-only file system; choose a directory that you may write to")


def run_in_namespace(config: Path, mount: str) -> str:
    """Train with a file system mounted over run_dir; the error's line."""
    run = config.parent / "mounted"
    run.mkdir(exist_ok=True)
    train = f"{sys.executable} -m nrt_jax train {config} run_dir={run} method=sft mesh.data=1"
    unshare = ["unshare", "--mount", "--map-root-user", "sh", "-c"]
    if subprocess.run([*unshare, mount.format(run=run)], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    environment = {"JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin:/sbin"}
    result = subprocess.run(
        [*unshare, f"{mount.format(run=run)} && exec {train}"],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    assert result.returncode in (1, 2), result
    (line,) = result.stderr.splitlines()
    return line


# --- a run that is there --------------------------------------------------------------------------


@pytest.fixture
def copied(reference, tmp_path) -> TinyRun:
    """A complete sft run, to be broken."""
    whole = reference(*SFT)
    shutil.copytree(whole.directory, tmp_path / "run")
    return TinyRun(whole.config, tmp_path / "run", SFT)


def truncate_arrays(step: Path) -> None:
    path = max((p for p in step.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    path.write_bytes(path.read_bytes()[:100])


def test_a_changed_setting(copied):
    outcome = copied.train("optimizer.learning_rate=0.5")
    assert outcome.status == 2
    assert outcome.error == (
        f"{copied.directory}/config.yaml: optimizer.learning_rate is 0.01 in this run and 0.5 now; "
        "set it back to continue the run, or choose another run_dir"
    )


def test_an_unreadable_checkpoint(copied, reference):
    truncate_arrays(copied.checkpoints / "8")
    outcome = copied.trained()
    warning, info = outcome.told
    assert warning.startswith("nrt-jax: WARNING: checkpoint 8 cannot be read, using 6: ")
    assert info == f"nrt-jax: INFO: continuing {copied.directory} from step 6"
    assert_same(copied, reference(*SFT))


def test_no_readable_checkpoint(copied):
    for step in (6, 8):
        truncate_arrays(copied.checkpoints / str(step))
    outcome = copied.train()
    assert outcome.status == 2
    assert "none of the checkpoints [6, 8] can be read" in outcome.error
    assert copied.steps == [6, 8]
    assert len(copied.metrics()) == 12


def test_a_model_of_another_shape(model_copy):
    run = TinyRun(model_copy / "tiny.yaml", model_copy / "run", (*SFT, "train.steps=2"))
    run.trained()
    shutil.rmtree(model_copy / "model")
    write_model(model_copy / "model", intermediate_size=64)
    outcome = run.train()
    assert outcome.status == 2
    assert outcome.error == (
        f"{run.checkpoints}/2: params.layers.mlp.down: has shape (2, 48, 32) in the checkpoint, "
        "has shape (2, 64, 32) in this model and optimizer; continue with those of that run, or "
        "choose another run_dir"
    )
    assert run.steps == [2]


def test_a_best_metric_that_is_never_measured(new_run):
    run = new_run(*SFT, "evaluation.every_steps=2")
    outcome = run.train("checkpoint.best_metric=eval/exact")
    assert outcome.status == 2
    assert outcome.error == (
        "checkpoint.best_metric='eval/exact' is no metric of this run's evaluation; use one of "
        "eval/exact_match"
    )
    # The mistake is mended in the same directory.
    run.trained("checkpoint.best_metric=eval/exact_match")


def test_gradients_that_are_not_finite(new_run):
    run = new_run(*SFT, "optimizer.learning_rate=1e30", "optimizer.clip_norm=null")
    overrides = ("optimizer.schedule=constant", "optimizer.warmup_ratio=0", "train.steps=30")
    outcome = run.train(*overrides, "evaluation.examples=0")
    assert outcome.status == 1
    assert "gradients in a row were not finite, so no update was made; lower opt" in outcome.error
    first, *_, before, last = run.metrics()
    # Two updates a step.
    assert first["update/skipped_in_row"] < 2
    assert before["update/skipped_in_row"] < 10 <= last["update/skipped_in_row"] < 12
    assert last["update/skipped"] == before["update/skipped"] + 2
    assert all(np.isfinite(array).all() for array in run.arrays(max(run.steps)).values())


# --- full disks -----------------------------------------------------------------------------------


def test_no_room_for_metrics(new_run, reference):
    whole = reference(*SFT)
    metrics = whole.directory / "metrics.jsonl"
    run = new_run(*SFT, "checkpoint.every_steps=8", "logging.tensorboard=false")
    room = metrics.stat().st_size - 100
    outcome = run.train(file_bytes=room)
    assert outcome.status == 1
    assert outcome.error.startswith(f"{run.directory / metrics.name}: File too large; make room or")
    # Full to the last byte, most likely in the midst of a line.
    assert (run.directory / metrics.name).stat().st_size == room
    run.trained()
    assert run.metrics() == whole.metrics()


@pytest.mark.slow
def test_no_room_for_a_checkpoint(new_run, reference):
    whole = reference(*SFT)
    run = new_run(*SFT)
    assert run.kill_at(lambda: run.saved(4))
    kept = run.steps[-2:]  # the kill may have come before an older one was removed
    whole_files = (run.checkpoints / str(kept[0])).rglob("*")
    largest = max(path.stat().st_size for path in whole_files if path.is_file())
    outcome = run.train(file_bytes=largest // 2)
    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith(f"nrt-jax: error: {run.checkpoints}: a checkpoint could not be written")
    assert set(run.steps) >= set(kept)
    run.trained()
    assert_same(run, whole)
