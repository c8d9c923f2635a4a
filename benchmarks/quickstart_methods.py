"""All methods on the quickstart's task, over several seeds, as one table.

    .venv/bin/python benchmarks/quickstart_methods.py --seeds 3 --out runs/methods

Each cell is one run of the preset quickstart/nrt with one preset of configs/methods on top; a run
that is there already is continued or taken as it is. About two minutes per run on two cores.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from statistics import mean

from nrt_jax.config.presets import presets

METHODS = [name.split("/")[1] for name in presets() if name.startswith("methods/")]


def main() -> None:
    parser = argparse.ArgumentParser(description="All methods on the quickstart's task.")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 to SEEDS - 1")
    parser.add_argument("--out", type=Path, default=Path("runs/methods"))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("overrides", nargs="*", help="key=value, for every run")
    args = parser.parse_args()
    rows = []
    for method in args.methods:
        runs = [train(method, seed, args.out, args.overrides) for seed in range(args.seeds)]
        rows.append({"method": method, "runs": runs})
        print(table(rows[-1:], header=len(rows) == 1), flush=True)
    (args.out / "summary.json").write_text(json.dumps(rows, indent=1) + "\n")


def train(method: str, seed: int, out: Path, overrides: list[str]) -> dict[str, float]:
    """Train one cell, and read what its records say."""
    run_dir = out / f"{method}-{seed}"
    configs = ["quickstart/nrt", f"methods/{method}"]
    words = [*configs, f"run_dir={run_dir}", f"seed={seed}", *overrides]
    command = [sys.executable, "-m", "nrt_jax", "train", *words, "logging.every_steps=1000000"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    evaluations = [row for row in rows if "eval/exact_match" in row]
    steps = [row for row in rows if "loss/total" in row]
    last = steps[-10:]
    return {
        "seed": seed,
        "exact_match_before": evaluations[0]["eval/exact_match"],
        "exact_match": evaluations[-1]["eval/exact_match"],
        "trace_tokens": mean(row.get("trace/tokens", 0.0) for row in last),
        "entropy": mean(row["policy/entropy"] for row in last),
        "seconds": sum(v for row in rows for k, v in row.items() if k.startswith("time/")),
    }


def table(rows: list[dict], *, header: bool) -> str:
    """Markdown, one row a method: exact match of each seed, then means over seeds."""
    lines = []
    if header:
        lines += [
            "| method | exact match by seed | mean | trace tokens | entropy (nats) | seconds |",
            "|---|---|---|---|---|---|",
        ]
    for row in rows:
        runs = row["runs"]
        seeds = " ".join(f"{run['exact_match']:.3f}" for run in runs)
        means = [mean(run[k] for run in runs) for k in ("exact_match", "trace_tokens", "entropy")]
        seconds = mean(run["seconds"] for run in runs)
        numbers = f"{means[0]:.3f} | {means[1]:.1f} | {means[2]:.3f} | {seconds:.0f}"
        lines.append(f"| {row['method']} | {seeds} | {numbers} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
