"""SHA-256 digests of data files, by which other content is noticed."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import FileFormat
from nrt_jax.data.files import find_files, reaching

WHOLE = ""
"""Name of the only part of an input that is one file, however the file is called."""


def digests_of_training_data(data: DataConfig) -> dict[str, str]:
    """Digests of all training files; in a mixture, names of parts begin with that of the source."""
    parts = {}
    for name, source in zip(data.source_names, data.sources, strict=True):
        assert source.path is not None, "DataConfig requires a path for file sources"
        of_source = digests_of_data(source.path, source.source)
        parts |= {f"{name}/{file}".strip("/"): digest for file, digest in of_source.items()}
    return parts


def digests_of_data(
    where: Path | str | Sequence[Path | str], source: FileFormat | None
) -> dict[str, str]:
    """Digests of the files that a data path means, named from the folder that holds all of them."""
    files = [file.path for file in find_files(where, source)]
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
                with path.open("rb") as file:
                    digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return digests
