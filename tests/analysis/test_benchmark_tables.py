"""Tables of benchmarks: figures by hand, the paper's rows, every format, known intervals."""

import csv
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest

from nrt_jax.analysis.benchmark_report import differences, read_evaluations
from nrt_jax.analysis.benchmark_tables import (
    as_csv,
    as_latex,
    comparison,
    detailed,
    tables,
    text_tables,
    write_tables,
)
from nrt_jax.analysis.bootstrap import compare, interval
from nrt_jax.analysis.paper_table import find_base, paper_table
from nrt_jax.analysis.report import write_report
from nrt_jax.errors import InputError
from nrt_jax.evaluation.results import DocumentScore, SuiteResult, summarise, write_results
from nrt_jax.evaluation.tasks import BENCHMARKS
from tests.analysis.conftest import MakeRun
from tests.analysis.test_report import Page


def scores_of(task: str, values: list[float], **more: int) -> list[DocumentScore]:
    return [
        DocumentScore(task=task, document=f"{i:04}", score=value, **more)
        for i, value in enumerate(values)
    ]


def suite_of(scores: list[DocumentScore], model: str = "tiny", **more) -> SuiteResult:
    rows = [
        summarise(
            task=task,
            title=BENCHMARKS[task].title,
            metric=BENCHMARKS[task].metric,
            average=BENCHMARKS[task].average,
            headline=BENCHMARKS[task].headline,
            scores=[score for score in scores if score.task == task],
        )
        for task in dict.fromkeys(score.task for score in scores)
    ]
    more = {"settings": "s", "limit": None} | more
    return SuiteResult(model=model, tasks=tuple(rows), **more)


GSM8K = scores_of("gsm8k", [1.0, 1.0, 0.0, 0.0], unclosed=1, trace_tokens=30, answer_tokens=5)
MC2 = scores_of("truthfulqa", [0.5, 0.7], answers=0)
VARIANT = scores_of("ifeval_pass10", [1.0])


def test_the_detailed_table_by_hand():
    table = detailed(suite_of([*GSM8K, *MC2, *VARIANT], limit=4))
    assert table.title == "tiny, 4 documents per task"
    assert table.rows == [
        ("GSM8K", "exact_match", "50.0 ± 28.9", "4", "4 (100.0 %)", "0 (0.0 %)", "30.0", "5.00"),
        ("TQA", "mc2", "60.0 ± 10.0", "2", "–", "–", "–", "–"),
        ("Overall", "mean of 2", "55.0 ± 15.3", "6", "4 (100.0 %)", "0 (0.0 %)", "", ""),
        *[("IFEval pass@10 (variant)", "pass@10", "100.0", "1", *["0 (0.0 %)"] * 2, "0", "0")],
    ]
    assert "without BBH, MMLU, DROP, PopQA, MATH, HEval, IFEval." in table.notes[1]
    parts = "GSM8K 4 of 1,319, TQA 2 of 817, IFEval pass@10 1 of 541."
    assert table.notes[2] == f"Documents of the whole benchmark: {parts}"


def test_the_papers_table_is_typed_right():
    table = paper_table()
    assert {base: len(rows) for base, rows in table.items()} == {
        "Llama-3.2-3B": 7,
        "Mistral-7B-v0.3": 7,
        "Llama-3.1-8B": 7,
    }
    for row in table["Mistral-7B-v0.3"]:
        assert row.overall == pytest.approx(row.printed_overall, abs=0.0005)
    # Of the Llama models each printed Overall is 1.6 to 2.8 points above the mean.
    for base in ("Llama-3.2-3B", "Llama-3.1-8B"):
        above = [row.printed_overall - row.overall for row in table[base]]
        assert 0.016 < min(above) < max(above) < 0.028
    best = table["Llama-3.1-8B"][-1]
    assert best.method == "NRT-WS(−log p)"
    assert best.scores["gsm8k"] == 0.76
    assert best.scores["bbh"] == 0.51
    assert table["Llama-3.2-3B"][0].scores["ifeval"] == 0.463
    assert table["Mistral-7B-v0.3"][5].scores["truthfulqa"] == 0.543
    assert tuple(best.scores) == tuple(name for name, row in BENCHMARKS.items() if row.headline)


