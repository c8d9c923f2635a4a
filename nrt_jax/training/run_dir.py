"""The files of a run directory that say what the run is."""

import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import jax

import nrt_jax
from nrt_jax.config import dump_config, load_config
from nrt_jax.errors import InputError
from nrt_jax.training.config import RunConfig

CONFIG_FILE, VERSIONS_FILE = "config.yaml", "versions.json"
CHECKPOINTS = "checkpoints"
FREE_TO_CHANGE = ("run_dir", "checkpoint.", "logging.", "train.max_skipped_updates")
"""Settings that a continued run may have otherwise: they change no weight."""


def prepare(config: RunConfig) -> None:
    """Make the run directory, or check that the one there is of the same run.

    Raises InputError when it cannot be written, when it holds something else, or when a setting
    that fixes the weights differs from the run that is there.
    """
    directory = config.run_dir
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"run_dir {directory}: {error.strerror}; choose a directory that you may write to"
        ) from error
    saved = directory / CONFIG_FILE
    if saved.exists():
        _check_same(saved, config)
    elif any(directory.iterdir()):
        raise InputError(
            f"run_dir {directory}: holds files but no {CONFIG_FILE}, so it is no run of this "
            "program; choose an empty or a new directory"
        )
    write_atomically(saved, dump_config(config))
    write_atomically(directory / VERSIONS_FILE, json.dumps(_versions(), indent=1) + "\n")


def write_atomically(path: Path, text: str) -> None:
    """Write a small file so that no reader ever sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


def load_run(directory: Path) -> RunConfig:
    """The resolved config of an existing run."""
    path = directory / CONFIG_FILE
    if not path.exists():
        raise InputError(f"{directory}: no {CONFIG_FILE} in it; name the directory of a run")
    return load_config(RunConfig, [path], [f"run_dir={directory}"])


def _check_same(saved: Path, config: RunConfig) -> None:
    before = _flat(load_config(RunConfig, [saved], []).model_dump(mode="json"))
    now = _flat(config.model_dump(mode="json"))
    may_extend = config.optimizer.schedule == "constant" and not config.optimizer.warmup_ratio
    free = FREE_TO_CHANGE + (("train.steps",) if may_extend else ())
    for key in sorted(before.keys() | now.keys()):
        if before.get(key) != now.get(key) and not key.startswith(free):
            raise InputError(
                f"{saved}: {key} is {before.get(key)!r} in this run and {now.get(key)!r} now; "
                f"set it back to continue the run, or choose another run_dir"
            )


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat


def _versions() -> dict[str, Any]:
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "google-jetstream")
    return {
        "nrt_jax": nrt_jax.__version__,
        "git_revision": _git_revision(),
        "python": platform.python_version(),
        "devices": [str(device) for device in jax.devices()],
        "packages": {name: importlib.metadata.version(name) for name in names},
    }


def _git_revision() -> str | None:
    """Revision of the checkout that the package runs from, with a mark when it has changes."""
    where = Path(nrt_jax.__file__).parent
    command = ["git", "-C", str(where), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        result = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() or None
