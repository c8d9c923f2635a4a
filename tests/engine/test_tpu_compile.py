"""Prefill and decoding compile ahead of time for TPUs, without one, and fit their memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu", reason="libtpu is installed on Linux only")

FITS = 95 * 2**30
"""Bytes of memory of a v5p chip."""


def compiled(shape: str, **axes: int) -> dict:
    """What tests/engine/tpu_compile.py reports. A process of its own: it holds libtpu."""
    mesh = ",".join(f"{axis}={size}" for axis, size in axes.items())
    # Nothing is asked of a machine that would tell what TPU this is, and other tests may run too.
    quiet = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("tpu_compile.py"), shape, mesh],
        env=os.environ | quiet,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    print(shape, mesh, json.dumps(report, indent=1))
    return report


def check(report: dict) -> None:
    prefill, decode = report["prefill"], report["decode"]
    assert report["form"] == "PagedCache"
    assert report["kernel"]
    for program in (prefill, decode):
        assert program["argument_bytes"] + program["temp_bytes"] < FITS
    # The caches are updated in place, and no layer's weights are copied.
    assert decode["alias_bytes"] >= report["cache_bytes"]
    assert decode["temp_bytes"] < report["weight_bytes"] / 4


@pytest.mark.slow
def test_two_layers_compile():
    check(compiled("small", data=2, tensor=4))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [{"tensor": 8}, {"data": 2, "tensor": 4}], ids=str)
def test_llama_8b_compiles(axes):
    report = compiled("llama-8b", **axes)
    check(report)
    assert 15e9 < report["weight_bytes"] * axes["tensor"] < 17e9
