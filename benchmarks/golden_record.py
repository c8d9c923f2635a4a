"""What a tree does, seen from outside: its command line, its HTTP interface, the files of its runs.

Nothing here imports the program, so that one script records a tree whatever its modules are called.
"""

import hashlib
import json
import platform
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

from benchmarks.golden_compare import Renames
from benchmarks.golden_config import flat, schema_fields
from benchmarks.golden_http import transcript
from benchmarks.golden_tree import PATIENCE_S, Tree, environment

STEPS = 30
PROMPTS = (
    "3+1+4+0+2+2+1",
    "1+2+3+4+0+1+2",
    "0+0+0+0+0+0+0",
    "4+4+4+4+4+4+4",
    "2+0+2+0+2+0+2",
    "1+1+2+3+0+3+3",
    "4+3+2+1+0+4+3",
    "2+2+2+2+2+2+1",
    "0+1+0+1+0+1+0",
    "3+3+3+1+1+1+4",
)
NRT, SFT = "configs/quickstart/nrt.yaml", "configs/quickstart/sft.yaml"
GSM8K = "configs/examples/gsm8k_tiny.yaml"
GSM8K_ROWS = 256
SMALL_GSM8K = (
    "train.steps=3",
    "train.batch_prompts=4",
    "train.mini_batch_prompts=4",
    "evaluation.examples=0",
    "rollout.max_trace_tokens=64",
    "model.architecture.num_hidden_layers=1",
    "model.architecture.hidden_size=64",
    "model.architecture.intermediate_size=64",
)
"""The preset's lengths and shapes with less work; its learning rate is constant."""
BRIEF = (
    "train.steps=2",
    "train.batch_prompts=16",
    "train.mini_batch_prompts=4",
    "train.micro_batch_prompts=4",
    "train.batch_shapes=2",
    "rollout.slots=128",
    "evaluation.examples=0",
    "optimizer.schedule=constant",
    "optimizer.warmup_ratio=0",
    "optimizer.learning_rate=3e-3",
)
"""Several updates a step, large enough that ratios reach the clip."""
VARIANTS = {
    "clip": (NRT, *BRIEF, "objective.kl_coefficient=0.1", "objective.entropy_coefficient=0.01"),
    "release": (
        NRT,
        "configs/recipes/release.yaml",
        *BRIEF,
        "data.think_end=<|think_end|>",
        "data.max_prompt_tokens=15",
        "data.max_answer_tokens=8",
        "rollout.max_trace_tokens=16",
        "rollout.max_response_tokens=32",
    ),
}
"""Runs of terms of the loss that the first steps of the quickstart leave out."""
MISTAKES = (
    ("config", "show", NRT, "objective.shceme=gm"),
    ("config", "show", NRT, "train.steps=many"),
    ("config", "show", NRT, "train.batch_prompts=33"),
    ("config", "show", "configs/none.yaml"),
    ("generate", "runs/none", "--prompt", "1"),
    ("serve", "runs/none", "port=http"),
    ("train", NRT, "--steps"),
)
"""Command lines that end with a message."""
DTYPES = ("fp32", "bf16", "fp16")
LARGEST_TEXT = 16_384
"""Bytes of an exported text that is kept whole; of everything else the hash is."""


