"""What each choice of objective.format_where does to the traces of a published model, as curves.

    .venv/bin/python -m benchmarks.format_where models/SmolLM2-135M-Instruct \
        data/gsm8k/train.jsonl --out runs/format_where

Three NRT runs of examples/smollm2_gsm8k without a warm-up, which differ in that choice alone: the
think tokens start as copies, so that the format loss is most of the gradient. OUT/curves.png and
OUT/summary.json come from the metrics of the runs; a run that is there already is continued.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

CHOICES = ("all", "not_emitted", "natural_end")
OVERRIDES = ("warmup.train=null", "train.diagnosis_prompts=0", "evaluation.examples=0")
PANELS = {
    "trace/tokens": "tokens per trace",
    "trace/end_length_share": "share of traces that the limit cut",
    "policy/format_nats": "format loss (nats)",
}
AVERAGED = 3
"""Last steps that a figure is the mean of; the first is of step 1 alone, before any update."""


def main() -> None:
    parser = argparse.ArgumentParser(description="Trace length by objective.format_where.")
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct as a directory")
    parser.add_argument("data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--out", type=Path, default=Path("runs/format_where"))
    parser.add_argument("overrides", nargs="*", help="key=value, for every run")
    args = parser.parse_intermixed_args()
    inputs = [f"model.path={args.model}", f"data.path={args.data}", f"train.steps={args.steps}"]
    runs = {
        where: train(
            args.out / where, [*inputs, *args.overrides, f"objective.format_where={where}"]
        )
        for where in CHOICES
    }
    draw(runs, args.out / "curves.png")
    summary = {key: value for run in runs.items() for key, value in ends(*run).items()}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    print(json.dumps(summary, indent=1))


def train(run_dir: Path, overrides: Sequence[str]) -> list[dict[str, Any]]:
    """Train or continue one run; the metrics of its steps."""
    words = ["train", "examples/smollm2_gsm8k", *OVERRIDES, *overrides, f"run_dir={run_dir}"]
    print("$ nrt-jax", shlex.join(words), flush=True)
    subprocess.run([sys.executable, "-m", "nrt_jax", *words], check=True, stdout=subprocess.DEVNULL)
    lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    return [row for row in map(json.loads, lines) if "trace/tokens" in row]


def ends(where: str, steps: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Each metric in the first step and at the end of a run."""
    return {
        f"{where}_{key.split('/')[1]}_{when}": mean(step[key] for step in some)
        for key in PANELS
        for when, some in (("first", steps[:1]), ("last", steps[-AVERAGED:]))
    }


def draw(runs: Mapping[str, Sequence[Mapping[str, float]]], path: Path) -> None:
    """One panel per metric, one line per choice."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(11, 3.2), layout="constrained")
    for panel, (key, title) in zip(axes, PANELS.items(), strict=True):
        for (where, steps), marker in zip(runs.items(), "os^", strict=True):
            panel.plot(
                [s["step"] for s in steps], [s[key] for s in steps], label=where, marker=marker
            )
        panel.set(title=title, xlabel="step")
        panel.set_ylim(bottom=0)
        panel.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
