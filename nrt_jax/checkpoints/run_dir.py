"""The files of a run directory that say what the run is."""

import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TextIO

import jax

import nrt_jax
from nrt_jax import distributed
from nrt_jax.atomic_files import PART_SUFFIX, write_atomically
from nrt_jax.checkpoints.inputs import RunInputs
from nrt_jax.checkpoints.json_files import read_json
from nrt_jax.checkpoints.lease import leased
from nrt_jax.config.load import dump_config, flat
from nrt_jax.config.run import CONFIG_FILE, RunConfig, load_run
from nrt_jax.errors import InputError

VERSIONS_FILE, LOCK_FILE, INPUTS_FILE = "versions.json", "lock", "inputs.json"
REJECTED_FILE = "rejected.jsonl"
"""The rows that training left out, with reasons."""
NEW_ROWS = "new_rows"
"""Key in the versions file."""
CHECKPOINTS, WARMUP_CHECKPOINTS = "checkpoints", "warmup_checkpoints"
LEASE_FILE = "lease.json"
"""Where the folder knows no locks."""
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_OF_A_NEW_RUN = {LOCK_FILE, LEASE_FILE, CHECKPOINTS, CONFIG_FILE + PART_SUFFIX}
"""Files of a run that was killed before its config was written."""
FREE_TO_CHANGE = (
    "run_dir",
    "checkpoint.",
    "compilation.",
    "data.cache",
    "data.read_threads",
    "logging.",
    "profile.",
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
    "data.leave_out",
    "data.tokenizer",
    "data.template_file",
    "model.path",
)
"""Paths that may differ as long as what they lead to is the same (`RunInputs.continued`)."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "google-jetstream")
"""Those whose versions are recorded, and compared between processes."""


@contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Make the run directory and lock it; the lock ends with process 0, which holds it.

    Raises InputError when the directory cannot be written, when it holds files but no run, when
    another run trains in it, or when it is not the same directory on all hosts.
    """
    if distributed.is_first():
        with _locked(directory) as lock:
            _check_shared(directory, lock)
            yield
    else:
        _check_shared(directory, None)
        yield


def _check_shared(directory: Path, lock: TextIO | None) -> None:
    """InputError unless every process reads what process 0 writes into the lock."""
    name = uuid.uuid4().hex
    if lock is not None:
        lock.truncate(0)
        lock.write(name)
        lock.flush()
        os.fsync(lock.fileno())
    name, path = distributed.from_first("the run directory", name), directory / LOCK_FILE
    if not path.is_file() or path.read_text("utf-8") != name:
        raise InputError(
            f"run_dir {directory}: process {distributed.process_index()} on "
            f"{socket.gethostname()} does not see what process 0 writes there; name a directory "
            "that all hosts share"
        )
    distributed.wait_for_all("they share the run directory")


@contextmanager
def _locked(directory: Path) -> Iterator[TextIO]:
    try:
        directory.mkdir(parents=True, exist_ok=True)
        names = {entry.name for entry in directory.iterdir()} - _OF_A_NEW_RUN
        foreign = sorted(name for name in names if not distributed.LOG.fullmatch(name))
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
    with lock, ExitStack() as held:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise InputError(
                f"run_dir {directory}: another process trains in it; wait until it ends, or choose "
                "another run_dir"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            held.enter_context(leased(directory / LEASE_FILE, f"run_dir {directory}"))
        yield lock


def check_alike(config: RunConfig) -> None:
    """InputError, with the first difference, unless all processes have this code and config."""
    if distributed.process_count() == 1:
        return
    source = hashlib.sha256()
    for file in sorted(Path(nrt_jax.__file__).parent.rglob("*.py")):
        source.update(file.read_bytes())
    versions = {"nrt_jax": source.hexdigest(), "python": platform.python_version()}
    versions |= {name: _version(name) for name in _PACKAGES}
    distributed.check_same("code", versions, "install the same on all hosts")
    settings = flat(config.model_dump(mode="json"))
    by_value = {key: settings[key] for key in settings if key not in _COMPARED_BY_CONTENT}
    distributed.check_same("config", by_value, "give all processes the same config")


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
    keeps what it recorded. Process 0 writes.
    """
    if not distributed.is_first():
        return
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
    return {
        "nrt_jax": nrt_jax.__version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "devices": [str(device) for device in jax.devices()],
        "packages": {name: _version(name) for name in _PACKAGES},
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
