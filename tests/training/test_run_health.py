"""A run's first batch is diagnosed before the first update, and its traces are watched after it."""

import json
import logging
from pathlib import Path

import pytest

from nrt_jax.training import run_health
from nrt_jax.training.run_health import CollapseWatch

# --- the first batch ------------------------------------------------------------------------------

SIZES = (
    "train.batch_prompts=8",
    "train.mini_batch_prompts=8",
    "train.micro_batch_prompts=8",
    "evaluation.examples=0",
    "train.steps=1",
    "train.diagnosis_prompts=6",
    "objective.kl_coefficient=0",
    "optimizer.schedule=constant",
    "optimizer.warmup_ratio=0",
)
"""For the eight devices of this process."""
UNRANKED = ("rollout.top_k=1", "objective.old_logprobs=recompute")
"""Greedy traces are equal, and so are their rewards: there is nothing to learn from them."""


def lines_of(told: str, level: str) -> list[str]:
    prefix = f"nrt-jax: {level}: "
    return [line.removeprefix(prefix) for line in told.splitlines() if line.startswith(prefix)]


@pytest.fixture
def train(tiny_config, tmp_path, words):
    def train(*overrides: str) -> tuple[int, str]:
        run_dir = f"run_dir={tmp_path / 'run'}"
        status, _, told = words("train", tiny_config, run_dir, *SIZES, *overrides)
        return status, told

    return train


def test_a_run_that_would_learn_nothing_does_not_start(train, tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="nrt_jax"):
        status, told = train(*UNRANKED)
    assert status == 1
    (error,) = lines_of(told, "error")
    assert "reward/zero_std_share" in error
    assert "train.allow_cold_start=true" in error
    found = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert any("zero_std" in line and "rollout.traces_per_prompt" in line for line in found)
    record = json.loads((tmp_path / "run/diagnosis.json").read_text("utf-8"))
    assert record["questions"] == 6
    assert record["figures"]["reward/zero_std_share"]["value"] == 1.0
    assert not any((tmp_path / "run/checkpoints").glob("[0-9]*"))
    # The same directory trains once that is allowed, and a run that continues is not asked again.
    status, told = train(*UNRANKED, "train.allow_cold_start=true")
    assert status == 0
    first = json.loads((tmp_path / "run/metrics.jsonl").read_text("utf-8").splitlines()[0])
    shares = [first[f"gradient/{term}_share"] for term in ("trace", "token", "format")]
    assert sum(shares) == pytest.approx(1, rel=1e-6)
    assert shares[0] == 0
    (tmp_path / "run/diagnosis.json").unlink()
    status, told = train(*UNRANKED, "train.steps=2")
    assert status == 0, told
    assert not (tmp_path / "run/diagnosis.json").exists()


@pytest.mark.slow
def test_diagnose_tells_what_the_run_would_tell(tiny_config, tmp_path, words, train):
    asked = ("diagnose", tiny_config, *SIZES, f"run_dir={tmp_path / 'run'}")
    status, out, told = words(*asked, "--out", tmp_path / "figures.json")
    assert not (tmp_path / "run").exists()
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))
    stops = [finding for finding in figures["findings"] if finding["level"] == "stop"]
    assert status == (1 if stops else 0), told
    assert "log P(y*|x, z of another question)" in out
    assert all(f"- {finding['line']}" in out for finding in figures["findings"])
    train("train.allow_cold_start=true")
    of_run = json.loads((tmp_path / "run/diagnosis.json").read_text("utf-8"))
    assert of_run["figures"] == figures["figures"]
    # The trained run, on its held-out rows.
    status, out, told = words("diagnose", tmp_path / "run", "--rows", "3")
    assert status == 0, told
    assert out.startswith("run (step 1), held-out rows: 3 questions, 2 traces each")
    assert "gradient" not in out


