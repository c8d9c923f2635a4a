"""A directory that appears whole or not at all."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from nrt_jax.checkpoints.json_files import one_line
from nrt_jax.errors import InputError


@contextmanager
def new_directory(directory: Path, *, every_process: bool = False) -> Iterator[Path | None]:
    """Yield a folder to fill; rename it to `directory` at the end, remove it on an error.

    The first process makes and renames it; the others get None, or the same folder with
    `every_process`. Raises InputError when `directory` is not empty or cannot be written.
    """
    check_new(directory)
    directory = Path(directory).resolve()
    # A fixed name, so that the next try removes what a killed one left.
    folder = directory.parent / f".{directory.name}.partial"
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
        _wait_for_all("made")
        yield folder if first or every_process else None
        _wait_for_all("filled")
        if first:
            folder.rename(directory)
        _wait_for_all("named")
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {one_line(error)}") from None
    finally:
        if first:
            shutil.rmtree(folder, ignore_errors=True)


def check_new(directory: Path) -> None:
    """InputError when `directory` exists and is not an empty directory."""
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise InputError(f"{directory}: exists and is not empty; give a new folder")


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"new directory {what}")
