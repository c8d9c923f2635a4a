"""The files of a run directory that say what the run is."""

import fcntl
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax

import nrt_jax
from nrt_jax.checkpoints.files import PART_SUFFIX, write_atomically
from nrt_jax.checkpoints.inputs import RunInputs
from nrt_jax.checkpoints.json_files import read_json
from nrt_jax.config.load import dump_config, flat
from nrt_jax.config.run import CONFIG_FILE, RunConfig, load_run
from nrt_jax.errors import InputError

VERSIONS_FILE, LOCK_FILE, INPUTS_FILE = "versions.json", "lock", "inputs.json"
NEW_ROWS = "new_rows"
"""Key in the versions file."""
CHECKPOINTS, WARMUP_CHECKPOINTS = "checkpoints", "warmup_checkpoints"
_OF_A_NEW_RUN = {LOCK_FILE, CHECKPOINTS, CONFIG_FILE + PART_SUFFIX}
"""Files of a run that was killed before its config was written."""
FREE_TO_CHANGE = (
    "run_dir",
    "checkpoint.",
    "compilation.",
    "logging.",
    "train.max_skipped_updates",
    "train.diagnosis_prompts",
    "train.allow_cold_start",
    "train.stop_on_collapse",
    "train.gradient_shares_every",
    "mesh.",
    "model.attention",
    "model.remat",
    "model.logprob_chunk_tokens",
    "optimizer.offload",
    "rollout.driver",
    "train.micro_batch_prompts",
    "train.packing",
    "train.batch_shapes",
)
"""Settings that may differ when a run continues, for example on other devices: they change no
weight beyond rounding."""
_COMPARED_BY_CONTENT = (
    "data.path",
    "data.eval_path",
    "data.tokenizer",
    "data.template_file",
    "model.path",
)
"""Paths that may differ as long as what they lead to is the same (`RunInputs.continued`)."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the run directory and lock it; the lock ends with the process.

    Raises InputError when the directory cannot be written, when it holds files but no run, or when
    another process trains in it.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        foreign = sorted({entry.name for entry in directory.iterdir()} - _OF_A_NEW_RUN)
        foreign += [CHECKPOINTS] if has_checkpoint(directory) else []
        if foreign and not (directory / CONFIG_FILE).exists():
            raise InputError(
                f"run_dir {directory}: holds {foreign[0]} but no {CONFIG_FILE}, so it is no run of "
                "this program; choose an empty or a new directory"
            )
        lock = (directory / LOCK_FILE).open("a")
    except OSError as error:
        raise InputError(
            f"run_dir {directory}: {error.strerror}; choose a directory that you may write to"
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run_dir {directory}: another process trains in it; wait until it ends, or choose "
                "another run_dir"
            ) from None
        yield


def check_config(config: RunConfig) -> None:
    """InputError when there are checkpoints of another config; the directory is locked.

    Settings that change no weight may differ, and paths.
    """
    saved = config.run_dir / CONFIG_FILE
    if saved.exists() and has_checkpoint(config.run_dir):
        _check_same(saved, config)


def describe(
    config: RunConfig, inputs: RunInputs, new_rows: Mapping[str, Any] | None = None
) -> None:
    """Write the config, the inputs, and the versions of packages and devices.

    `new_rows` is how the rows of new think tokens were chosen; without it a run with a checkpoint
    keeps what it recorded.
    """
    write_atomically(config.run_dir / CONFIG_FILE, dump_config(config).encode())
    new_rows = new_rows or recorded_new_rows(config.run_dir)
    versions = _versions() | ({} if new_rows is None else {NEW_ROWS: dict(new_rows)})
    for name, content in {INPUTS_FILE: inputs.to_json(), VERSIONS_FILE: versions}.items():
        write_atomically(config.run_dir / name, (json.dumps(content, indent=1) + "\n").encode())


def recorded_new_rows(directory: Path) -> dict[str, Any] | None:
    """How a run with a checkpoint chose the rows of new think tokens; None where it chose none."""
    path = directory / VERSIONS_FILE
    if not has_checkpoint(directory) or not path.is_file():
        return None
    return read_json(path).get(NEW_ROWS)


def newest_step(directory: Path) -> int | None:
    """Step of the newest checkpoint of a run directory; None when it has none."""
    names = [saved.name for saved in (directory / CHECKPOINTS).glob("*")]
    return max((int(name) for name in names if name.isdecimal()), default=None)


def has_checkpoint(directory: Path) -> bool:
    """Whether the directory has a checkpoint, of the run or of its warm-up."""
    return newest_step(directory) is not None or _in_warmup(directory)


def _in_warmup(directory: Path) -> bool:
    """Whether the newest checkpoint is one of the warm-up, which are removed at step 0."""
    saved = (directory / WARMUP_CHECKPOINTS).glob("*")
    return newest_step(directory) is None and any(path.name.isdecimal() for path in saved)


def how_to_continue(directory: Path) -> str:
    """What the command that trains in a directory does when it is given again."""
    step = newest_step(directory)
    if _in_warmup(directory):
        return "the same command continues the run in its warm-up"
    if step is None:
        return "nothing is saved yet, and the same command starts the run anew"
    return f"the same command continues the run from step {step}"


def _check_same(saved: Path, config: RunConfig) -> None:
    before = flat(load_run(config.run_dir).model_dump(mode="json"))
    now = flat(config.model_dump(mode="json"))
    may_extend = config.optimizer.schedule == "constant" and not config.optimizer.warmup_ratio
    free = FREE_TO_CHANGE + _COMPARED_BY_CONTENT + (("train.steps",) if may_extend else ())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(free):
            raise InputError(
                f"{saved}: {key} is {before.get(key)!r} in this run and {now.get(key)!r} now; "
                f"set it back to continue the run, or choose another run_dir"
            )


def _versions() -> dict[str, Any]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "google-jetstream")
    return {
        "nrt_jax": nrt_jax.__version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "devices": [str(device) for device in jax.devices()],
        "packages": {name: _version(name) for name in names},
    }


def _version(package: str) -> str | None:
    """Of an installed package; None for an extra that is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    """Git revision of the package's checkout, marked -dirty when it has changes."""
    where = Path(nrt_jax.__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
