"""The documents of the benchmarks, from a folder (`--data`) or from the Hugging Face hub.

A task file names `load` of its module as lm-eval's `custom_dataset`. The folder reaches it by the
metadata that lm-eval gives every task, so that the same files also run under lm-eval alone.
"""

import csv
import gzip
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.errors import InputError
from nrt_jax.evaluation.tasks import TASKS_DIR

Document = dict[str, Any]
"""What a task asks and grades. `id` is the same for every model; `group` is "" or a subject."""


class Documents(list[Document]):
    """The documents of a split, with the one attribute that lm-eval asks of a data set."""

    @property
    def features(self) -> dict[str, None]:
        """The fields of a document."""
        return dict.fromkeys(self[0])


class Row(NamedTuple):
    """A record of a file as it was read; `where` names it in errors."""

    where: str
    values: Mapping[str, Any]

    def text(self, field: str) -> str:
        """A field that must be there and be a text with something in it."""
        value = self.values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.bad(field, "is missing" if value in (None, "") else f"is {value!r:.40}")
        return value

    def texts(self, field: str) -> list[str]:
        """A field that must be a list of texts, and not an empty one."""
        value = self.values.get(field)
        if not isinstance(value, list) or not value or not all(isinstance(t, str) for t in value):
            raise self.bad(field, "is missing" if not value else f"is {value!r:.40}")
        return value

    def bad(self, field: str, problem: str) -> InputError:
        """The error of a row that cannot be asked or graded."""
        return InputError(f"{self.where}: {field} {problem}; correct it or leave out the row")


_Rows = tuple[str, Iterable[Any], Callable[[Mapping[str, Any]], Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the rows of a benchmark are."""

    files: tuple[str, ...]
    """Patterns below the data folder, such as "mmlu/test/*.csv"; the first that matches is read."""
    read: Callable[[Path], Iterable[Mapping[str, Any]]]
    """The rows of one of these files."""
    origin: str
    """Where the public files are."""
    hub: str
    configs: tuple[str | None, ...] = (None,)
    split: str = "test"
    from_file: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda row: row
    from_hub: Callable[..., Mapping[str, Any]] = lambda row, config: row
    """Bring a row of a file, or of the hub and its `config`, to one form."""

    def rows(self, data_dir: str | None) -> Iterator[Row]:
        """All rows, each with its file and number."""
        for name, values, convert in self._files(data_dir) if data_dir else self._configs():
            number = 0
            try:
                for number, row in enumerate(values, 1):
                    if not isinstance(row, Mapping):
                        raise TypeError(f"{row!r:.40} is no object")
                    yield Row(f"{name}, row {number}", convert(row))
            except InputError:
                raise
            except (AttributeError, LookupError, TypeError, ValueError) as error:
                what = f"{type(error).__name__}: {error}"
                raise InputError(
                    f"{name}, row {number or 1}: {what}; correct it or leave out the row"
                ) from error

    def _files(self, data_dir: str) -> Iterator[_Rows]:
        folder = Path(data_dir)
        if not folder.is_dir():
            raise InputError(f"--data {folder} is no folder; name one with a folder per benchmark")
        paths = next(filter(None, (sorted(folder.glob(pattern)) for pattern in self.files)), [])
        if not paths:
            names = " or ".join(self.files)
            raise InputError(f"--data {folder}: no {names}; the public file is {self.origin}")
        for path in paths:
            yield path.relative_to(folder).as_posix(), self.read(path), self.from_file

    def _configs(self) -> Iterator[_Rows]:
        import datasets

        for config in self.configs:
            try:
                rows = datasets.load_dataset(self.hub, config, split=self.split)
            except Exception as error:  # the hub's client raises errors of many libraries
                reason = str(error).partition("\n")[0]
                raise InputError(
                    f"{self.hub} cannot be read from the hub ({reason:.120}); name a folder that "
                    f"has {self.files[0]} by --data; the public file is {self.origin}"
                ) from error
            name = "/".join(filter(None, (self.hub, config, self.split)))
            yield name, rows, partial(self.from_hub, config=config)


def load_documents(
    source: Source, document: Callable[[Row], Document], data_dir: str | None
) -> dict[str, Documents]:
    """The split `test` of a benchmark; raises InputError for missing files and unusable rows.

    Where documents have groups, each group's first comes before any group's second, so that a
    limit takes documents of all groups.
    """
    groups: dict[str, list[Document]] = {}
    for row in source.rows(data_dir):
        name = row.where.replace(", row ", ":")
        made = {"id": name, "group": "", **document(row)}
        groups.setdefault(made["group"], []).append(made)
    if not groups:
        raise InputError(f"{source.files[0]}: no rows; the public file is {source.origin}")
    turns = zip_longest(*groups.values())
    return {"test": Documents(made for turn in turns for made in turn if made is not None)}


def task_manager(data_dir: Path | None, *, unsafe_code: bool = False) -> Any:
    """lm-eval's TaskManager of our tasks alone, with their data folder; None reads from the hub."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise InputError(
            f"the benchmarks need lm-eval ({error}); pip install 'nrt-jax[eval]'"
        ) from error
    return TaskManager(
        include_path=TASKS_DIR,
        include_defaults=False,
        metadata={"data_dir": data_dir and str(data_dir), "unsafe_code": unsafe_code},
    )


# --- kinds of files ------------------------------------------------------------------------------


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, which may be compressed by gzip."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode("utf-8-sig")
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read ({error}); copy it again") from error


def read_jsonl(path: Path) -> Iterator[Any]:
    """The objects of a file with one per line, which may be compressed by gzip."""
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            yield _parse(line, f"{path}, line {number}")


def read_json(path: Path) -> Any:
    """The value of a JSON file."""
    return _parse(read_text(path), str(path))


def read_csv(path: Path, names: tuple[str, ...]) -> Iterator[dict[str, str]]:
    """The rows of a CSV file without a header; a short row lacks the last fields."""
    for row in csv.reader(io.StringIO(read_text(path), newline="")):
        yield dict(zip(names, row, strict=False))


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(f"{where} is no JSON ({error}); copy the file again") from error
