"""The figures of benchmarks/real_model.py: paired changes, shares with intervals, the course."""

import json

import pytest

from tests.benchmarks.scripts import load

REAL_MODEL = load("real_model")
CHANGES = {"direct": 0.0, "empty": 0.1, "own": 0.5, "shuffled": -0.2}


def diagnosis(shift: float) -> str:
    """A diagnosis of two questions whose logprobs are those of the start plus CHANGES * shift."""
    by_question = {c: [-1.0 + by * shift, -3.0 + 2 * by * shift] for c, by in CHANGES.items()}
    figures = {f"logprob/{c}": {"value": -2.0, "low": -2.5, "high": -1.5} for c in CHANGES}
    figures |= {
        f"logprob/own_minus_{c}": {"value": 0.25, "low": 0.125, "high": 0.375}
        for c in ("empty", "shuffled")
    }
    for name, value in (("empty_share", 0.25), ("tokens", 31.0), ("entropy", 1.5)):
        figures[f"trace/{name}"] = {"value": value, "low": None, "high": None}
    return json.dumps({"figures": figures, "by_question": by_question})


@pytest.fixture
def folder(tmp_path):
    for name, shift in (("before", 0.0), ("nrt", 1.0)):
        (tmp_path / f"{name}.json").write_text(diagnosis(shift))
    rows = {
        "cold": [{"step": 0, "eval/exact_match": 0.02}],
        "sft": [{"step": 0, "eval/exact_match": 0.04}],
        "nrt": [
            {"step": -4, "eval/exact_match": 0.02, "time/evaluation_s": 60.0},
            *(
                {"step": step, "trace/tokens": 10.0 * step, "policy/entropy": 2.0}
                | {"time/update_s": 30.0, "time/compile_s": 5.0}
                for step in range(1, 7)
            ),
            {"step": 6, "eval/exact_match": 0.1},
        ],
    }
    for name, lines in rows.items():
        (tmp_path / name).mkdir()
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "metrics.jsonl").write_text(text)
    return tmp_path


def test_a_row_by_hand(folder):
    row = REAL_MODEL.row(folder, "nrt")
    assert (row["non_empty_percent"], row["tokens"], row["own"]) == (75, 31, -2)
    # The two questions rise by 0.5 and 1: mean 0.75, s = 0.35355, t = 12.706 with one degree.
    assert row["own_change"] == pytest.approx(0.75)
    assert row["own_change_low"] == pytest.approx(0.75 - 12.7062 * 0.25, rel=1e-4)
    assert row["own_minus_shuffled_high"] == 0.375
    # Steps 1 to 4 and 3 to 6 of 10 tokens per step; the compilation is inside the update.
    assert (row["tokens_first"], row["tokens_last"], row["minutes"]) == (25, 45, 4)
    # Wilson's interval of 20 of 200.
    ends = (row["accuracy"], row["accuracy_low"], row["accuracy_high"])
    assert ends == pytest.approx((10, 6.57, 14.94), abs=0.01)
    models, courses = REAL_MODEL.tables({"nrt": row}).split("\n\n")
    assert "| 75 % | 31.0 | 1.50 | -2.00 " in models.splitlines()[-1]
    assert courses.splitlines()[-1].endswith("| 25.0 → 45.0 | 2.00 → 2.00 |")
    for table in (models, courses):
        assert len({line.count("|") for line in table.splitlines()}) == 1


def test_the_untrained_model_is_judged_with_and_without_a_trace(folder):
    row = REAL_MODEL.row(folder, "before")
    assert (row["accuracy"], row["accuracy_direct"]) == (2, 4)
    assert row["own_change"] == row["own_change_low"] == 0


def test_a_row_that_is_not_whole_is_left_out(folder):
    assert [n for n in REAL_MODEL.TITLES if REAL_MODEL.is_whole(folder, n)] == ["before", "nrt"]
    (folder / "sft" / "metrics.jsonl").unlink()
    assert [n for n in REAL_MODEL.TITLES if REAL_MODEL.is_whole(folder, n)] == ["nrt"]


def test_a_run_is_finished_when_its_last_step_was_evaluated(folder):
    assert REAL_MODEL.finished(folder / "nrt")
    assert not REAL_MODEL.finished(folder / "cold")
    assert not REAL_MODEL.finished(folder / "none")


def test_the_final_answer_alone(tmp_path):
    data = tmp_path / "train.jsonl"
    data.write_text(json.dumps({"question": "1 + 1?", "answer": "1 + 1 = 2\n#### 2"}) + "\n")
    out = REAL_MODEL.final_answers(data, tmp_path / "final.jsonl")
    assert json.loads(out.read_text()) == {"question": "1 + 1?", "answer": "2"}
