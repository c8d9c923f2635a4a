"""SHA-256 digests of data files, by which other content is noticed."""

import hashlib
import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from nrt_jax.config.data import DataConfig
from nrt_jax.data.all_rows import library_rows
from nrt_jax.data.files import find_files, reaching
from nrt_jax.data.hub_rows import HubRows
from nrt_jax.data.training_rows import benchmark_source, naming_benchmarks

WHOLE = ""
"""Name of the only part of an input that is one file, however the file is called."""
LARGE_BYTES = 2**24
"""The cache of prepared data and the record of a run's inputs both ask for digests at a start."""


def digests_of_training_data(data: DataConfig) -> dict[str, str]:
    """Digests of all training files, and of those by which rows are left out.

    In a mixture, names of parts begin with that of the source.
    """
    parts = {}
    for name, source in zip(data.source_names, data.sources, strict=True):
        assert source.path is not None, "DataConfig requires a path for file sources"
        of_source = digests_of_data(source, source.path)
        parts |= {f"{name}/{file}".strip("/"): digest for file, digest in of_source.items()}
    return parts | digests_of_filters(data)


def digests_of_filters(data: DataConfig) -> dict[str, str]:
    """Digests of the files by which training rows are left out, under the names of the settings."""
    parts = {}
    for i, benchmark in enumerate(data.contamination):
        name, source = f"data.contamination[{i}]", benchmark_source(data, benchmark)
        with naming_benchmarks():
            of_benchmark = digests_of_data(source, source.path)
        parts |= {f"{name}/{file}".strip("/"): digest for file, digest in of_benchmark.items()}
    if data.leave_out is not None:
        parts |= digests_of_files({"data.leave_out": data.leave_out})
    return parts


def digests_of_data(config: DataConfig, where: Any) -> dict[str, str]:
    """Digests of the files that a data path means, named from the folder that holds all of them.

    Of a set of TFDS these are the files of the split and the types of the fields; of the hub the
    commit, which names the content of all files, stands for them.
    """
    library = library_rows(config, where)
    if isinstance(library, HubRows):
        return {WHOLE: library.commit}
    if library is not None:
        return digests_of_files(library.files)
    files = [file.path for file in find_files(where, config.source)]
    if len(files) == 1:
        return digests_of_files({WHOLE: files[0]})
    folder = os.path.commonpath([file.parent for file in files])
    return digests_of_files({os.path.relpath(file, folder): file for file in files})


def digests_of_files(paths: Mapping[str, Any]) -> dict[str, str]:
    """Full digests of the files that exist; a pipe can be read only once, and has none."""
    digests = {}
    for name, path in paths.items():
        with reaching(path):
            if path.is_file():
                digests[name] = _digest(path)
    return digests


def _digest(path: Any) -> str:
    """Of a file; a large one is read once per process unless its status says that it changed."""
    if isinstance(path, Path) and (status := path.stat()).st_size > LARGE_BYTES:
        changes = (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        return _remembered(path.absolute(), changes)
    return _read(path)


@lru_cache(maxsize=4096)
def _remembered(path: Path, changes: tuple[int, ...]) -> str:
    return _read(path)


def _read(path: Any) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
