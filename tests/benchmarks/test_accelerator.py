"""The script for one accelerator: what it judges and reports, and all of it with tiny sizes."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.accelerator import guarded
from benchmarks.accelerator_agreement import _judged
from benchmarks.accelerator_tables import markdown
from tests.conftest import REPOSITORY

REPORT = {
    "environment": {
        "device": "NVIDIA H100 80GB HBM3",
        "devices": 8,
        "platform": "gpu",
        "python": "3.12.1",
        "versions": {"jax": "0.12.0.1"},
        "runtime": "CUDA 13",
    },
    "measured": {"flops_per_s": 7e14, "bytes_per_s": 3e12},
    "tiny": False,
    "parts": {},
}


def test_an_error_above_the_largest_is_wrong():
    assert _judged("logits", 0.001, 0.001)["right"]
    assert not _judged("logits", 0.0011, 0.001)["right"]
    assert not _judged("logits", float("nan"), 0.001)["right"]


def test_a_part_that_fails_leaves_the_others():
    def fails():
        raise ValueError("no cuDNN\nmore lines")

    assert guarded(fails) == {"error": "ValueError: no cuDNN"}
    assert guarded(lambda: {"rows": []})["rows"] == []


def test_the_page_says_what_is_wrong_and_what_did_not_run():
    rows = [
        {"dtype": "float32", "through": "xla"} | _judged("logits", 0.5, 0.001),
        {"dtype": "float32", "through": "cudnn", "what": "not supported", "why": "no float32"},
    ]
    parts = {
        "agreement": {"rows": rows},
        "update": {"error": "ValueError: no memory"},
        "step": {"not_run": "480 s were over"},
    }
    page = markdown(REPORT | {"parts": parts})
    assert "# NVIDIA H100 80GB HBM3\n" in page
    assert "700 TFLOP/s" in page
    assert "| float32 | xla | logits | 0.5 | 0.001 | **no** |" in page
    assert "| float32 | cudnn | not supported | no float32 |" in page
    assert "Failed: ValueError: no memory" in page
    assert "Not run: 480 s were over." in page
    assert "tiny" not in page.lower()


@pytest.mark.slow
def test_it_runs_whole_on_the_cpu(tmp_path):
    command = ["-m", "benchmarks.accelerator", "--tiny", "--seconds", "3000", "--out", tmp_path]
    done = subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=REPOSITORY,
        env=os.environ | {"JAX_NUM_CPU_DEVICES": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    parts = json.loads((tmp_path / "accelerator.json").read_text())["parts"]
    assert list(parts) == ["agreement", "update", "decode", "step"]
    assert not any("not_run" in part for part in parts.values())
    assert parts["update"]["peak_bytes"] > 0
    assert {"generate_s", "update_s"} <= set(parts["step"]["seconds"])
    assert [row["slots"] for row in parts["decode"]["rows"] if "why" not in row] == [8, 16]
    page = (tmp_path / "accelerator.md").read_text()
    assert "**no**" not in page
    assert "Failed" not in page
