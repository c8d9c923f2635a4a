"""Part d of accelerator.py: whole NRT steps of a model in a folder, by phases."""

import json
import random
from pathlib import Path
from typing import Any

from nrt_jax import cli

STEPS = 3
"""The first compiles; the last is reported."""
FULL = (
    "warmup.train=null",
    "data.eval_rows=0",
    "train.batch_prompts=32",
    "train.mini_batch_prompts=32",
    "train.micro_batch_prompts=8",
    "rollout.traces_per_prompt=8",
    "rollout.slots=256",
)
TINY = (
    "data.eval_rows=8",
    "train.batch_prompts=4",
    "train.mini_batch_prompts=4",
    "train.micro_batch_prompts=4",
    "rollout.slots=16",
    "rollout.traces_per_prompt=4",
)


def measure(model: Path | None, scratch: Path) -> dict[str, Any]:
    """Seconds of each phase of the last step; without a folder a step of the quickstart's model."""
    run_dir = scratch / "run"
    if model is None:
        words = ["quickstart/nrt", *TINY]
    else:
        rows = scratch / "rows.jsonl"
        rows.write_text("".join(f"{json.dumps(row)}\n" for row in _questions()))
        words = ["examples/smollm2_gsm8k", f"model.path={model}", f"data.path={rows}", *FULL]
    words += [
        f"train.steps={STEPS}",
        f"run_dir={run_dir}",
        "evaluation.examples=0",
        "logging.every_steps=1",
    ]
    status = cli.main(["train", *words])
    if status:
        raise RuntimeError(f"nrt-jax train ended with status {status}")
    lines = (run_dir / "metrics.jsonl").read_text("utf-8").splitlines()
    last = next(row for row in map(json.loads, lines) if row.get("step") == STEPS)
    phases = {
        name.removeprefix("time/"): value
        for name, value in last.items()
        if name.startswith("time/")
    }
    return {"model": "the quickstart's" if model is None else model.name, "seconds": phases}


def _questions() -> list[dict[str, str]]:
    """Word problems of about the length of GSM8K's, with worked answers."""
    rng = random.Random(0)
    rows = []
    for _ in range(512):
        a, b, c = (rng.randint(2, 99) for _ in range(3))
        question = (
            f"A shop has {a} boxes with {b} pencils in each. It sells {c} of the pencils in the "
            "morning, and none for the rest of the day. How many pencils are left in the shop?"
        )
        answer = f"The shop has {a} * {b} = {a * b} pencils. {a * b} - {c} = {a * b - c} are left."
        rows.append({"question": question, "answer": f"{answer}\n#### {a * b - c}"})
    return rows
