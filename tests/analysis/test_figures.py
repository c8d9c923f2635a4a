"""The figures of the paper, from made-up records whose figures are worked out by hand."""

import csv
import json
import math
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nrt_jax.analysis.case_study import choose_case, probability_text
from nrt_jax.analysis.drawing import panel_svg
from nrt_jax.analysis.gain_table import estimate_text, gain_rows
from nrt_jax.analysis.report import write_report
from nrt_jax.analysis.run_records import read_runs
from nrt_jax.analysis.score_table import score_table
from nrt_jax.analysis.seeds import SeedGroup, facets, group_by_seed
from nrt_jax.analysis.token_gains import (
    Baseline,
    baseline_of,
    bin_edges,
    ratio_per_bin,
    token_gains_drawing,
)
from nrt_jax.analysis.token_view import STRONGEST, token_lines
from nrt_jax.analysis.words import count_words, word_use
from nrt_jax.errors import InputError
from nrt_jax.evaluation.reference_log import REFERENCES, ReferenceRow, write_references
from tests.analysis.browser import find_chromium, open_browser
from tests.analysis.conftest import MakeRun


def reference(row: int = 0, p: float = 0.5, base: float | None = 0.25, **changes) -> ReferenceRow:
    """A question whose answer has three tokens of probability p, and of `base` without a trace."""
    tokens = changes.get("tokens", [5, 6, 2])
    every = np.ones(len(tokens))
    values = {
        "row": row,
        "source": "",
        "question": f"How many in {row}?",
        "reference": "two cats",
        "trace": "let us think" if base else None,
        "trace_end": "<|think_end|>" if base else None,
        "answer": "two cats",
        "correct": True,
        "tokens": tokens,
        "texts": ["two", " cats", "<|eos|>"],
        "logprobs": np.log(p) * every,
        "entropies": every,
        "direct_logprobs": np.log(0.25) * every,
        "empty_logprobs": np.log(base) * every if base else None,
        "shuffled_logprobs": np.log(0.2) * every if base else None,
        "weights": np.resize([1.0, 2.0, 0.0], len(tokens)) if base else None,
    }
    return ReferenceRow(**values | changes)


@pytest.fixture
def runs(make_run: MakeRun) -> dict[str, Path]:
    """SFT and two seeds of NRT, with the tokens of two questions."""
    found = {
        "sft": make_run("sft", "sft", after=0.5),
        "nrt0": make_run("nrt0", after=0.9, seed=0),
        "nrt1": make_run("nrt1", after=0.8, seed=1),
    }
    for name, p in {"sft": 0.25, "nrt0": 0.5, "nrt1": 0.4}.items():
        base = None if name == "sft" else 0.25
        rows = [reference(7, p, base), reference(8, p / 2, base)]
        write_references(found[name] / REFERENCES, 12, rows)
    return found


def groups_of(runs: dict[str, Path]) -> list[SeedGroup]:
    return group_by_seed(read_runs(list(runs.values())))


# --- Table 3 -------------------------------------------------------------------------------------


def test_best_and_second_of_each_model_are_marked(make_run: MakeRun):
    llama, mistral = ({"path": f"/models/{name}", "dtype": "float32"} for name in ("l", "m"))
    paths = [
        make_run("a", "sft", after=0.5, model=llama),
        *(make_run(f"b{s}", after=0.6 + 0.1 * s, model=llama, seed=s) for s in (0, 1)),
        make_run("c", after=0.7, model=llama, objective={"scheme": "gm"}),
        make_run("d", "sft", after=0.9, model=mistral),
    ]
    table = score_table(group_by_seed(read_runs(paths)))
    assert table.columns == ["chain_addition, held out"]
    first, second = table.blocks
    cells = {label: score for label, (score,) in first.rows}
    assert {label: score.mark for label, score in cells.items()} == {
        "SFT": "",
        "NRT-WS(−log p)": "second",
        "NRT-GM": "best",
    }
    # 65 ± t s / sqrt(n) with t = 12.706 and s = 7.071 of two seeds.
    score = cells["NRT-WS(−log p)"]
    assert (score.value, score.seeds) == ("65.0", 2)
    assert score.interval == "1.5 to 128.5"
    assert cells["NRT-GM"].interval == ""
    # One method alone is neither best nor second.
    assert (second.model, second.rows[0][1][0].mark) == ("m", "")
    assert list(facets(group_by_seed(read_runs(paths)))) == ["l", "m"]


# --- Fig. 3 --------------------------------------------------------------------------------------