def test_the_base_is_found_by_name():
    assert find_base(None, "models/meta-llama/LLAMA-3.1-8b/") == "Llama-3.1-8B"
    assert find_base("runs/x", "tiny") is None


def test_the_comparison_has_the_papers_rows():
    table = comparison([suite_of([*GSM8K, *MC2], base="/m/Mistral-7B-v0.3")])
    assert table.head[1:4] == ("TQA", "GSM8K", "Overall")
    assert table.rows[0] == ("tiny", "60.0", "50.0", "55.0", "4 (100.0 %)", "0 (0.0 %)", "–")
    sft = ("SFT, paper, Mistral-7B-v0.3", "47.4", "30.0", "38.7", "–", "–", "40.0")
    assert table.rows[1] == sft
    assert len(table.rows) == 8
    assert "not for both Llama models: for SFT" in table.notes[1]


def test_a_model_without_a_task_has_no_overall_in_the_comparison():
    found = comparison([suite_of([*GSM8K, *MC2], "a"), suite_of(GSM8K, "b")])
    assert found.rows[1][:4] == ("b", "–", "50.0", "–")
    assert "as printed" not in found.head[-1]
    assert len(tables([suite_of(GSM8K)])) == 1


def test_csv_has_unrounded_scores():
    suite = suite_of([*GSM8K, *MC2], base="llama-3.2-3b")
    rows = list(csv.DictReader(io.StringIO(as_csv([suite]))))
    assert float(rows[0]["stderr"]) == math.sqrt(1 / 12)
    assert (rows[0]["unclosed"], rows[0]["headline"], rows[1]["mean_trace_tokens"]) == (
        *("4", "True"),
        "",
    )
    assert (rows[2]["task"], rows[2]["score"]) == ("overall", str(suite.overall))
    assert len(rows) == 3 + 7 * 11


def test_latex_has_no_bare_special_characters():
    text = as_latex(tables([suite_of(GSM8K, r"a_b\c%", base="Llama-3.1-8B")]))
    body = [line for line in text.split("\n") if not line.startswith("%")]
    assert r"a\_b\textbackslash{}c\%" in "\n".join(body)
    assert r"50.0 $\pm$ 28.9" in text
    assert r"NRT-WS($-$log p)" in text
    for line in body:
        assert line.replace("\\%", "").count("%") == 0
    assert text.count("\\begin{tabular}") == text.count("\\end{tabular}") == 2


def test_the_page_escapes_and_loads_nothing(tmp_path: Path):
    write_tables([suite_of(GSM8K, "<script>alert(1)</script>")], tmp_path)
    html = (tmp_path / "results.html").read_text("utf-8")
    page = Page(html)
    assert not {"script", "link", "img"} & set(page.tags)
    assert "<script>alert(1)</script>" in page.text
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("results.csv", "results.html", "results.tex"),
    ]
    assert "50.0 ± 28.9" in text_tables([suite_of(GSM8K)])


# --- intervals -----------------------------------------------------------------------------------


def test_the_interval_of_many_documents_is_the_normal_one():
    rng = np.random.default_rng(1)
    scores = scores_of("gsm8k", list((rng.random(400) < 0.3).astype(float)))
    row = suite_of(scores).tasks[0]
    found = interval(row, scores)
    assert found.value == pytest.approx(row.value)
    assert row.stderr is not None
    assert found.low == pytest.approx(row.value - 1.96 * row.stderr, abs=0.006)
    assert found.high == pytest.approx(row.value + 1.96 * row.stderr, abs=0.006)


def test_pairing_takes_out_the_difficulty_of_the_documents():
    rng = np.random.default_rng(2)
    hard = rng.random(200)
    first = scores_of("gsm8k", [float(h < 0.5) for h in hard])
    # Right wherever the first is, and on a twentieth of the documents more.
    second = scores_of("gsm8k", [float(h < 0.55) for h in hard])
    (found,) = compare(suite_of(first).tasks, first, second)
    assert found.difference.value == pytest.approx(np.mean((hard >= 0.5) & (hard < 0.55)))
    assert found.difference.low > 0
    # Unpaired, the interval would be +-10 points.
    assert found.difference.high - found.difference.low < 0.08
    # In another order, and with documents that only one has answered.
    more = [*second[::-1], DocumentScore(task="gsm8k", document="9999", score=0.0)]
    assert compare(suite_of(first).tasks, first, more) == [found]


