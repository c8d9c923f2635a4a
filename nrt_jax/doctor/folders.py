"""The folders of a run: cache, run directory, model, tokenizer, data; and the disks under them."""

import errno
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nrt_jax import distributed
from nrt_jax.config.compilation import CompilationConfig
from nrt_jax.config.data import DataConfig
from nrt_jax.config.paths import user_cache
from nrt_jax.config.run import RunConfig
from nrt_jax.doctor.finding import Finding, size
from nrt_jax.errors import InputError

PROBE_BYTES = 32 * 2**20
LEAST_CACHE_BYTES, LEAST_RUN_BYTES = 1e9, 2e9
"""Room for the programs of one model, and for the metrics and samples of a run."""
_STATE_BYTES = 12
"""Of a weight in a checkpoint: itself and two moments, each in float32."""


def check_cache(config: CompilationConfig) -> Finding:
    """The folder of compiled programs."""
    named = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if named is None:
        return _check_cache("cache", "compilation.cache", config.cache, "compiled")
    if "://" in named:
        return Finding("cache", f"{named}: an address, which is not looked at")
    return _check_cache("cache", "JAX_COMPILATION_CACHE_DIR", Path(named), "compiled")


def check_data_cache(data: DataConfig) -> Finding:
    """The folder of rows that a start has tokenised."""
    return _check_cache("data cache", "data.cache", data.cache, "data")


def _check_cache(name: str, setting: str, cache: Path | str, of_user: str) -> Finding:
    if cache == "off":
        return Finding(name, f"off ({setting})")
    remedy = f"set {setting} to a folder that you may write to"
    try:
        folder = user_cache() / of_user if cache == "auto" else Path(cache)
    except RuntimeError as error:
        return Finding(name, str(error), remedy)
    return check_folder(name, folder, LEAST_CACHE_BYTES, remedy)


def check_folder(name: str, folder: Path, least_free: float | int, remedy: str) -> Finding:
    """Whether a folder can be made and written, how fast, and whether its disk has room."""
    make_room = (
        f"make room for {size(least_free)} on the disk of {folder}, or name a folder of another "
        "disk"
    )
    try:
        with _made(folder):
            written, read = disk_rates(folder)
            free = shutil.disk_usage(folder).free
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = f"{folder}: {error.strerror or error}"
        return Finding(name, reason, make_room if full else remedy)
    value = f"{folder}: writes {size(written)}/s, reads {size(read)}/s, {size(free)} free"
    figures = {"write_bytes_per_s": written, "read_bytes_per_s": read, "free_bytes": free}
    if free < least_free:
        return Finding(name, f"{value}, {size(least_free)} needed", make_room, figures)
    return Finding(name, value, None, figures)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make the folder, and remove afterwards what was not there before.

    With other processes it stays: they may be writing there.
    """
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    try:
        yield
    finally:
        if distributed.process_count() == 1:
            for path in new:
                path.rmdir()


def disk_rates(folder: Path, nbytes: int = PROBE_BYTES) -> tuple[float, float]:
    """Bytes per second written with fsync, and read back after the system has dropped its copy."""
    path, block = folder / f".doctor.{uuid.uuid4().hex}", os.urandom(2**20)
    try:
        start = time.perf_counter()
        with path.open("wb") as file:
            for _ in range(nbytes // len(block)):
                file.write(block)
            file.flush()
            os.fsync(file.fileno())
        written = time.perf_counter() - start
        with path.open("rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            start = time.perf_counter()
            while file.read(2**20):
                pass
        return nbytes / written, nbytes / (time.perf_counter() - start)
    finally:
        path.unlink(missing_ok=True)


def check_model(config: RunConfig) -> tuple[Finding, float]:
    """The checkpoint that a run starts from, whose headers alone are read; and its weights."""
    from nrt_jax.checkpoints.abstract_model import architecture_of
    from nrt_jax.checkpoints.import_format import is_imported
    from nrt_jax.checkpoints.safetensors_files import open_tensors

    path = config.model.path
    try:
        architecture = architecture_of(config.model)
        if path is not None and not is_imported(path):
            open_tensors(path)
    except (InputError, OSError) as error:
        return _unreadable("model", error, "correct model.path, or copy the model there"), 0.0
    weights = weights_of(architecture)
    where = "random weights" if path is None else str(path)
    value = f"{where}: {weights / 1e9:.3g} billion weights, {architecture.family}"
    return Finding("model", value, None, {"weights": weights}), weights


def weights_of(architecture: Any) -> float:
    """V D (1 + untied) + L (2 D d (Q + H) + 3 D F), norms left out, with Q query heads."""
    a = architecture
    heads = a.num_attention_heads + a.num_key_value_heads
    layer = 2 * a.hidden_size * a.head_dim * heads + 3 * a.hidden_size * a.intermediate_size
    tables = 1 if a.tie_word_embeddings else 2
    return float(tables * a.vocab_size * a.hidden_size + a.num_hidden_layers * layer)


def check_tokenizer(config: RunConfig) -> Finding:
    """The tokenizer and its think tokens."""
    from nrt_jax.checkpoints.abstract_model import load_tokenizer

    try:
        tokenizer = load_tokenizer(config)
    except (InputError, OSError) as error:
        return _unreadable("tokenizer", error, "correct data.tokenizer or model.path")
    return Finding("tokenizer", f"{config.tokenizer_directory}: {tokenizer.vocab_size:,} tokens")


def check_data(data: DataConfig) -> Finding:
    """Every data file is opened; of a library's set the first row is read."""
    files = 0
    try:
        for source in data.sources:
            if not source.generated:
                files += _open(source, source.path)
        if data.eval_path is not None:
            files += _open(data, data.eval_path)
    except (InputError, OSError) as error:
        return _unreadable("data", error, "correct data.path, or copy the data there")
    if not files:
        return Finding("data", f"the built-in generator {data.location}")
    return Finding("data", f"{data.short_location(2)}: {files} files can be read")


def _open(source: DataConfig, where: Any) -> int:
    from nrt_jax.data.all_rows import library_rows, read_all
    from nrt_jax.data.files import find_files, reaching

    if library_rows(source, where) is not None:
        next(read_all(source, where, lambda names: names[:1]), None)
        return 1
    files = find_files(where, source.source)
    for file in files:
        with reaching(file.path), file.path.open("rb") as opened:
            opened.read(1)
    return len(files)


def check_run_dir(config: RunConfig, weights: float | int) -> Finding:
    """The run directory, with room for the checkpoints that are kept and the one being written."""
    kept = config.checkpoint.keep_last + (config.checkpoint.best_metric is not None) + 1
    least = LEAST_RUN_BYTES + kept * _STATE_BYTES * weights
    remedy = "set run_dir to a directory that you may write to and that all hosts share"
    return check_folder("run directory", config.run_dir, least, remedy)


def _unreadable(name: str, error: InputError | OSError, remedy: str) -> Finding:
    """The finding of an error; most errors of ours end with their own remedy."""
    if isinstance(error, OSError) and error.filename:
        return Finding(name, f"{error.filename}: {error.strerror}", remedy)
    reason, _, own = " ".join(str(error).split()).rpartition("; ")
    return Finding(name, reason, own) if reason else Finding(name, own, remedy)
