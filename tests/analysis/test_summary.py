"""Figures of a comparison, worked out by hand from made-up runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from nrt_jax.analysis.report import write_report
from nrt_jax.analysis.run_records import read_runs
from nrt_jax.analysis.seeds import group_by_seed
from nrt_jax.analysis.summary import arrow, duration, number, percent, summarise
from tests.analysis.conftest import MakeRun, evaluation_line, sample, write_lines


def summary_of(paths: list[Path]) -> dict[str, Any]:
    return summarise(group_by_seed(read_runs(paths)))


def test_exact_match_of_one_sft_and_one_nrt_run(make_run: MakeRun):
    nrt = make_run("nrt", before=0.25, after=0.95)
    sft = make_run("sft", "sft", before=0.125, after=0.5)
    for paths in ([sft, nrt], [nrt, sft]):
        summary = summary_of(paths)
        expected = {"base": 0.25, "base_direct": 0.125, "sft": 0.5, "nrt": 0.95}
        assert summary["exact_match"] == expected
        assert [run["path"] for run in summary["runs"]] == [str(path) for path in paths]


def test_other_sets_of_runs_have_no_such_pair(make_run: MakeRun):
    runs = [make_run("a"), make_run("b"), make_run("c", "sft")]
    for chosen in (runs[:1], runs[:2], runs):
        summary = summary_of(chosen)
        assert "exact_match" not in summary
        assert len(summary["runs"]) == len(chosen)


def test_figures_of_an_nrt_run(make_run: MakeRun):
    (run,) = summary_of([make_run("nrt")])["runs"]
    # Steps 1..5 and 8..12 have the means 3 and 10.
    assert run["reward"] == pytest.approx({"first": 0.3, "last": 1.0})
    assert run["baseline"] == {"first": 0.5, "last": 0.5}
    assert run["trace_tokens"] == {"first": 3.0, "last": 10.0}
    assert run["entropy"] == pytest.approx({"first": 1.7, "last": 1.0})
    shares = {"think_end": 0.75, "length": 0.25, "other": 0.0}
    assert run["finish_shares"] == {"first": shares, "last": shares}
    assert run["seconds"] == {
        "data": 3.0,
        "update": 12.0,
        "generate": 24.0,
        "evaluate": 1.0,
        "compile": 6.0,
        "total": 40.0,
    }
    del run["path"]
    assert (
        run
        | {
            "name": "nrt",
            "label": "NRT-WS(−log p)",
            "method": "nrt",
            "scheme": "ws_neg_log_p",
            "seed": 3,
            "steps": 12,
            "pairs_seen": 384,
            "problems": 200,
            "exact_match": {"first": 0.25, "last": 0.95},
            "skipped_updates": 1,
            "tokens_per_second": 6.5,
        }
        == run
    )


def test_goodput_is_that_of_the_last_step(make_run: MakeRun, tmp_path: Path):
    measured, old = make_run("measured"), make_run("old", "sft")
    lines = (measured / "metrics.jsonl").read_text("utf-8")
    for step, share in ((11, 0.9), (12, 0.4)):
        life = f'"goodput/share": {share}, "goodput/life_s": 7200.0, "goodput/starts": 3.0'
        lines = lines.replace(f'{{"step": {step}, "loss', f'{{"step": {step}, {life}, "loss')
    (measured / "metrics.jsonl").write_text(lines, encoding="utf-8")
    runs = {run["name"]: run for run in summary_of([measured, old])["runs"]}
    assert runs["measured"]["goodput"] == {"life_s": 7200.0, "share": 0.4, "starts": 3}
    assert runs["old"]["goodput"] is None
    write_report([measured, old], tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text("utf-8")
    rows = page[page.index("first start to last step") :]
    assert all(value in rows for value in ("<td>2 h 0 min</td>", "<td>40.0 %</td>", "<td>3</td>"))


def test_sft_has_no_traces(make_run: MakeRun):
    (run,) = summary_of([make_run("sft", "sft")])["runs"]
    assert run["scheme"] is None
    for key in ("reward", "baseline", "trace_tokens", "finish_shares"):
        assert run[key] is None
    assert "generate" not in run["seconds"]


def test_problems(make_run: MakeRun):
    few = make_run("few", evaluation={"examples": 32})
    many = make_run("many")
    unknown = make_run("unknown", data={"eval_path": "/eval.jsonl"})
    assert summary_of([few])["problems"] == 32
    assert summary_of([few, many])["problems"] is None
    assert summary_of([unknown])["problems"] is None


def test_runs_are_told_apart_by_their_names(make_run: MakeRun):
    runs = [make_run("a/nrt"), make_run("b/nrt"), make_run("b/gm", objective={"scheme": "gm"})]
    summary = summary_of(runs)
    assert [run["name"] for run in summary["runs"]] == ["a/nrt", "b/nrt", "b/gm"]
    assert [run["label"] for run in summary["runs"]] == [
        "NRT-WS(−log p) · a/nrt",
        "NRT-WS(−log p) · b/nrt",
        "NRT-GM",
    ]


def test_a_value_that_is_not_finite_is_null(make_run: MakeRun, tmp_path: Path):
    run = make_run("nrt")
    text = (run / "metrics.jsonl").read_text("utf-8")
    broken = text.replace('"trace/tokens": 12.0', '"trace/tokens": NaN')
    assert broken != text
    (run / "metrics.jsonl").write_text(broken, encoding="utf-8")
    write_report([run], tmp_path / "out")

    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "out" / "summary.json").read_text("utf-8")
    summary = json.loads(text, parse_constant=refuse)
    assert summary["runs"][0]["trace_tokens"] == {"first": 3.0, "last": None}


def test_the_terminal_shows_the_table(
    make_run: MakeRun, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    runs = [make_run("sft", "sft", 0.125, 0.5), make_run("nrt")]
    write_report(runs, tmp_path / "out")
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == (
        "Exact match on 200 held-out problems: base 25.0 % (12.5 % without a trace), "
        "SFT 50.0 %, NRT 95.0 %"
    )
    sft = "SFT 12.5 % → 50.0 % – – 1.70 → 1.00 16.0 s"
    assert lines[3].split() == sft.split()
    nrt = "NRT-WS(−log p) 25.0 % → 95.0 % 0.300 → 1.00 3.00 → 10.0 1.70 → 1.00 40.0 s"
    assert lines[4].split() == nrt.split()


def test_numbers_read_well():
    assert percent(0.12345) == "12.3 %"
    assert [number(x) for x in (None, 0.0, 0.012345, 1.0, 96.04, 123.4, 4096.0, -2.5)] == [
        "–", "0", "0.0123", "1.00", "96.0", "123", "4,096", "-2.50",
    ]  # fmt: skip
    assert arrow({"first": 1.0, "last": None}) == "1.00 → –"
    assert [duration(x) for x in (0.04, 59.6, 61.0, 3600.0, 5400.0)] == [
        "0.0 s", "59.6 s", "1 min 1 s", "1 h 0 min", "1 h 30 min",
    ]  # fmt: skip


def warmup_line(update: int, of: int) -> dict[str, float]:
    return {
        "step": update - of,
        "warmup/update": update,
        "warmup/loss": 10.0 - update,
        "warmup/start_logprob": -2.0,
        "warmup/end_logprob": -3.0,
        "warmup/trace_logprob": -4.0,
        "warmup/answer_logprob": -1.0,
        "warmup/rows": 8.0,
        "warmup/answer_tokens": 100.0,
        "time/warmup_s": 3.0,
    }


def test_a_warmup_counts_among_what_was_seen(make_run: MakeRun):
    warmup = {"train": "all", "rows": {"updates": 1}, "all": {"updates": 2}}
    run = make_run("warm", warmup=warmup)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        if "loss/total" in row:
            row["data/answer_tokens"] = 50.0
    first = evaluation_line(-3, 0.125)
    write_lines(run / "metrics.jsonl", [first, *(warmup_line(u, 3) for u in (1, 2, 3)), *rows])
    write_lines(run / "samples.jsonl", [sample(-3, "nrt"), sample(0, "nrt"), sample(12, "nrt")])
    (found,) = summary_of([run])["runs"]
    assert found["exact_match"]["first"] == 0.125
    assert found["pairs_seen"] == 12 * 32 + 3 * 8
    assert found["answer_tokens_seen"] == 12 * 50 + 3 * 100
    assert found["warmup"]["updates"] == 3
    assert found["warmup"]["pairs"] == 24
    assert found["warmup"]["answer_tokens"] == 300
    assert found["warmup"]["loss"] == {"first": 8.0, "last": 8.0}
    assert found["seconds"]["warmup"] == 9.0


def test_a_run_without_a_warmup(make_run: MakeRun):
    (found,) = summary_of([make_run("cold")])["runs"]
    assert found["warmup"] is None
    assert found["answer_tokens_seen"] is None
    assert "warmup" not in found["seconds"]