def test_a_mean_over_groups_is_resampled_within_them():
    # A group of one document that is right: in every resample it stays so.
    scores = [
        DocumentScore(task="math", group="a", document="0", score=1.0),
        *(
            DocumentScore(task="math", group="b", document=str(i), score=float(i % 2))
            for i in range(1, 101)
        ),
    ]
    row = suite_of(scores).tasks[0]
    found = interval(row, scores)
    assert found.value == row.value == 0.75
    assert 0.68 < found.low < 0.72


def test_overall_is_resampled_task_by_task():
    first = [*scores_of("gsm8k", [0.0, 1.0] * 50), *scores_of("drop", [0.0, 1.0] * 50)]
    second = [*scores_of("gsm8k", [1.0, 0.0] * 50), *scores_of("drop", [0.0, 1.0] * 50)]
    gsm8k, drop, overall = compare(suite_of(first).tasks, first, second)
    assert drop.difference == (0.0, 0.0, 0.0)
    assert gsm8k.difference.low < 0 < gsm8k.difference.high
    assert overall.difference.high == pytest.approx(gsm8k.difference.high / 2)
    # Two tasks with equal scores are drawn apart: their mean varies less than each.
    doubled = compare(
        suite_of(first).tasks, first, [*second[:100], *scores_of("drop", [1.0, 0.0] * 50)]
    )
    wide, other, both = (row.difference.high - row.difference.low for row in doubled)
    assert both < 0.85 * min(wide, other)


# --- report --------------------------------------------------------------------------------------


def folder(path: Path, scores: list[DocumentScore], model: str, **more) -> Path:
    write_results(path, suite_of(scores, model, **more), scores)
    return path


def test_a_report_of_evaluations_and_runs(tmp_path: Path, make_run: MakeRun, capsys):
    better = scores_of("gsm8k", [1.0, 1.0, 1.0, 0.0])
    first = folder(tmp_path / "a", [*GSM8K, *MC2], "sft")
    second = folder(tmp_path / "b", better, "nrt", settings="other")
    write_report([first, make_run("run"), second], tmp_path / "out")
    printed = capsys.readouterr().out
    page = Page((tmp_path / "out" / "report.html").read_text("utf-8"))
    for text in (
        "nrt less sft",
        "+25.0 [+0.0, +75.0]",
        "The two evaluations had different settings.",
    ):
        assert text in printed
        assert text in page.text
    assert "Exact match on" in printed
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        *("report.html", "summary.json", "curves.png", "benchmarks.csv", "benchmarks.tex"),
    }
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(summary["runs"]) == 1
    (found,) = summary["benchmarks"]["differences"]
    assert found["tasks"][0]["difference"] == 0.25
    assert summary["benchmarks"]["evaluations"][0]["tasks"][0]["unclosed"] == 4


def test_a_report_of_evaluations_alone(tmp_path: Path, capsys):
    first, second = (folder(tmp_path / name, GSM8K, "same") for name in "ab")
    write_report([first, second], tmp_path / "out")
    assert "curves.png" not in capsys.readouterr().out
    assert not (tmp_path / "out" / "curves.png").exists()
    names = [evaluation.suite.model for evaluation in read_evaluations([first, second])]
    assert names == [f"same ({first})", f"same ({second})"]


def test_folders_that_cannot_be_compared(tmp_path: Path):
    first = folder(tmp_path / "a", GSM8K, "sft")
    with pytest.raises(InputError, match="named 2 times"):
        read_evaluations([first, first])
    other = folder(tmp_path / "b", [*GSM8K, *MC2], "sft")
    (first / "scores.parquet").write_bytes((other / "scores.parquet").read_bytes())
    with pytest.raises(InputError, match="are of different evaluations"):
        read_evaluations([first])
    assert differences([]) == []
    unfinished = tmp_path / "c"
    unfinished.mkdir()
    (unfinished / "identity.json").write_text("{}")
    with pytest.raises(InputError, match=r"results.json: no such file; name a folder that"):
        write_report([other, unfinished], tmp_path / "out")
