"""The quickstart of the README, trained anew."""

import json
import runpy
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

FIGURES = runpy.run_path(str(REPOSITORY / "docs" / "figures.py"))


@pytest.mark.slow
def test_a_fresh_quickstart_gives_the_recorded_figures(tmp_path):
    def nrt_jax(*arguments):
        subprocess.run([sys.executable, "-m", "nrt_jax", *map(str, arguments)], check=True)

    runs = [tmp_path / name for name in ("sft", "nrt")]
    for run in runs:
        nrt_jax("train", f"quickstart/{run.name}", f"run_dir={run}")
    nrt_jax("report", *runs, "--out", tmp_path)
    fresh = FIGURES["quickstart_figures"](json.loads((tmp_path / "summary.json").read_text()))
    recorded = json.loads(FIGURES["FIGURES"].read_text("utf-8"))["quickstart"]
    for name, tolerance in FIGURES["TOLERANCES"].items():
        assert fresh[name] == pytest.approx(recorded[name], abs=tolerance), name
