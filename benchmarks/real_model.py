"""A published model on GSM8K, before and after SFT and NRT with and without a warm-up, as tables.

    .venv/bin/python -m benchmarks.real_model models/SmolLM2-135M-Instruct data/gsm8k/train.jsonl \
        --out runs/smollm2_gsm8k

For each kind of reference answer (the worked answer of GSM8K, or its final number alone) the model
of examples/smollm2_gsm8k is measured on 200 held-out questions, trained by each variant, and
measured again. Everything is a command of nrt-jax, printed before it runs; what is there already is
continued or taken as it is. OUT/summary.json and the tables come from the files of these commands.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from nrt_jax.training.diagnosis import Estimate, mean_over_questions

CONFIG = "examples/smollm2_gsm8k"
HELD_OUT = 200
ANSWERS: Mapping[str, Sequence[str]] = {
    "worked": (),
    # A digit is a token, and eos is one more. Short answers leave time for more prompts.
    "final": (
        "data.max_answer_tokens=8",
        "evaluation.max_answer_tokens=8",
        "train.batch_prompts=8",
        "train.mini_batch_prompts=8",
    ),
}
"""Overrides for each kind of y*."""
UPDATES = 48
"""Of SFT: those of the warm-up and of NRT together, so that as many answer tokens are seen."""
VARIANTS: Mapping[str, Sequence[str]] = {
    "sft": ("method=sft", "warmup.train=null", f"train.steps={UPDATES}"),
    "cold": ("warmup.train=null",),
    "nrt": (),
}
"""Overrides for each way to train."""
TITLES = {
    "before": "before training",
    "sft": "SFT",
    "cold": "NRT-WS(−log p)",
    "warm": "the warm-up alone",
    "nrt": "NRT-WS(−log p) after a warm-up",
}
TRACES = "rollout.traces_per_prompt=1"
"""One trace per held-out question."""
CONTEXTS = ("direct", "empty", "own", "shuffled")
"""What stands between x and y*: nothing, the empty trace, a trace, another question's trace."""
HEADER = (
    "| | non-empty traces | tokens | entropy | direct | empty trace | trace | trace − empty trace "
    "| trace − another question's | trace, change | last number right |\n"
    "|---|---|---|---|---|---|---|---|---|---|---|"
)
ROW = (
    "| {non_empty_percent:.0f} % | {tokens:.1f} | {entropy:.2f} "
    "| {direct:.2f} | {empty:.2f} | {own:.2f} "
    "| {own_minus_empty:+.2f} [{own_minus_empty_low:+.2f}, {own_minus_empty_high:+.2f}] "
    "| {own_minus_shuffled:+.2f} [{own_minus_shuffled_low:+.2f}, {own_minus_shuffled_high:+.2f}] "
    "| {own_change:+.2f} [{own_change_low:+.2f}, {own_change_high:+.2f}] "
    "| {accuracy:.1f} % [{accuracy_low:.1f}, {accuracy_high:.1f}] |"
)
"""A row of a table, after its title; logprobs in nats per token of y*."""

COURSE_HEADER = "| | tokens per trace, start → end | entropy, start → end |\n|---|---|---|"
COURSE_ROW = "| {tokens_first:.1f} → {tokens_last:.1f} | {entropy_first:.2f} → {entropy_last:.2f} |"
"""Of an NRT run, after its title: means of the sampled traces of its first and last four steps."""

Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description="A published model before and after training.")
    parser.add_argument("model", type=Path, help="SmolLM2-135M-Instruct as a directory")
    parser.add_argument("data", type=Path, help="GSM8K's train.jsonl")
    parser.add_argument("--out", type=Path, default=Path("runs/smollm2_gsm8k"))
    parser.add_argument("--answers", nargs="+", choices=ANSWERS, default=[*ANSWERS])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=[*VARIANTS])
    parser.add_argument("overrides", nargs="*", help="key=value, for every run")
    args = parser.parse_intermixed_args()
    args.out.mkdir(parents=True, exist_ok=True)
    summary: Figures = {}
    for kind in args.answers:
        rows = measure_kind(args, kind)
        print(f"\n{kind}\n\n{tables(rows)}")
        for name, figures in rows.items():
            summary |= {f"{kind}_{name}_{key}": value for key, value in figures.items()}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