def test_ratio_is_of_means_and_needs_enough_tokens():
    """Ten tokens of entropy 0.1 whose P goes from 0.2 to 0.3, and one of entropy 0.9."""
    tokens = list(range(11))
    entropies = np.asarray([0.1] * 10 + [0.9])
    sft = np.log([0.1] * 5 + [0.3] * 5 + [0.5])
    base = reference(tokens=tokens, entropies=entropies, logprobs=sft)
    own = reference(tokens=tokens, logprobs=np.log([0.2] * 5 + [0.4] * 5 + [0.9]))
    other = reference(tokens=tokens, row=1, logprobs=sft)
    ratio, counts = ratio_per_bin([own, other], baseline_of([[base]]), np.asarray([0, 0.5, 1]))
    assert counts.tolist() == [10, 1]
    assert ratio[0] == pytest.approx(0.3 / 0.2)
    assert math.isnan(ratio[1])


def test_sft_is_the_mean_of_its_seeds_on_common_questions():
    seeds = [
        [reference(0, entropies=np.ones(3)), reference(1)],
        [reference(0, 0.125, entropies=3 * np.ones(3))],
    ]
    baseline = baseline_of(seeds)
    (key,) = baseline.entropies
    assert key[1] == 0
    assert baseline.entropies[key].tolist() == [2, 2, 2]
    assert np.exp(baseline.logprobs[key]) == pytest.approx([0.25] * 3)
    assert baseline_of([]) == Baseline({}, {})


@pytest.mark.parametrize(("largest", "width"), [(0.1, 0.02), (0.0, 0.02), (4.9, 0.5), (30.0, 1.0)])
def test_bins_cover_the_largest_entropy(largest: float, width: float):
    edges = bin_edges(largest)
    assert edges[1] == pytest.approx(width)
    assert edges[0] == 0
    assert edges[-1] >= largest


def test_100_000_tokens_take_under_10_seconds(make_run: MakeRun):
    random = np.random.default_rng(0)
    groups = []
    for group in groups_of({name: make_run(name, name) for name in ("sft", "nrt")}):
        rows = [
            reference(
                row,
                tokens=list(range(200)),
                entropies=random.exponential(0.5, 200),
                logprobs=-random.exponential(0.5, 200),
            )
            for row in range(500)
        ]
        record = replace(group.records[0], references=rows)
        groups.append(replace(group, records=(record,)))
    start = time.process_time()
    drawing = token_gains_drawing(groups)
    assert drawing is not None
    for panel in drawing.panels:
        panel_svg(drawing, panel)
    assert time.process_time() - start < 10
    bins = {row[1]: row[3] for row in drawing.rows[1:]}
    assert sum(bins.values()) == 100_000


# --- Fig. 4 --------------------------------------------------------------------------------------


def test_words_are_counted_in_small_letters():
    assert count_words(["Let's let 12 boxed{12}", "x_y"]) == {
        "let's": 1,
        "let": 1,
        "12": 2,
        "boxed": 1,
        "x": 1,
        "y": 1,
    }


def test_a_word_that_traces_use_more_comes_first():
    used = word_use(count_words(["think " * 30 + "cat " * 10]), count_words(["cat " * 40]))
    (first, last) = used
    assert (first.word, first.in_traces, first.in_references) == ("think", 30, 0)
    assert (last.word, last.in_traces, last.in_references) == ("cat", 10, 40)
    # Prior: 500 words, 30 / 80 of them "think".
    think, cat = 187.5, 312.5
    log_odds = math.log((30 + think) / (10 + cat)) - math.log(think / (40 + cat))
    assert first.log_odds == pytest.approx(log_odds)
    assert first.z == pytest.approx(log_odds / math.sqrt(1 / (30 + think) + 1 / think))
    assert last.z == pytest.approx(-log_odds / math.sqrt(1 / (10 + cat) + 1 / (40 + cat)), rel=1e-9)


# --- Tables 9 and 10, and the tokens -------------------------------------------------------------


def test_the_question_is_chosen_by_row_by_text_or_by_difference(runs: dict[str, Path]):
    groups = groups_of(runs)
    for question, row in (("8", 8), ("many in 7", 7), (None, 7)):
        case = choose_case(groups, question)
        assert case is not None
        assert [asked.label for asked in case.asked] == ["SFT", "NRT-WS(−log p)"]
        assert [asked.row.row for asked in case.asked] == [row, row]
    sft, nrt = case.asked
    assert (sft.probability, nrt.probability) == pytest.approx((1 / 64, 1 / 8))
    assert nrt.per_token == pytest.approx(0.5)
    assert nrt.gain(nrt.row.empty_logprobs) == pytest.approx(math.log(2))
    assert sft.gain(sft.row.empty_logprobs) is None
    assert probability_text(nrt.probability) == "0.125"
    assert probability_text(3.2e-5) == "3.2e-05"


def test_a_question_that_no_run_was_asked(runs: dict[str, Path], make_run: MakeRun, tmp_path: Path):
    wrong = r"--question Where: no run was asked it; .* such as \d for 'How many in \d\?'"
    with pytest.raises(InputError, match=wrong) as told:
        write_report(list(runs.values()), tmp_path / "out", question="Where")
    assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=r"no run has references/ .*evaluation\.reference_rows"):
        write_report([make_run("old")], tmp_path / "out", question="7")


