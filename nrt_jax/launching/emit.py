"""`nrt-jax sweep --emit`: the file that starts every run of a sweep on a cluster or in a cloud."""

from nrt_jax.experiments.cells import Cell, Sweep
from nrt_jax.launching.fill import Request, fill, job_name

_LONGEST_NAME = 40
_END = "END_OF_TASK"
_SKY = """#!/usr/bin/env bash
# SkyPilot: each run of a sweep as a managed job of its own.
#
#   nrt-jax sweep SWEEP --emit sky ... >sweep.sh; bash sweep.sh
#
set -euo pipefail
submit() {
  local file
  file=$(mktemp --suffix=.yaml)
  cat >"$file"
  sky jobs launch --yes --detach-run "$file"
  rm "$file"
}
"""


def emit(kind: str, sweep: Sweep, request: Request) -> str:
    """A job array of SLURM, a JobSet per run, or a script that submits a job per run to SkyPilot.

    `request` has the words of the sweep, the machines of one run, and the start of the names.
    Raises InputError as `fill` does.
    """
    name = request.name or job_name(sweep.folder)
    if kind == "slurm":
        cells = {"config": sweep.cells[0].config, "cells": len(sweep.cells)}
        return fill("slurm-sweep", request._replace(name=name, **cells))
    texts = [
        fill(kind, _of_cell(request, cell, _numbered(name, i)))
        for i, cell in enumerate(sweep.cells)
    ]
    if kind == "jobset":
        return "---\n".join(texts)
    return _SKY + "".join(f"\nsubmit <<'{_END}'\n{text}{_END}\n" for text in texts)


def _of_cell(request: Request, cell: Cell, name: str) -> Request:
    return request._replace(words=cell.words, files=cell.files, config=cell.config, name=name)


def _numbered(name: str, number: int) -> str:
    end = f"-{number}"
    return name[: _LONGEST_NAME - len(end)].rstrip("-") + end
