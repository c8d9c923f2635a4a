"""Which files a data path means, and in which format each is."""

import fnmatch
import glob
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.config.rows import FileFormat
from nrt_jax.errors import InputError
from nrt_jax.strict_json import parse_json

_FORMATS: dict[str, FileFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".zst")
_SHARD = re.compile(r"(?P<set>.+)-(?P<index>\d{5,})-of-(?P<count>\d{5,})(?P<suffix>(\.\w+)*)")
_SAVED_SPLITS, _SAVED = "dataset_dict.json", "state.json"
_REMEDY = "correct data.path or data.eval_path"


class DataFile(NamedTuple):
    """A file of rows."""

    path: Any
    """A Path, or an epath.Path of another place."""
    format: FileFormat


def find_files(
    where: Path | str | Sequence[Path | str], source: FileFormat | None
) -> list[DataFile]:
    """The files of a `data.path`, those of a folder and of a glob in the order of their names.

    `source` is their format; None tells it from each name. A file that is named need not exist.
    Raises InputError for a folder or a glob without data files, a folder with several formats or
    sets, a shard that is missing, and a name that tells no format.
    """
    if not isinstance(where, Path | str):
        return [file for one in where for file in find_files(one, source)]
    path = as_path(where)
    try:
        with reaching(path):
            if glob.has_magic(str(path)) and not path.exists():
                return [DataFile(file, source or format_of(file)) for file in _matches(path)]
            if path.is_dir():
                return _of_folder(path, source)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}; {_REMEDY}") from error
    return [DataFile(path, source or format_of(path))]


def as_path(where: Path | str) -> Any:
    """A Path of this machine, or the epath.Path of an address."""
    if isinstance(where, Path):
        return where
    from etils import epath

    return epath.Path(where)


@contextmanager
def reaching(path: Any) -> Iterator[None]:
    """Whatever the client of another place raises as an InputError; a Path has no client."""
    try:
        yield
    except (InputError, GeneratorExit):
        raise
    except Exception as error:  # clients have their own for networks, rights, names and packages
        if isinstance(path, Path):
            raise
        reason = " ".join(str(error).split()) or type(error).__name__
        missing = isinstance(error, ImportError)
        remedy = "install it" if missing else "check the address and the network, or copy the files"
        raise InputError(f"{path}: cannot be reached ({reason}); {remedy}") from error


def format_of(path: Any) -> FileFormat:
    """The format that a name tells; InputError where it tells none."""
    found = _format(path.name)
    if found is None:
        raise InputError(
            f"{path}: the name tells no format; set data.source to jsonl, json, csv, tsv, parquet "
            "or arrow"
        )
    return found


def _format(name: str) -> FileFormat | None:
    stem, suffix = os.path.splitext(name.lower())
    if suffix in _PACKED:
        suffix = os.path.splitext(stem)[1]
    return _FORMATS.get(suffix)


def _matches(pattern: Any) -> list[Any]:
    """The files of a glob, which may lack none of a set of shards that it matches."""
    if isinstance(pattern, Path):
        found = [Path(name) for name in glob.glob(str(pattern), recursive=True)]
    else:
        bucket = type(pattern)(*pattern.parts[:3])
        found = list(bucket.glob("/".join(pattern.parts[3:])))
    files = sorted(path for path in found if not path.is_dir())
    if not files:
        raise InputError(f"{pattern}: matches no file; {_REMEDY}")
    _check_shards(files, pattern.name)
    return files


def _of_folder(folder: Any, source: FileFormat | None) -> list[DataFile]:
    """The data files of a folder, or of a directory that the library datasets has saved."""
    entries = {entry.name: entry for entry in folder.iterdir()}
    if source in (None, "arrow") and (_SAVED in entries or _SAVED_SPLITS in entries):
        return _saved(folder, entries)
    formats = {name: _format(name) for name in sorted(entries) if name[0] not in "._"}
    names = [name for name, found in formats.items() if found and source in (None, found)]
    names = [name for name in names if not entries[name].is_dir()]
    if not names:
        kind = "data" if source is None else source
        raise InputError(
            f"{folder}: Is a directory without {kind} files; set data.path or data.eval_path to a "
            "file, or to a folder of shards"
        )
    kinds = dict.fromkeys(formats[name] for name in names)
    if len(kinds) > 1:
        raise InputError(
            f"{folder}: holds files of several formats ({', '.join(map(str, kinds))}); set "
            "data.source to one of them"
        )
    sets = {match["set"] for name in names if (match := _SHARD.fullmatch(name))}
    if len(sets) > 1:
        named = ", ".join(sorted(sets))
        raise InputError(
            f"{folder}: holds the shards of several sets ({named}); name one, as in "
            f"data.path='{folder}/{min(sets)}-*'"
        )
    files = [entries[name] for name in names]
    _check_shards(files, "*")
    return [DataFile(file, source or format_of(file)) for file in files]


def _check_shards(files: Sequence[Any], pattern: str) -> None:
    """InputError when a shard whose name the pattern matches is not there."""
    there = {(file.parent, file.name) for file in files}
    for file in files:
        if match := _SHARD.fullmatch(file.name):
            for index in range(int(match["count"])):
                number = str(index).zfill(len(match["index"]))
                name = f"{match['set']}-{number}-of-{match['count']}{match['suffix']}"
                if fnmatch.fnmatchcase(name, pattern) and (file.parent, name) not in there:
                    raise InputError(
                        f"{file.parent / name}: this shard is missing; restore it, or name those "
                        "that you want in a list"
                    )


def _saved(folder: Any, entries: dict[str, Any]) -> list[DataFile]:
    """The Arrow files of a data set that `datasets` has saved with save_to_disk."""
    if _SAVED_SPLITS in entries:
        splits = _read(entries[_SAVED_SPLITS]).get("splits")
        if not isinstance(splits, list) or len(splits) != 1:
            named = ", ".join(map(str, splits)) if isinstance(splits, list) else "unnamed"
            raise InputError(
                f"{folder}: holds the splits {named}; name one of them, as in {folder}/train"
            )
        return find_files(_named(folder / str(splits[0])), "arrow")
    described = _read(entries[_SAVED]).get("_data_files")
    try:
        names = [str(file["filename"]) for file in described or ()]
    except (TypeError, KeyError):
        names = []
    if not names:
        raise InputError(f"{entries[_SAVED]}: names no data files; save the data set again")
    for name in names:
        if name not in entries:
            raise InputError(f"{folder / name}: this file of the data set is missing; restore it")
    return [DataFile(folder / name, "arrow") for name in names]


def _named(path: Any) -> Path | str:
    return path if isinstance(path, Path) else str(path)


def _read(path: Any) -> dict[str, Any]:
    try:
        value = parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); save the data set again") from error
    return value if isinstance(value, dict) else {}
