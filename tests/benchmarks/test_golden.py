"""Comparing recordings: what counts as a difference, and what a renames file takes away."""

import copy
import math

import pytest

from tests.benchmarks.scripts import load

golden = load("golden_compare")
RECORDING = {
    "about": {"machine": {"cpu": "a"}, "schema_sha256": "0"},
    "sections": {
        "schema": {"train.steps": {"default": 100}, "train.packing": {"default": True}},
        "config": {
            "nrt.yaml": {
                "status": 0,
                "values": {"train.steps": 30, "train.packing": True, "objective.scheme": "gm"},
                "error": "",
            }
        },
        "metrics/nrt": [
            {"step": 1, "loss/trace": 0.5, "batch/shapes": 1.0},
            {"step": 2, "loss/trace": 0.25, "batch/shapes": 2.0},
        ],
        "metrics/gsm8k": {"skipped": "no data"},
        "padding": {"nrt": {"batch/shapes": 1.5}, "gsm8k": {}},
        "http": {"chat": {"status": 404, "body": {"message": "no model 'x' here"}}},
    },
}


def changed(**sections):
    after = copy.deepcopy(RECORDING)
    for name, value in sections.items():
        after["sections"][name.replace("__", "/")] = value
    return after


def renames(tmp_path, text):
    file = tmp_path / "renames.yaml"
    file.write_text(text)
    return golden.read_renames(file)