def measure_kind(args: argparse.Namespace, kind: str) -> dict[str, Figures]:
    """Train and measure every variant with one kind of answer; the rows of its table."""
    folder = args.out / kind
    folder.mkdir(exist_ok=True)
    data = args.data if kind == "worked" else final_answers(args.data, args.out / "final.jsonl")
    inputs = [f"model.path={args.model}", f"data.path={data}", *ANSWERS[kind], *args.overrides]
    diagnose(folder / "before.json", CONFIG, *inputs, "warmup.train=null")
    for variant in args.variants:
        run_dir = folder / variant
        if not finished(run_dir):
            nrt_jax("train", CONFIG, *inputs, *VARIANTS[variant], f"run_dir={run_dir}")
        if variant == "sft":
            diagnose_sft(folder, inputs)
        else:
            diagnose(folder / f"{variant}.json", str(run_dir))
    if "nrt" in args.variants:
        diagnose(folder / "warm.json", str(folder / "nrt" / "checkpoints" / "0"))
    return {name: row(folder, name) for name in TITLES if is_whole(folder, name)}


def is_whole(folder: Path, name: str) -> bool:
    """Whether the diagnosis and the evaluations of a row are all there."""
    runs = {"before": ("cold", "sft"), "warm": ("nrt",)}.get(name, (name,))
    return (folder / f"{name}.json").exists() and all(evaluations(folder / run) for run in runs)


def final_answers(data: Path, out: Path) -> Path:
    """The same questions with the number after "####" as the whole answer."""
    rows = [json.loads(line) for line in data.read_text("utf-8").splitlines()]
    rows = [row | {"answer": row["answer"].split("#### ")[1]} for row in rows]
    out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return out


def finished(run_dir: Path) -> bool:
    """Whether the run was evaluated after its last step."""
    found = evaluations(run_dir)
    return len(found) > 1 and found[-1]["step"] == metrics(run_dir)[-1]["step"] > 0


def diagnose_sft(folder: Path, inputs: Sequence[str]) -> None:
    """The model that SFT made, asked as any model without think tokens is."""
    model = folder / "sft_model"
    if not model.exists():
        nrt_jax("export", str(folder / "sft"), str(model))
    model_of = [word for word in inputs if not word.startswith("model.path=")]
    diagnose(folder / "sft.json", CONFIG, *model_of, f"model.path={model}", "warmup.train=null")


def diagnose(out: Path, *what: str) -> None:
    """The figures of a model or a run on the held-out questions, unless they are there."""
    if not out.exists():
        nrt_jax(
            "diagnose", *what, TRACES, "--rows", str(HELD_OUT), "--out", str(out), may_be=(0, 1)
        )


def nrt_jax(*words: str, may_be: Sequence[int] = (0,)) -> None:
    """Run a command; one that tells that a model cannot train yet has status 1."""
    print("$ nrt-jax", shlex.join(words), flush=True)
    command = [sys.executable, "-m", "nrt_jax", *words]
    status = subprocess.run(command, stdout=subprocess.DEVNULL).returncode
    if status not in may_be:
        sys.exit(f"nrt-jax {words[0]} ended with status {status}")


# --- figures -------------------------------------------------------------------------------------


