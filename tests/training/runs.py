"""Tiny runs in processes of their own: started, watched, killed, and compared file by file."""

import json
import logging
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import yaml
from flax import nnx

from nrt_jax import cli
from nrt_jax.checkpoints import hf_weights
from nrt_jax.config.architecture import Architecture
from nrt_jax.data.task_tokenizers import write_quickstart_tokenizer
from nrt_jax.models.decoder import Decoder
from nrt_jax.training.logger import ROLLOUTS, TIMING_PREFIXES
from tests.data.made_tokenizers import write_made_tokenizer

REPOSITORY = Path(__file__).resolve().parents[2]
PATIENCE_S = 300.0

ARCHITECTURE = {
    "vocab_size": 25,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "initializer_range": 0.3,
}

CONFIG = {
    "method": "nrt",
    "model": {"path": "model"},
    "data": {
        "source": "chain_addition",
        "tokenizer": "model",
        "max_prompt_tokens": 12,
        "max_answer_tokens": 4,
        "eval_rows": 4,
        "chain": {"digits": 3, "rows": 40},
    },
    "objective": {"length_constant": 4, "kl_coefficient": 0.1},
    "rollout": {
        "traces_per_prompt": 2,
        "max_trace_tokens": 4,
        "max_response_tokens": 10,
        "slots": 8,
    },
    "train": {
        "steps": 8,
        "batch_prompts": 4,
        "mini_batch_prompts": 2,
        "micro_batch_prompts": 1,
        # Random weights do not reason; what a diagnosis says of them is in test_run_health.py.
        "diagnosis_prompts": 0,
    },
    "optimizer": {"learning_rate": 1e-2, "schedule": "cosine", "warmup_ratio": 0.2},
    "evaluation": {
        "every_steps": 3,
        "examples": 4,
        "max_answer_tokens": 3,
        "samples": 2,
        # One program less to compile; test_reference_scores.py asks for them.
        "reference_rows": 0,
    },
    "checkpoint": {"every_steps": 2, "keep_last": 2},
}


def write_model(directory: Path, **changes) -> Path:
    """A Hugging Face directory of random weights with the quickstart's tokenizer."""
    architecture = Architecture.model_validate(ARCHITECTURE | changes)
    params = nnx.to_pure_dict(nnx.split(Decoder(architecture, nnx.Rngs(0)))[1])
    hf_weights.write_directory(
        directory,
        architecture,
        params,
        generation={"bos_token_id": 1, "eos_token_id": 2},
        add_files=write_quickstart_tokenizer,
    )
    return directory


def write_config(folder: Path) -> Path:
    """A config beside its model, for one device."""
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(CONFIG), encoding="utf-8")
    return path


def write_config_for_any_text(folder: Path) -> Path:
    """A config beside a tiny model, and the tokenizer of a larger one that spells every text."""
    write_model(folder / "model", vocab_size=700)
    write_made_tokenizer("llama3", folder / "tokenizer")
    return write_config(folder)


@dataclass
class Outcome:
    """How a process ended."""

    status: int
    out: str
    err: str

    @property
    def told(self) -> list[str]:
        """Lines of errors and warnings, without the memory and the compilation that every run
        reports, the texts of a warm-up, and what Orbax says on a busy machine."""
        usual = (
            "nrt-jax: INFO: memory per device: ",
            "nrt-jax: INFO: compiled ",
            "nrt-jax: INFO: warm-up: ",
            "nrt-jax: WARNING: Waiting for previous save to complete took ",
        )
        return [line for line in self.err.splitlines() if not line.startswith(usual)]

    @property
    def error(self) -> str:
        """The line that an error prints, without its prefix; asserts that it is the only one."""
        lines = self.told
        assert len(lines) == 1, self.err
        assert lines[0].startswith("nrt-jax: error: "), self.err
        return lines[0].removeprefix("nrt-jax: error: ")


FORKS = multiprocessing.get_context("forkserver")
"""A server that has imported what `train` needs, and forks: a start costs no seconds of imports."""
FORKS.set_forkserver_preload(["nrt_jax.training.loop", __name__])

ENVIRONMENT = {
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".pytest_cache" / "compiled_by_runs"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
"""Of the processes that tests start, besides that of the tests."""


def run_verb(
    arguments: list[str], folder: Path, environment: dict[str, str], file_bytes: int | None
) -> None:
    """What a process does: `nrt-jax` with its output in files, so that no pipe fills up."""
    os.chdir(REPOSITORY)
    for name, stream in {"out": sys.stdout, "err": sys.stderr}.items():
        with (folder / name).open("w") as file:
            os.dup2(file.fileno(), stream.fileno())
    # A library that logs while it is imported sets a handler; `nrt-jax` sets its own before that.
    logging.getLogger().handlers.clear()
    os.environ.update(environment)
    for name in environment.keys() & {name.upper() for name in jax.config.values}:
        # jax read its own when it was imported.
        jax.config.update(name.lower(), yaml.safe_load(environment[name]))
    if file_bytes is not None:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, most))
    sys.exit(cli.main(arguments))