def test_the_same(capsys):
    assert golden.compare(RECORDING, copy.deepcopy(RECORDING)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "same       metrics/nrt: 6 values" in lines
    assert "skipped    metrics/gsm8k: no data" in lines
    assert len(lines) == len(RECORDING["sections"])


def test_every_difference_is_named(capsys):
    rows = [RECORDING["sections"]["metrics/nrt"][0], {"step": 2, "loss/trace": 0.25, "new": 1.0}]
    assert golden.compare(RECORDING, changed(metrics__nrt=rows)) == 2
    out = capsys.readouterr().out
    assert "DIFFERENT  metrics/nrt: 2 of 6 values" in out
    assert "    [1] › batch/shapes: 2.0 → nothing\n" in out
    assert "    [1] › new: nothing → 1.0\n" in out


def test_most_twenty_are_printed(capsys):
    before, after = changed(data=list(range(50))), changed(data=list(range(1, 51)))
    assert golden.compare(before, after) == 50
    out = capsys.readouterr().out
    assert out.count(" → ") == 20
    assert "    and 30 more\n" in out


@pytest.mark.parametrize(
    ("before", "after"),
    [(0.0, -0.0), (1, 1.0), (True, 1), ("", None), (0.1, 0.1 + 2**-56), ([1], [1, 2]), ({}, [])],
)
def test_exact(before, after):
    assert list(golden.differences(before, after))
    assert not list(golden.differences(before, copy.deepcopy(before)))


def test_nan_is_nan():
    assert not list(golden.differences(math.nan, math.nan))
    assert list(golden.differences(math.nan, 1.0, tolerance=0.1))


def test_tolerance_is_for_metrics_alone():
    near = 0.5 * (1 + 1e-7)
    rows = copy.deepcopy(RECORDING["sections"]["metrics/nrt"])
    rows[0]["loss/trace"] = near
    assert golden.compare(RECORDING, changed(metrics__nrt=rows)) == 1
    assert golden.compare(RECORDING, changed(metrics__nrt=rows), tolerance=1e-6) == 0
    assert golden.compare(RECORDING, changed(metrics__nrt=rows), tolerance=1e-8) == 1
    assert golden.compare(changed(data=[0.5]), changed(data=[near]), tolerance=1e-6) == 1


def test_a_section_in_one_recording_is_a_difference(capsys):
    assert golden.compare(RECORDING, changed(data=["row 0"])) == 1
    assert golden.compare(changed(data=["row 0"]), RECORDING) == 1
    assert "DIFFERENT  data" in capsys.readouterr().out
    assert golden.compare(RECORDING, changed(metrics__gsm8k=[{"step": 1}])) == 1


def test_another_machine_is_noted(capsys):
    other = copy.deepcopy(RECORDING)
    other["about"]["machine"] = {"cpu": "b"}
    assert golden.compare(RECORDING, other) == 0
    assert "note: machine differs" in capsys.readouterr().out


def test_renamed_metrics(tmp_path):
    after = changed(
        metrics__nrt=[
            {"step": 1, "loss/policy": 0.5, "loss/value": 0.0},
            {"step": 2, "loss/policy": 0.25, "loss/value": 0.0},
        ],
        padding={"nrt": {}, "gsm8k": {}},
    )
    names = "metrics: {loss/trace: loss/policy, batch/: null}\n"
    assert golden.compare(RECORDING, after, renames(tmp_path, names)) == 2
    names += "added: {metrics: [loss/value]}"
    assert golden.compare(RECORDING, after, renames(tmp_path, names)) == 0
    assert golden.compare(RECORDING, RECORDING, renames(tmp_path, names)) > 0


def test_renamed_config_keys(tmp_path):
    after = changed(
        schema={"run.steps": {"default": 100}, "run.new": {"default": 1}},
        config={
            "nrt.yaml": {
                "status": 0,
                "values": {"run.steps": 30, "run.new": 1, "loss.name": "gm"},
                "error": "",
            }
        },
    )
    text = "config: {train: run, train.packing: null, objective.scheme: loss.name}\n"
    assert golden.compare(RECORDING, after, renames(tmp_path, text)) == 2
    text += "added: {config: [run.new]}"
    assert golden.compare(RECORDING, after, renames(tmp_path, text)) == 0


def test_added_names_that_were_there_still_count(tmp_path):
    rows = copy.deepcopy(RECORDING["sections"]["metrics/nrt"])
    rows[0]["loss/trace"] = 0.75
    named = renames(tmp_path, "added: {metrics: [loss/trace]}")
    assert golden.compare(RECORDING, changed(metrics__nrt=rows), named) == 1


def test_renamed_texts_are_those_of_messages(tmp_path):
    body = {"message": "there is no model 'x'"}
    after = changed(http={"chat": {"status": 404, "body": body}})
    named = renames(tmp_path, "texts: {no model 'x' here: there is no model 'x', gm: am}")
    assert golden.compare(RECORDING, after) == 1
    assert golden.compare(RECORDING, after, named) == 0


def test_times_keep_out_under_new_names(tmp_path):
    named = renames(tmp_path, "metrics: {time/: seconds/, speed/programs: engine/programs}")
    timing = ["time/data_s", "seconds/data_s", "engine/programs", "weights/seconds"]
    assert all(map(named.is_timing, timing))
    assert not any(map(named.is_timing, ["loss/total", "weights/bytes"]))


def test_a_renames_file_has_known_parts(tmp_path):
    assert renames(tmp_path, "# nothing yet\nmetrics:\n") == golden.Renames()
    for text in ("metric: {}", "added: {texts: [a]}"):
        with pytest.raises(SystemExit, match="unknown; there are"):
            renames(tmp_path, text)


def test_long_values_are_shown_where_they_differ(capsys):
    texts = ["a" * 500 + end + "b" * 500 for end in ("1", "2")]
    golden.compare(changed(data=texts[:1]), changed(data=texts[1:]))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if " → " in line]
    assert "a1b" in line
    assert "a2b" in line
    assert len(line) < 250


def test_an_export_may_have_a_new_file(tmp_path):
    before = changed(export={"fp32": {"config.json": "{}"}})
    after = changed(export={"fp32": {"config.json": "{}", "more.json": "[]"}})
    named = renames(tmp_path, "added: {export: [more.json]}")
    assert golden.compare(before, after) == 1
    assert golden.compare(before, after, named) == 0
