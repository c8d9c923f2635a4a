"""Prepared data of large files, kept between runs: the first start tokenises, later ones read.

Smaller files are tokenised in memory at every start. That takes seconds, and leaves no files.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import filelock

import nrt_jax
from nrt_jax.config.data import DataConfig
from nrt_jax.config.paths import user_cache
from nrt_jax.data.all_rows import library_rows
from nrt_jax.data.files import find_files, reaching
from nrt_jax.data.hub_rows import HubRows
from nrt_jax.data.manifest import FORMAT, NAMED, is_prepared
from nrt_jax.data.merge import merge
from nrt_jax.data.plan import content_of, sources
from nrt_jax.data.prepare import prepare
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError, RunFailed

log = logging.getLogger(__name__)

MEMORY_BYTES = 2**24
"""Files of at most this size in all stay in memory."""
BYTES_PER_WORKER = 2**26
"""A process takes seconds to start, and tokenises this much in ten or twenty."""


def cached_directory(config: DataConfig, tokenizer: Tokenizer) -> Path | None:
    """The prepared data of a config's files, made at the first call; None for rows in memory.

    The name of the directory is a digest of all that decides its content: files, settings of rows
    and filters, tokenizer and template. Processes that come at once wait for the first, which
    prepares; one that was killed is gone on with. Raises InputError as `prepare` and `merge` do,
    and RunFailed where the folder of the cache cannot be written.
    """
    if config.cache == "off":
        return None
    nbytes = _size(config)
    if nbytes is not None and nbytes <= MEMORY_BYTES:
        return None
    content, folder = content_of(config, tokenizer), _folder(config)
    directory = folder / _key(content)
    with _naming_the_setting(config, folder):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with _locked(directory):
            if is_prepared(directory):
                log.info("data: reading the tokens that an earlier run left in %s", directory)
            else:
                log.info("data: tokenising once into %s (data.cache)", directory)
                _prepare(config, tokenizer, directory, _workers(nbytes))
    return directory


def _prepare(config: DataConfig, tokenizer: Tokenizer, directory: Path, workers: int) -> None:
    try:
        merge(prepare(config, tokenizer, directory, workers=workers, share=(0, 1)), workers)
    except InputError:
        # What mends it gives another directory.
        shutil.rmtree(directory, ignore_errors=True)
        raise


def _folder(config: DataConfig) -> Path:
    if config.cache != "auto":
        return Path(config.cache)
    try:
        return user_cache() / "data"
    except RuntimeError as error:
        raise InputError(
            f"data.cache=auto: {error}; name a folder, or set data.cache=off"
        ) from error


def _key(content: dict[str, Any]) -> str:
    """Digest of a plan without the names of what has digests, and of the version of the program."""
    tokens = {
        name: {key: of for key, of in value.items() if key != NAMED}
        if isinstance(value, dict)
        else value
        for name, value in content["tokens"].items()
    }
    text = json.dumps([FORMAT, nrt_jax.__version__, content | {"tokens": tokens}], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _size(config: DataConfig) -> int | None:
    """Bytes of all files as they are stored; None for the hub, which does not tell."""
    total = 0
    for source in sources(config):
        library = library_rows(source.config, source.config.path)
        if isinstance(library, HubRows):
            return None
        if library is not None:
            files = list(library.files.values())
        else:
            files = [file.path for file in find_files(source.config.path, source.config.source)]
        for file in files:
            with reaching(file):
                # What is missing is refused when it is read.
                total += _bytes_of(file) if file.exists() else 0
    return total


def _bytes_of(file: Any) -> int:
    status = file.stat()
    return status.st_size if isinstance(file, Path) else status.length


def _workers(nbytes: int | None) -> int:
    cores = os.cpu_count() or 1
    return cores if nbytes is None else min(cores, 1 + nbytes // BYTES_PER_WORKER)


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of a directory of the cache; waits for another process that has it."""
    lock = filelock.FileLock(f"{directory}.lock")
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        log.info("data: waiting for another process, which prepares %s", directory)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def _naming_the_setting(config: DataConfig, folder: Path) -> Iterator[None]:
    """Errors in writing the cache name data.cache; those in reading the rows stay as they are."""
    try:
        yield
    except NotImplementedError as error:  # of filelock
        raise InputError(
            f"data.cache={folder}: has no file locks; name a folder that has, or set data.cache=off"
        ) from error
    except OSError as error:
        if not str(error.filename).startswith(str(folder)):
            raise
        raise RunFailed(
            f"data.cache={config.cache}: {error.filename}: {error.strerror}; make room or allow "
            "access there, name another folder, or set data.cache=off to tokenise in memory at "
            "every start"
        ) from error
