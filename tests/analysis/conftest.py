"""Made-up run directories, small enough to work out every figure by hand."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

CONFIG = {
    "method": "nrt",
    "run_dir": "runs/x",
    "seed": 3,
    "model": {"path": "/base", "dtype": "float32"},
    "data": {"source": "chain_addition", "eval_rows": 200, "eval_path": None},
    "objective": {"scheme": "ws_neg_log_p"},
    "rollout": {"max_trace_tokens": 64},
    "train": {"steps": 12, "batch_prompts": 32, "mini_batch_prompts": 32},
    "warmup": {},
    "evaluation": {"examples": 512, "samples": 2},
}
VERSIONS = {"nrt_jax": "0.1.0", "git_revision": "abc123-dirty", "packages": {"jax": "0.10.2"}}


def training_line(step: int, method: str) -> dict[str, float]:
    line = {
        "step": step,
        "loss/total": 1.0,
        "policy/entropy": 2.0 - 0.1 * step,
        "update/skipped": 1.0,
        "time/data_s": 0.25,
        "time/update_s": 1.0,
        "time/compile_s": 0.5,
        "speed/tokens_per_second": float(step),
    }
    if method == "sft":
        return line
    return line | {
        "reward/mean": 0.1 * step,
        "reward/baseline": 0.5,
        "trace/tokens": float(step),
        "trace/end_think_end_share": 0.75,
        "trace/end_length_share": 0.25,
        "trace/end_other_share": 0.0,
        "time/generate_s": 2.0,
    }


def evaluation_line(step: int, exact_match: float) -> dict[str, float]:
    return {"step": step, "eval/exact_match": exact_match, "time/evaluate_s": 0.5}


def sample(step: int, method: str, **changes: Any) -> dict[str, Any]:
    traced = method == "nrt"
    return {
        "step": step,
        "index": 0,
        "question": "1+2",
        "trace": "3\n4" if traced else None,
        "trace_end": "<|think_end|>" if traced else None,
        "answer": "=3",
        "reference": "=3",
        "correct": True,
    } | changes


def merged(tree: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    both = {key: tree[key] | changes[key] for key in changes if isinstance(changes[key], dict)}
    return tree | changes | both


def write_lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


MakeRun = Callable[..., Path]


@pytest.fixture
def make_run(tmp_path: Path) -> MakeRun:
    """A run of 12 steps: make_run(name, method, before, after, samples=[...], **config)."""

    def make(
        name: str,
        method: str = "nrt",
        before: float = 0.25,
        after: float = 0.95,
        samples: list[dict[str, Any]] | None = None,
        **config: Any,
    ) -> Path:
        directory = tmp_path / name
        directory.mkdir(parents=True)
        resolved = merged(CONFIG, {"method": method, "run_dir": str(directory)} | config)
        (directory / "config.yaml").write_text(yaml.safe_dump(resolved), encoding="utf-8")
        (directory / "versions.json").write_text(json.dumps(VERSIONS), encoding="utf-8")
        rows = [evaluation_line(0, before)]
        rows += [training_line(step, method) for step in range(1, 13)]
        write_lines(directory / "metrics.jsonl", [*rows, evaluation_line(12, after)])
        default = [sample(0, method, answer="=4", correct=False), sample(12, method)]
        write_lines(directory / "samples.jsonl", default if samples is None else samples)
        return directory

    return make