def row(folder: Path, name: str) -> Figures:
    """What is known of one model: figures on held-out questions, accuracy, and its run's course."""
    record = json.loads((folder / f"{name}.json").read_text("utf-8"))
    start = json.loads((folder / "before.json").read_text("utf-8"))
    measured = {
        key: Estimate(v["value"], v["low"], v["high"]) for key, v in record["figures"].items()
    }
    figures = {
        "non_empty_percent": 100 * (1 - measured["trace/empty_share"].value),
        "tokens": measured["trace/tokens"].value,
        "entropy": measured["trace/entropy"].value,
    }
    for context in CONTEXTS:
        figures[context] = measured[f"logprob/{context}"].value
        figures |= with_interval(f"{context}_change", change(record, start, context))
    for gain in ("own_minus_empty", "own_minus_shuffled"):
        figures |= with_interval(gain, measured[f"logprob/{gain}"])
    return figures | accuracy(folder, name) | course(folder / name)


def with_interval(name: str, estimate: Estimate) -> Figures:
    """The mean and the ends of its 95 % interval as three figures."""
    ends = {"low": estimate.low, "high": estimate.high}
    return {name: estimate.value} | {f"{name}_{end}": float(at or 0) for end, at in ends.items()}


def change(after: Mapping[str, Any], before: Mapping[str, Any], context: str) -> Estimate:
    """How much the logprob of y* in a context has risen, paired by question, in nats per token."""
    pairs = zip(after["by_question"][context], before["by_question"][context], strict=True)
    return mean_over_questions([a - b for a, b in pairs])


def accuracy(folder: Path, name: str) -> Figures:
    """Percent of the held-out questions whose last number is right, with its 95 % interval.

    After a trace, but for SFT, which answers directly; `accuracy_direct` is that before training.
    """
    run, place = {"before": ("cold", 0), "warm": ("nrt", -2)}.get(name, (name, -1))
    figures = wilson("accuracy", evaluations(folder / run)[place]["eval/exact_match"], HELD_OUT)
    if name == "before" and evaluations(folder / "sft"):
        direct = evaluations(folder / "sft")[0]["eval/exact_match"]
        figures |= wilson("accuracy_direct", direct, HELD_OUT)
    return figures


def wilson(name: str, share: float, n: int) -> Figures:
    """A share of n as percent, with Wilson's 95 % interval."""
    z = 1.96
    middle, spread = share + z**2 / (2 * n), share * (1 - share) / n + z**2 / (4 * n**2)
    low, high = ((middle + sign * z * math.sqrt(spread)) / (1 + z**2 / n) for sign in (-1, 1))
    return {name: 100 * share, f"{name}_low": 100 * low, f"{name}_high": 100 * high}


def course(run_dir: Path) -> Figures:
    """Traces and entropy in the first and the last four NRT steps, and the minutes of the run."""
    lines = metrics(run_dir)
    steps = [line for line in lines if line["step"] > 0 and "trace/tokens" in line]
    figures = {}
    for when, some in (("first", steps[:4]), ("last", steps[-4:])):
        for name, key in (("tokens", "trace/tokens"), ("entropy", "policy/entropy")):
            if some:
                figures[f"{name}_{when}"] = mean(line[key] for line in some)
    if lines:
        # Compilations are part of the other times.
        times = ("time/compile_s",)
        seconds = (
            v for r in lines for k, v in r.items() if k.startswith("time/") and k not in times
        )
        figures["minutes"] = math.fsum(seconds) / 60
    return figures


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl; none where there is no run."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    return [json.loads(line) for line in lines]


def evaluations(run_dir: Path) -> list[dict[str, Any]]:
    """Those lines that are of an evaluation."""
    return [line for line in metrics(run_dir) if "eval/exact_match" in line]


def tables(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown: the models on held-out questions, and the course of the NRT runs."""
    models = [f"| {TITLES[name]} " + ROW.format(**figures) for name, figures in rows.items()]
    courses = [
        f"| {TITLES[name]} " + COURSE_ROW.format(**figures)
        for name, figures in rows.items()
        if "tokens_first" in figures
    ]
    return "\n".join([HEADER, *models, "", COURSE_HEADER, *courses])


if __name__ == "__main__":
    main()