def test_tokens_are_marked_by_what_they_lack_and_weigh():
    base, own, weight = token_lines(reference(p=0.75))
    assert (base.name, own.name, weight.name) == ("c_base", "c", "weight")
    assert base.values == pytest.approx([0.25] * 3)
    assert base.strengths == pytest.approx([0.75 * STRONGEST] * 3)
    assert own.strengths == pytest.approx([0.25 * STRONGEST] * 3)
    assert weight.strengths == pytest.approx([STRONGEST / 2, STRONGEST, 0])
    assert [line.name for line in token_lines(reference(base=None))] == ["c"]


def test_gains_have_intervals_over_seeds_or_questions(runs: dict[str, Path]):
    both = gain_rows(groups_of(runs))
    (row,) = both
    assert row.over == "2 seeds"
    # log 2 and log 1.6 on one question, log 2 less on the other.
    own = [math.log(2) - math.log(2) / 2, math.log(1.6) - math.log(2) / 2]
    assert row.own.value == pytest.approx(np.mean(own))
    assert row.difference is not None
    assert row.difference.value == pytest.approx(np.mean(own) + math.log(1.25))
    (alone,) = gain_rows(groups_of({"nrt0": runs["nrt0"]}))
    assert alone.over == "2 questions"
    assert estimate_text(alone.own).startswith("+0.347 (−4.057 to +4.750)")


# --- the whole -----------------------------------------------------------------------------------


def test_every_figure_is_in_files_and_on_the_page(runs: dict[str, Path], tmp_path: Path):
    for step, quality in ((0, 0.5), (12, 0.75)):
        folder = runs["nrt0"] / "judged" / str(step)
        folder.mkdir(parents=True)
        content = json.dumps({"step": step, "quality": quality})
        (folder / "judge.json").write_text(content, encoding="utf-8")
    write_report(list(runs.values()), tmp_path)
    names = ("scores", "curves", "dynamics", "words_1", "question", "tokens", "token_gains")
    for name in names:
        assert (tmp_path / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / f"{name}.svg").read_text("utf-8")
        rows = list(csv.reader((tmp_path / f"{name}.csv").open(encoding="utf-8")))
        assert len({len(row) for row in rows}) == 1
        assert len(rows) > 1
    quality = (tmp_path / "dynamics.csv").read_text("utf-8")
    assert ",NRT-WS(−log p),judge/quality,12,0.75,0.75,0.75,1" in quality
    html = (tmp_path / "report.html").read_text("utf-8")
    assert "How many in 7?" in html
    assert "kept no tokens" not in html


def test_what_older_records_lack_is_said(make_run: MakeRun, tmp_path: Path, caplog):
    write_report([make_run("old")], tmp_path / "out")
    html = (tmp_path / "out" / "report.html").read_text("utf-8")
    assert "old kept no tokens of reference answers after the last step" in html
    assert "One question under every model" not in html
    assert sum("kept no tokens" in line for line in caplog.messages) == 1
    run = make_run("judged")
    (run / "judged" / "12").mkdir(parents=True)
    (run / "judged" / "12" / "judge.json").write_text('{"quality": 0.5}', encoding="utf-8")
    with pytest.raises(InputError, match=r"judge\.json: has no step and quality"):
        read_runs([run])


def test_unfinished_cells_of_a_sweep_are_left_out(make_run: MakeRun, caplog):
    done, begun = make_run("done"), make_run("begun")
    lines = (begun / "metrics.jsonl").read_text("utf-8").splitlines()[:5]
    (begun / "metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    assert [r.name for r in read_runs([done, begun], cells=[done, begun])] == ["done"]
    assert "left out" in caplog.text
    with pytest.raises(InputError, match="stopped at step 4 of 12"):
        read_runs([done, begun])
    with pytest.raises(InputError, match="none of its 1 runs is finished"):
        read_runs([begun], cells=[begun])


@pytest.mark.slow
def test_the_page_fits_a_window_and_a_phone(runs: dict[str, Path], tmp_path: Path):
    """Nothing reaches over the edge, nothing moves while it loads, and nothing else is loaded."""
    program = find_chromium()
    if program is None:
        pytest.skip("no Chromium; name one in NRT_JAX_CHROMIUM")
    write_report(list(runs.values()), tmp_path)
    with open_browser(program) as browser:
        for width in (1280, 390):
            browser.open(tmp_path / "report.html", width)
            assert browser.evaluate("document.documentElement.scrollWidth") == width
            assert browser.evaluate("window.shift") == 0
            assert browser.evaluate("performance.getEntriesByType('resource').length") == 0
            smallest = browser.evaluate(
                "Math.min(...[...document.querySelectorAll('.panel svg')]"
                ".map((svg) => svg.getBoundingClientRect().width))"
            )
            assert smallest > 300