@pytest.mark.slow
def test_the_quickstart_starts_and_its_traces_are_about_their_questions(words, tmp_path):
    """A third of its first traces are empty, and it learns: its findings must stop nothing."""
    status, out, told = words("diagnose", "quickstart/nrt", "--out", tmp_path / "figures.json")
    assert status == 0, told
    figures = json.loads((tmp_path / "figures.json").read_text("utf-8"))["figures"]
    assert 0.2 < figures["trace/empty_share"]["value"] < 0.45
    assert figures["logprob/own_minus_shuffled"]["low"] > 0
    assert "traces ended by another special token" in out


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("method=sft",), "method sft: this config samples no traces"),
        (("data.eval_rows=0", "--rows", "4"), "data.eval_rows=0: there are no held-out rows"),
        (("--rows", "0"), "0 is no number of rows"),
    ],
)
def test_what_cannot_be_diagnosed_is_one_line(tiny_config, words, capsys, overrides, said):
    try:
        status, out, told = words("diagnose", tiny_config, *SIZES, *overrides)
    except SystemExit as stop:
        status, out, told = stop.code, "", capsys.readouterr().err
    assert (status, out) == (2, "")
    (line,) = told.splitlines()
    assert said in line


def test_a_directory_is_asked_the_questions_that_are_named(tiny_config, words):
    directory = tiny_config.parent / "model"
    status, _, told = words("diagnose", directory)
    assert status == 2
    assert "a directory names no questions; add data.source=jsonl data.path=FILE" in told
    task = ("data.source=chain_addition", "data.chain.digits=3", "data.eval_rows=4")
    sizes = ("rollout.traces_per_prompt=2", "rollout.max_trace_tokens=4")
    limits = ("data.max_prompt_tokens=12", "data.max_answer_tokens=4", "rollout.slots=8")
    status, out, told = words("diagnose", directory, "--rows", "2", *task, *sizes, *limits)
    assert status == 0, told
    assert "2 questions, 2 traces each" in out


# --- collapse -------------------------------------------------------------------------------------

START = {
    "trace/tokens": 40.0,
    "policy/entropy": 1.4,
    "reward/mean": 0.17,
    "reward/baseline": 0.16,
    "reward/above_baseline_share": 0.4,
}


def test_traces_that_shrink_to_a_tenth_are_told_of_once():
    watch = CollapseWatch()
    assert watch.check(START) is None
    assert watch.check(START | {"trace/tokens": 4.1}) is None
    line = watch.check(START | {"trace/tokens": 3.9})
    assert line is not None
    assert "trace/tokens is 3.9, below a tenth of the 40 at the start" in line
    assert "objective.format_where=natural_end" in line
    assert watch.check(START | {"trace/tokens": 0.0}) is None


def test_entropy_that_falls_while_the_reward_does_not_rise_is_a_collapse():
    watch = CollapseWatch(START)
    line = watch.check(START | {"policy/entropy": 0.1})
    assert line is not None
    assert "policy/entropy is 0.1" in line
    assert "the reward's lead over the empty trace went from 0.01 to 0.01" in line


def test_entropy_that_falls_by_success_is_none():
    """As in the quickstart, whose traces become the running totals."""
    won = {"policy/entropy": 0.007, "reward/mean": 0.58, "reward/above_baseline_share": 1.0}
    assert CollapseWatch(START).check(START | won) is None
    shorter = START | won | {"trace/tokens": 0.0}
    assert CollapseWatch(START).check(shorter) is not None


def test_a_run_that_continues_compares_with_its_first_step(tmp_path):
    rows = [{"step": 0, "eval/exact_match": 0.1}, {"step": 1} | START, {"step": 2} | START]
    rows[2]["trace/tokens"] = 9.0
    rows[1]["loss/total"] = None  # how the file has a loss of NaN
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "metrics.jsonl").write_text(lines, encoding="utf-8")
    watch = CollapseWatch.of_run(tmp_path)
    assert watch.first is not None
    assert watch.first["trace/tokens"] == 40.0
    assert CollapseWatch.of_run(Path(tmp_path / "none")).first is None


@pytest.mark.parametrize("stops", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_collapse_warns_or_ends_the_run_which_is_saved(
    train, tmp_path, monkeypatch, caplog, stops
):
    monkeypatch.setattr(run_health, "COLLAPSED", 2.0)  # every step then is one
    settings = ("train.diagnosis_prompts=0", "train.steps=2", f"train.stop_on_collapse={stops}")
    with caplog.at_level(logging.WARNING, logger=run_health.__name__):
        status, told = train(*settings)
    if stops:
        assert status == 1
        assert "step 1: collapse: trace/tokens" in told
        assert "train.stop_on_collapse=false" in told
        assert (tmp_path / "run/checkpoints/1").is_dir()
    else:
        assert status == 0
        assert "step 1: collapse: trace/tokens" in caplog.records[0].getMessage()
        assert (tmp_path / "run/checkpoints/2").is_dir()
