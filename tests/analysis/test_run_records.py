"""What is no finished run is refused in one line that says what to do."""

from collections.abc import Callable
from pathlib import Path

import pytest

from nrt_jax.analysis.report import write_report
from nrt_jax.analysis.run_records import read_runs
from nrt_jax.errors import InputError
from tests.analysis.conftest import MakeRun


def message(paths: list[Path]) -> str:
    with pytest.raises(InputError) as caught:
        read_runs(paths)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def edit(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    path.write_text("\n".join(change(path.read_text("utf-8").split("\n"))), encoding="utf-8")


def test_a_directory_that_is_no_run(tmp_path: Path):
    assert message([tmp_path]) == f"{tmp_path}: no config.yaml in it; name the directory of a run"


def test_a_run_named_twice(make_run: MakeRun):
    run = make_run("nrt")
    assert message([run, run]) == f"{run}: named 2 times; name each run once"


def test_a_run_without_evaluation(make_run: MakeRun):
    run = make_run("nrt", evaluation={"examples": 0})
    assert message([run]) == (
        f"{run}: has no evaluation, since evaluation.examples=0; train again in a new run_dir "
        "with evaluation.examples above 0"
    )


@pytest.mark.parametrize(("kept", "step"), [(0, 0), (1, 0), (6, 5), (13, 12)])
def test_an_unfinished_run(make_run: MakeRun, kept: int, step: int):
    run = make_run("nrt")
    edit(run / "metrics.jsonl", lambda lines: [*lines[:kept], ""])
    assert message([run]) == (
        f"{run}: stopped at step {step} of 12; finish it with: "
        f"nrt-jax train {run}/config.yaml run_dir={run}"
    )


def test_a_run_without_metrics(make_run: MakeRun):
    run = make_run("nrt")
    (run / "metrics.jsonl").unlink()
    assert "stopped at step 0 of 12" in message([run])


def test_the_evaluation_before_training_is_needed(make_run: MakeRun):
    run = make_run("nrt")
    edit(run / "metrics.jsonl", lambda lines: [*lines[3:6], lines[-2], *lines[3:]])
    assert "the evaluation before training (step 0) is missing" in message([run])


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"step": 4, "loss/to', "not JSON"),
        ('{"loss/total": 1.0}', "has no step"),
        ("[1]", "has no step"),
        ('{"step": 4, "loss/total": "low"}', "loss/total is no number"),
        ('{"step": 4, "loss/total": true}', "loss/total is no number"),
    ],
)
def test_a_broken_metrics_line(make_run: MakeRun, line: str, problem: str):
    run = make_run("nrt")
    edit(run / "metrics.jsonl", lambda lines: [*lines[:4], line, *lines[4:]])
    assert message([run]) == (
        f"{run}/metrics.jsonl: line 5: {problem}: {line!r}; delete that line, or train the run "
        "again in a new run_dir"
    )


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"step": 0, "index": 0}', "has no question"),
        ('{"index": 0}', "has no step"),
        (
            '{"step": 0, "index": 0, "question": "", "trace": 1, "trace_end": null, "answer": "",'
            ' "reference": "", "correct": true}',
            "holds a value of another type",
        ),
    ],
)
def test_a_broken_sample(make_run: MakeRun, line: str, problem: str):
    run = make_run("nrt")
    edit(run / "samples.jsonl", lambda lines: [line, *lines])
    assert f"{run}/samples.jsonl: line 1: {problem}" in message([run])


def test_broken_versions(make_run: MakeRun):
    run = make_run("nrt")
    (run / "versions.json").write_text("{", encoding="utf-8")
    assert message([run]) == f"{run}/versions.json: not JSON; copy the whole directory of the run"


def test_a_config_of_something_else(make_run: MakeRun):
    run = make_run("nrt")
    (run / "config.yaml").write_text("method: nrt\nseed: 1\n", encoding="utf-8")
    assert f"{run}/config.yaml: model: required" in message([run])


def test_a_run_of_another_version(make_run: MakeRun):
    run = make_run("nrt", evaluation={"sample": 2})
    assert message([run]) == (
        f"{run}/config.yaml: evaluation.sample: unknown key; did you mean 'samples'?; if another "
        "version of nrt_jax saved this run, use that version or mend the file"
    )


def test_nothing_is_written_for_a_bad_run(make_run: MakeRun, tmp_path: Path):
    with pytest.raises(InputError):
        write_report([make_run("nrt"), tmp_path], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_out_that_cannot_be_written(make_run: MakeRun, tmp_path: Path):
    (tmp_path / "out").write_text("a file", encoding="utf-8")
    with pytest.raises(InputError, match=r"--out .*out: File exists; choose a directory"):
        write_report([make_run("nrt")], tmp_path / "out")
