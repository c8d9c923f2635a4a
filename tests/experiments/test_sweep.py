"""Cells are skipped, continued, retried and stopped; a small stand-in trains them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nrt_jax.cli import main
from nrt_jax.errors import InputError
from nrt_jax.experiments.cells import read_sweep
from nrt_jax.experiments.sweep import cell_state, run_sweep, write_configs
from nrt_jax.experiments.sweep_table import run_dirs

TRAIN = '''
"""Stands in for nrt-jax train: a line of metrics per step; fails and waits as files ask."""
import json, os, pathlib, signal, sys, time
import yaml
config = yaml.safe_load(open(sys.argv[2]))
run, steps = pathlib.Path(config["run_dir"]), config["train"]["steps"]
run.mkdir(parents=True, exist_ok=True)
(run / "cores").write_text(str(len(os.sched_getaffinity(0))))
path = run / "metrics.jsonl"
done = len(path.read_text().splitlines()) if path.exists() else 0
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
for step in range(done + 1, steps + 1):
    if config["seed"] == 1 and os.path.exists("broken"):
        sys.exit("nrt-jax: error: the disk of seed 1 is full")
    row = {"step": step, "loss/total": 1.0}
    if step == steps:
        row["eval/exact_match"] = 0.5
    with path.open("a") as file:
        file.write(json.dumps(row) + "\\n")
    while os.path.exists("slow") and step == 2 and not stopped:
        time.sleep(0.02)
    if stopped:
        sys.exit(0)
'''
SWEEP = "base: quickstart/nrt\nseeds: [0, 1, 2]\n"


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A sweep of three cells of three steps, in a folder whose nrt_jax is the stand-in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    package = tmp_path / "nrt_jax"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text(TRAIN)
    (tmp_path / "mine.yaml").write_text(SWEEP)
    return read_sweep(Path("mine.yaml"), ["train.steps=3"])


def states(sweep) -> list[tuple[str, int]]:
    found = [cell_state(sweep, cell) for cell in sweep.cells]
    return [(state.state, state.step) for state in found]


def lines(cell) -> list[str]:
    return (cell.config.run_dir / "metrics.jsonl").read_text("utf-8").splitlines()


def test_all_cells_are_trained_and_finished_ones_are_skipped(sweep):
    assert states(sweep) == [("waiting", 0)] * 3
    assert run_sweep(sweep) == 0
    assert states(sweep) == [("finished", 3)] * 3
    logs = [sweep.folder / "logs" / f"{cell.name}.log" for cell in sweep.cells]
    written = [log.stat().st_mtime_ns for log in logs]
    assert run_sweep(sweep) == 0
    assert [log.stat().st_mtime_ns for log in logs] == written


def test_a_failed_cell_is_told_left_and_retried(sweep, caplog):
    Path("broken").touch()
    assert run_sweep(sweep) == 1
    assert states(sweep) == [("finished", 3), ("failed", 0), ("finished", 3)]
    assert "the disk of seed 1 is full" in caplog.text
    Path("broken").unlink()
    assert run_sweep(sweep) == 1
    assert states(sweep)[1] == ("failed", 0)
    assert run_sweep(sweep, retry=True) == 0
    assert states(sweep) == [("finished", 3)] * 3


def test_a_cell_that_was_begun_goes_on_and_a_deleted_one_starts_anew(sweep):
    assert run_sweep(sweep) == 0
    begun, deleted, _ = sweep.cells
    metrics = begun.config.run_dir / "metrics.jsonl"
    metrics.write_text(lines(begun)[0] + '\n{"step": 2, "loss')
    for file in deleted.config.run_dir.iterdir():
        file.unlink()
    deleted.config.run_dir.rmdir()
    assert states(sweep) == [("begun", 1), ("waiting", 0), ("finished", 3)]
    metrics.write_text(lines(begun)[0] + "\n")
    assert run_sweep(sweep) == 0
    assert [len(lines(cell)) for cell in sweep.cells] == [3, 3, 3]


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_a_report_takes_the_cells_that_have_a_run(sweep, caplog):
    write_configs(sweep)
    with pytest.raises(InputError, match="none of its 3 cells has a run; train them"):
        run_dirs(sweep.folder)
    for cell in sweep.cells[1:]:
        cell.config.run_dir.mkdir()
    assert run_dirs(sweep.folder) == [cell.config.run_dir for cell in sweep.cells[1:]]
    (said,) = caplog.messages
    assert f"left out 1 of 3 cells without a run, such as {sweep.cells[0].name}" in said


def test_jobs_divide_the_cores(sweep, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert run_sweep(sweep, jobs=2) == 0
    half = str(len(os.sched_getaffinity(0)) // 2)
    assert {(c.config.run_dir / "cores").read_text() for c in sweep.cells} == {half}


def test_jobs_divide_the_gpus(monkeypatch):
    from nrt_jax.experiments.sweep import _shares

    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3,5,7")
    assert [share["CUDA_VISIBLE_DEVICES"] for share in _shares(2)] == ["2,3", "5,7"]
    with pytest.raises(InputError, match="this machine has 4 GPUs"):
        _shares(5)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_every_run_save(sweep, number):
    """The sweep runs in a process of its own, which imports the real package."""
    Path("slow").touch()
    code = (
        "import sys; from pathlib import Path; sys.path[:] = [p for p in sys.path if p];"
        "from nrt_jax.experiments.cells import read_sweep;"
        "from nrt_jax.experiments.sweep import run_sweep;"
        "sys.exit(run_sweep(read_sweep(Path('mine.yaml'), ['train.steps=3'])))"
    )
    repository = Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": str(repository)}
    )
    metrics = sweep.cells[0].config.run_dir / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and len(lines(sweep.cells[0])) == 2):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(number)
    assert process.wait(30) == (130 if number == signal.SIGINT else 0)
    assert states(sweep) == [("begun", 2), ("waiting", 0), ("waiting", 0)]
    Path("slow").unlink()
    assert run_sweep(sweep) == 0
    assert len(lines(sweep.cells[0])) == 3


def test_the_verb_lists_and_shows_cells(sweep, capsys):
    assert main(["sweep", "mine.yaml", "train.steps=3", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert "seed=2" in out
    assert "3 cells, 2,304 traces in all" in out
    assert main(["sweep", "mine.yaml", "train.steps=3", "--cell", "1"]) == 0
    capsys.readouterr()
    assert main(["sweep", "status", "mine.yaml", "train.steps=3"]) == 0
    out = capsys.readouterr().out
    assert "1 finished, 0 failed, 0 begun, 2 waiting" in out
    assert main(["sweep", "mine.yaml", "--cell", "3"]) == 2
    assert "has 3 cells" in capsys.readouterr().err
    names = json.loads((sweep.folder / "sweep.json").read_text("utf-8"))
    assert names[sweep.cells[2].name] == {"seed": "2"}