@dataclass
class Process:
    """`nrt-jax` in a process of its own."""

    arguments: list[str]
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    file_bytes: int | None = None
    """Files of at most this size: the system then refuses to write, as when the disk is full."""

    def __post_init__(self) -> None:
        for name in ("out", "err"):
            (self.folder / name).touch()
        self.process = FORKS.Process(
            target=run_verb,
            args=(self.arguments, self.folder, ENVIRONMENT | self.environment, self.file_bytes),
            daemon=True,
        )
        self.process.start()

    def wait_until(self, moment: Callable[[], bool]) -> bool:
        """Return at `moment`, as near as polling comes; False when the process ended before."""
        deadline = time.monotonic() + PATIENCE_S
        while self.process.is_alive():
            if moment():
                return True
            if time.monotonic() > deadline:
                self.process.kill()
                raise TimeoutError(f"{self.arguments}: {self.end()}")
            time.sleep(0.002)
        return False

    def signal(self, number: int) -> None:
        if self.process.is_alive():
            os.kill(self.process.pid, number)

    def end(self) -> Outcome:
        """Wait for the end."""
        self.process.join(PATIENCE_S)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutError(f"{self.arguments}: runs after {PATIENCE_S:.0f} s")
        return Outcome(
            self.process.exitcode,
            (self.folder / "out").read_text("utf-8"),
            (self.folder / "err").read_text("utf-8"),
        )


@dataclass(frozen=True)
class TinyRun:
    """One run directory, and the command that trains it."""

    config: Path
    directory: Path
    overrides: tuple[str, ...] = ()

    def start(self, *overrides: str, file_bytes: int | None = None, **environment: str) -> Process:
        arguments = ["train", str(self.config), f"run_dir={self.directory}"]
        log = tempfile.mkdtemp(prefix="log-", dir=self.directory.parent)
        arguments += [*self.overrides, *overrides]
        return Process(arguments, Path(log), environment, file_bytes)

    def train(self, *overrides: str, file_bytes: int | None = None, **environment: str) -> Outcome:
        return self.start(*overrides, file_bytes=file_bytes, **environment).end()

    def trained(self, *overrides: str) -> Outcome:
        outcome = self.train(*overrides)
        assert outcome.status == 0, outcome
        return outcome

    def kill_at(self, moment: Callable[[], bool], **environment: str) -> bool:
        """SIGKILL at the moment; False when the run ended before it."""
        process = self.start(**environment)
        hit = process.wait_until(moment)
        process.signal(signal.SIGKILL)
        outcome = process.end()
        assert outcome.status == (-signal.SIGKILL if hit else 0), outcome
        return hit

    # Moments.

    def begun(self) -> bool:
        """The directory is made, the model not yet compiled."""
        return (self.directory / "config.yaml").exists()

    def saving(self) -> bool:
        """Orbax's temporary directory exists."""
        return any(self.checkpoints.glob("*.orbax-checkpoint-tmp*"))

    def saved(self, step: int) -> bool:
        return (self.checkpoints / str(step)).exists()

    def evaluating(self, step: int) -> bool:
        """The step's metrics are written, and those of its evaluation are not."""
        rows = self.metrics()
        return bool(rows) and rows[-1]["step"] == step and "eval/exact_match" not in rows[-1]

    def at_line(self, count: int) -> bool:
        return len(self.metrics()) >= count

    # Contents.

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"

    @property
    def steps(self) -> list[int]:
        found = self.checkpoints.iterdir() if self.checkpoints.exists() else ()
        return sorted(int(path.name) for path in found if path.name.isdigit())

    def lines(self, name: str) -> list[dict]:
        path = self.directory / name
        whole = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
        return [json.loads(line) for line in whole]

    def metrics(self) -> list[dict]:
        """The lines of metrics.jsonl, without the times."""
        return [
            {k: v for k, v in row.items() if not k.startswith(TIMING_PREFIXES)}
            for row in self.lines("metrics.jsonl")
        ]

    def rollouts(self) -> dict[str, bytes]:
        """The files of the log of rollouts; none in a run without one."""
        return {
            path.name: path.read_bytes() for path in sorted((self.directory / ROLLOUTS).glob("*"))
        }

    def arrays(self, step: int) -> dict[str, np.ndarray]:
        """Weights, moments and counters of a checkpoint."""
        tree = ocp.StandardCheckpointer().restore(self.checkpoints / str(step) / "state")
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def assert_same(run: TinyRun, reference: TinyRun) -> None:
    """Equal metrics but for times, equal samples and rollouts, bit-identical state, and nothing
    left over."""
    assert run.metrics() == reference.metrics()
    assert run.lines("samples.jsonl") == reference.lines("samples.jsonl")
    assert run.rollouts() == reference.rollouts()
    last = max(reference.steps)
    assert run.steps == reference.steps
    mine, theirs = run.arrays(last), reference.arrays(last)
    assert mine.keys() == theirs.keys()
    for name, array in theirs.items():
        assert mine[name].dtype == array.dtype, name
        assert mine[name].tobytes() == array.tobytes(), name
    assert names(run.directory) == names(reference.directory)


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