def record(tree: Path, scratch: Path, cache: Path, renames: Renames, data: Path) -> dict[str, Any]:
    """Everything about a tree that must stay; `cache` keeps compiled programs between calls."""
    tree = tree.resolve()
    asked = Tree(tree, scratch, environment(tree, scratch, cache), renames)
    printed = asked.tell("config", "schema")
    schema = schema_fields(json.loads(printed))
    asked = replace(asked, keys=frozenset(schema))
    about = {
        "tree": _commit(tree),
        "machine": {"cpu": _cpu(), "jax": version("jax"), "python": platform.python_version()},
        "schema_sha256": hashlib.sha256(printed.encode()).hexdigest(),
        "seconds": {},
    }
    sections: dict[str, Any] = {"schema": schema}
    runs = {name: scratch / name for name in ("nrt", "sft", *VARIANTS, "gsm8k")}
    nrt, sft = runs["nrt"], runs["sft"]
    checkpoint = nrt / "checkpoints" / str(STEPS)
    takes = {
        "config": lambda: presets(asked),
        "mistakes": lambda: mistakes(asked),
        "data": lambda: asked.plain(asked.tell("data", "show", NRT, "--rows", "3")).splitlines(),
        "metrics/nrt": lambda: first_steps(asked, NRT, nrt),
        "samples/nrt": lambda: rows(nrt / "samples.jsonl"),
        "metrics/sft": lambda: first_steps(asked, SFT, sft),
        "samples/sft": lambda: rows(sft / "samples.jsonl"),
        **{
            f"metrics/{name}": partial(whole_run, asked, runs[name], *words)
            for name, words in VARIANTS.items()
        },
        "metrics/gsm8k": lambda: gsm8k_steps(asked, runs["gsm8k"], data),
        "padding": lambda: padding(renames, runs),
        "traces": lambda: traces(asked, checkpoint),
        "export": lambda: {dtype: export(asked, checkpoint, dtype) for dtype in DTYPES},
        "http": lambda: serve(asked, checkpoint),
    }
    for name, take in takes.items():
        begun = time.monotonic()
        sections[name] = take()
        about["seconds"][name] = round(time.monotonic() - begun, 1)
        print(f"{name}: {about['seconds'][name]} s", file=sys.stderr, flush=True)
    return {"about": about, "sections": sections}


# --- runs ----------------------------------------------------------------------------------------


def first_steps(tree: Tree, preset: str, run: Path) -> list[dict[str, Any]]:
    """Metrics of a preset's first steps.

    The run keeps its length, of which its learning rate is a function, and is stopped by SIGTERM
    once the checkpoint of the last of these steps is there.
    """
    words = (preset, f"run_dir={run}", f"checkpoint.every_steps={STEPS}", "checkpoint.keep_last=9")
    deadline = time.monotonic() + PATIENCE_S
    with tree.start("train", *words, "logging.every_steps=1000000") as process:
        while not (run / "checkpoints" / str(STEPS)).is_dir() and process.poll() is None:
            if time.monotonic() > deadline:
                raise SystemExit(f"{preset}: {STEPS} steps took more than {PATIENCE_S:g} s")
            time.sleep(0.1)
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status:
        errors = (tree.scratch / "errors").read_text()
        raise SystemExit(f"{preset} ended with status {status}:\n{errors[-4000:]}")
    return metrics(tree, run)


def gsm8k_steps(tree: Tree, run: Path, data: Path) -> Any:
    """Metrics of a few steps on real questions, with the tokenizer of Mistral v3."""
    questions, tokenizer = data / "gsm8k" / "train.jsonl", data / "tokenizers" / "mistral_v3_fast"
    if not (questions.is_file() and tokenizer.is_dir()):
        return {"skipped": "no folder of data; name one in NRT_JAX_DATA"}
    some = tree.scratch / "gsm8k.jsonl"
    with questions.open("rb") as lines:
        some.write_bytes(b"".join(line for line, _ in zip(lines, range(GSM8K_ROWS), strict=False)))
    words = (f"data.path={some}", f"data.tokenizer={tokenizer}", *SMALL_GSM8K)
    return whole_run(tree, run, GSM8K, *words)


def whole_run(tree: Tree, run: Path, *words: str) -> list[dict[str, Any]]:
    """Metrics of a run from its first step to its last."""
    tree.tell("train", *words, f"run_dir={run}")
    return metrics(tree, run)


def metrics(tree: Tree, run: Path) -> list[dict[str, Any]]:
    """Of a run's first steps, without times and speeds."""
    known = rows(run / "metrics.jsonl")
    return [{k: v for k, v in row.items() if not tree.renames.is_timing(k)} for row in known]


