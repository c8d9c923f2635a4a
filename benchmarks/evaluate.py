"""CPU-seconds of benchmarks: our engine against `lm_eval --model hf` on torch, on the same prompts.

    python -m benchmarks.evaluate MODEL --data DIR [--prompts 64] [--max-answer-tokens 512]

Both sides answer GSM8K greedily in float32 and score the choices of TruthfulQA, each in a process
of its own, one after the other. What is counted begins when model and tasks are loaded; ours
includes what it compiles, or reads from the cache of compiled programs. The search of lm-eval's
`batch_size=auto` runs whole batches of the longest context, which would take longer than the
benchmark; its largest batch, 64, is given to it instead.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LARGEST_BATCH = 64
"""Of lm-eval's search."""
GOALS = {"gsm8k": 0.35, "truthfulqa": 0.6}
"""Ours over theirs."""


def cpu_seconds() -> float:
    """Of this process so far, all threads, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def measure_ours(path: Path, tasks: dict[str, Any], limits: dict[str, int]) -> dict[str, float]:
    """CPU-seconds by task."""
    from nrt_jax.checkpoints.open import open_model
    from nrt_jax.compilation import WATCH
    from nrt_jax.evaluation.answer_log import AnswerLog
    from nrt_jax.evaluation.asked_model import AskedModel
    from nrt_jax.evaluation.lm import EngineLM

    WATCH.listen()
    model = AskedModel.of(open_model(path, ["model.dtype=float32"]))
    measured = {}
    with tempfile.TemporaryDirectory() as folder, AnswerLog(Path(folder)) as answers:
        lm = EngineLM(model, answers)
        for name, task in tasks.items():
            measured[name] = _measure(lm, task, limits[name])
            measured[f"{name} compiling, s"] = WATCH.take()
    return measured


def measure_theirs(path: Path, tasks: dict[str, Any], limits: dict[str, int]) -> dict[str, float]:
    """CPU-seconds by task."""
    from benchmarks.evaluate_parity import transformers_lm

    lm = transformers_lm(path, batch_size=LARGEST_BATCH)
    return {name: _measure(lm, task, limits[name]) for name, task in tasks.items()}


def _measure(lm: Any, task: Any, limit: int) -> float:
    start = cpu_seconds()
    task.build_all_requests(
        limit=limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=lm.apply_chat_template,
    )
    requests = list(task.instances)
    getattr(lm, requests[0].request_type)(requests)
    return cpu_seconds() - start


def main() -> None:
    """Run both sides, and print what each took and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=64, help="questions of GSM8K")
    parser.add_argument("--questions", type=int, default=16, help="of TruthfulQA")
    parser.add_argument("--max-answer-tokens", type=int, default=512)
    parser.add_argument("--side", choices=("ours", "theirs"), help="measure one side alone")
    args = parser.parse_args()
    if args.side is not None:
        print(json.dumps(_of_side(args)))
        return
    measured = {side: _in_process(side) for side in ("ours", "theirs")}
    for name, goal in GOALS.items():
        ours, theirs = measured["ours"][name], measured["theirs"][name]
        compiling = measured["ours"][f"{name} compiling, s"]
        print(
            f"{name}: ours {ours:.1f} CPU-seconds ({compiling:.1f} s of wall time compiling), "
            f"lm_eval hf {theirs:.1f}; ratio {ours / theirs:.2f}, goal {goal}"
        )


def _in_process(side: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.evaluate", *sys.argv[1:], "--side", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _of_side(args: argparse.Namespace) -> dict[str, float]:
    from benchmarks.evaluate_parity import make_greedy
    from nrt_jax.evaluation.suite import Suite, load_tasks

    tasks = load_tasks(Suite(tasks=tuple(GOALS), data=args.data))
    make_greedy(tasks["gsm8k"], args.max_answer_tokens)
    limits = {"gsm8k": args.prompts, "truthfulqa": args.questions}
    measure = measure_ours if args.side == "ours" else measure_theirs
    return measure(args.model, tasks, limits)


if __name__ == "__main__":
    main()
