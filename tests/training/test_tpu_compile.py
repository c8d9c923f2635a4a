"""A training step compiles ahead of time for TPUs, without one, and fits their memory."""

import json
import os
import subprocess
import sys

import pytest

from tests.training.runs import REPOSITORY

pytest.importorskip("libtpu", reason="libtpu is installed on Linux only")

FITS = 95 * 2**30
"""Bytes of memory of a v5p chip."""


def compiled(shape: str, **axes: int) -> dict:
    """What tests/training/tpu_compile.py reports. A process of its own: it holds libtpu."""
    mesh = ",".join(f"{axis}={size}" for axis, size in axes.items())
    # Nothing is asked of a machine that would tell what TPU this is, and other tests may run too.
    quiet = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.training.tpu_compile", shape, mesh],
        cwd=REPOSITORY,
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(shape, mesh, json.dumps(report, indent=1))
    return report


def taken(program: dict) -> int:
    """Bytes of everything that a program has in memory as it runs."""
    made = program["output_bytes"] - program["alias_bytes"]
    return program["argument_bytes"] + program["temp_bytes"] + made


def check(report: dict) -> None:
    weights, moments = report["parameter_bytes"], report["moment_bytes"]
    score, add, apply = report["score"], report["add"], report["apply"]
    assert score["kernels"] == ["splash_mha_fwd"]
    assert add["kernels"] == ["splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"]
    # The moments lie there too while the programs run that do not touch them.
    for program in (taken(score) + moments, taken(add) + moments, taken(apply)):
        assert program < FITS
    # The gradient, as large as the weights, and the state are updated in place.
    assert add["alias_bytes"] >= weights
    assert apply["alias_bytes"] >= weights + moments


@pytest.mark.slow
def test_two_layers_compile():
    check(compiled("small", fsdp=8))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"fsdp": 8}, {"fsdp": 4, "tensor": 2}], ids=str)
def test_llama_8b_compiles(axes):
    report = compiled("llama-8b", **axes)
    check(report)
    assert 31e9 < report["parameter_bytes"] * 8 < 33e9