def rows(path: Path) -> list[dict[str, Any]]:
    """The JSON lines of the first steps."""
    read = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    return [row for row in read if row["step"] <= STEPS]


def padding(renames: Renames, runs: dict[str, Path]) -> dict[str, Any]:
    """Means over the steps of how well batches are filled, and how many shapes they have."""
    figures: dict[str, dict[str, list[float]]] = {}
    for name, run in runs.items():
        figures[name] = {}
        for row in rows(run / "metrics.jsonl") if run.is_dir() else []:
            for metric in row:
                if renames.old_metric(metric).startswith("batch/"):
                    figures[name].setdefault(metric, []).append(row[metric])
    return {
        name: {metric: sum(values) / len(values) for metric, values in of_run.items()}
        for name, of_run in figures.items()
    }


# --- the other verbs -----------------------------------------------------------------------------


def traces(tree: Tree, checkpoint: Path) -> dict[str, list[str]]:
    """Ten sampled traces with their answers, and two greedy ones with scores."""
    prompts = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    sampled = tree.tell("generate", str(checkpoint), "--temperature=1", "--seed=17", *prompts)
    scored = ["--score", "=3", "--score", "=1"]
    greedy = tree.tell("generate", str(checkpoint), *prompts[:4], *scored)
    return {"sampled": sampled.splitlines(), "greedy": greedy.splitlines()}


def export(tree: Tree, checkpoint: Path, dtype: str) -> dict[str, str]:
    """Every file of an export: short texts as they are, of others the SHA-256."""
    out = tree.scratch / f"export_{dtype}"
    tree.tell("export", str(checkpoint), str(out), "--dtype", dtype)
    files = sorted(path for path in out.rglob("*") if path.is_file())
    return {path.relative_to(out).as_posix(): _content(tree, path) for path in files}


def _content(tree: Tree, path: Path) -> str:
    content = path.read_bytes()
    if len(content) <= LARGEST_TEXT:
        return tree.plain(content.decode("utf-8"))
    return f"sha256 {hashlib.sha256(content).hexdigest()}"


def serve(tree: Tree, checkpoint: Path) -> dict[str, Any]:
    """The transcript of a server, with the line that it starts with and its end."""
    with tree.start("serve", str(checkpoint), "port=0", "grpc_port=null") as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        if "http://" not in line:
            raise SystemExit(f"serve: {(tree.scratch / 'errors').read_text()[-4000:]}")
        port = int(line.rsplit(":", 1)[1])
        exchanges = transcript(port)
        process.send_signal(signal.SIGTERM)
        status = process.wait(timeout=60)
    return {"line": line.replace(str(port), "<port>"), "status": status, **exchanges}


def presets(tree: Tree) -> dict[str, dict[str, Any]]:
    """`config show` of every preset; methods and recipes go on top of the quickstart's."""
    shown = {}
    for path in sorted((tree.path / "configs").rglob("*.yaml")):
        name = path.relative_to(tree.path).as_posix()
        words = [name]
        if path.parent.name in ("methods", "recipes"):
            words.insert(0, NRT)
        if name == GSM8K:
            words += ["data.path=train.jsonl", "data.tokenizer=mistral_v3"]
        status, output, errors = tree.ask("config", "show", *words)
        values = flat(yaml.safe_load(tree.plain(output)) or {}) if not status else {}
        shown[name] = {"status": status, "values": values, "error": tree.plain(errors)}
    return shown


def mistakes(tree: Tree) -> dict[str, dict[str, Any]]:
    """Status and message of command lines that cannot work."""
    said = {}
    for words in MISTAKES:
        status, output, errors = tree.ask(*words)
        said[" ".join(words)] = {"status": status, "text": tree.plain(output + errors)}
    return said


# --- the machine ---------------------------------------------------------------------------------


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    named = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(named)} x {named[0]}" if named else platform.processor()


def _commit(tree: Path) -> str:
    command = ["git", "-C", str(tree), "describe", "--always", "--dirty", "--abbrev=40"]
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()
