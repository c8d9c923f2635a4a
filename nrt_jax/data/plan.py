"""What a preparation makes and from what: begun once, then shared by all its processes."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from nrt_jax.atomic_files import write_atomically
from nrt_jax.config.data import DataConfig
from nrt_jax.data.digests import digests_of_data, digests_of_filters
from nrt_jax.data.manifest import NAMED, is_prepared, read_manifest, token_settings
from nrt_jax.data.row_choice import RowChoice, choose_rows, row_order
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.training_rows import evaluation_source, sources_of
from nrt_jax.errors import InputError
from nrt_jax.strict_json import parse_json

ROWS_PER_PART = 1024
WORK = ".unfinished"
"""Folder of what is not finished; gone when the manifest is there."""
_PLAN_FILE, _TOTALS_FILE = "plan.json", "totals.json"
_OF_PLAN = ("tokens", "config", "filters", "rows_per_part")
_OF_SOURCE = ("name", "path", "evaluates", "files")
"""What the manifest has of a plan."""
_NOT_OF_ROWS = {"shuffle", "chain", "hard_tokens", "tokenizer", "cache", "read_threads"}
"""Settings that change no row; the tokenizer counts by what it does, not by its path."""


class Source(NamedTuple):
    """Rows that are read one after another."""

    name: str
    config: DataConfig
    evaluates: bool
    """Whether these are the rows of data.eval_path."""


@dataclass(frozen=True)
class Plan:
    """A preparation in its directory."""

    out: Path
    config: DataConfig
    content: dict[str, Any]
    """The settings and digests that decide every byte of the result."""

    @property
    def finished(self) -> bool:
        """Whether the manifest, which is written last, is there."""
        return is_prepared(self.out)

    @property
    def work(self) -> Path:
        """Folder of what is not finished."""
        return self.out / WORK

    @cached_property
    def sources(self) -> list[Source]:
        """The training sources, then the evaluation's."""
        return sources(self.config)

    @cached_property
    def choices(self) -> list[RowChoice | None]:
        """Of each source which rows are read; this may read the sources of all rows."""
        return [choose_rows(source.config) for source in self.sources]

    @property
    def training(self) -> list[Source]:
        """The training sources."""
        return [source for source in self.sources if not source.evaluates]

    def part_path(self, source: int, part: int) -> Path:
        """The file of a part."""
        return self.work / f"{source:03d}-{part:06d}.part"

    def write_totals(self, rows: list[int], shards: int) -> None:
        """Keep the number of rows of each source, which a process knows that has read them all."""
        orders = [choice.order for choice in self.choices if choice and choice.order is not None]
        # A permutation is of one source.
        counted = len(orders[0]) if orders else None
        content = json.dumps({"rows": rows, "shards": shards, "counted": counted})
        write_atomically(self.work / _TOTALS_FILE, content.encode(), shared=True)

    def missing_part(self) -> str | None:
        """What has to run before the merge; None when all parts are there."""
        try:
            totals = self._totals()
        except FileNotFoundError:
            return (
                "no process has read all rows yet; run nrt-jax data prepare CONFIG OUT to its end"
            )
        paths = (path for paths in self.part_paths(totals["rows"]) for path in paths)
        for number, path in enumerate(paths):
            if not path.exists():
                share = f"{number % totals['shards']}/{totals['shards']}"
                return f"rows are missing; run nrt-jax data prepare CONFIG OUT --shard {share}"
        return None

    def part_paths(self, rows: list[int] | None = None) -> list[list[Path]]:
        """The parts of each source, from its number of rows."""
        rows = rows or self._totals()["rows"]
        return [
            [self.part_path(source, part) for part in range(-(-count // ROWS_PER_PART))]
            for source, count in enumerate(rows)
        ]

    def row_order(self) -> Int64[np.ndarray, "rows"]:
        """All rows of the source in the order of data.permutation_seed, by their numbers."""
        return row_order(self.config, self._totals()["counted"])

    def _totals(self) -> dict[str, Any]:
        remedy = "remove it and run nrt-jax data prepare again"
        return _read_json(self.work / _TOTALS_FILE, remedy)


def sources(config: DataConfig) -> list[Source]:
    """What a config reads rows from, the presets resolved."""
    named = zip(config.source_names, sources_of(config), strict=True)
    found = [Source(name, of_source, False) for name, of_source in named]
    if config.eval_path is not None:
        found.append(Source("", evaluation_source(config), True))
    return found


def content_of(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """The settings and digests that decide every byte of what is prepared."""
    read = [
        {
            "name": source.name,
            "path": source.config.location,
            "evaluates": source.evaluates,
            "files": digests_of_data(source.config, source.config.path),
        }
        for source in sources(config)
        if source.config.path is not None
    ]
    return {
        "tokens": token_settings(config, tokenizer),
        "config": config.model_dump(mode="json", exclude=_NOT_OF_ROWS),
        "filters": digests_of_filters(config),
        "sources": read,
        "rows_per_part": ROWS_PER_PART,
    }


def begin(config: DataConfig, tokenizer: Tokenizer, out: Path) -> Plan:
    """The plan of a config in `out`, begun anew or gone on with.

    Raises InputError for a config without files to read, and for an `out` that was begun with
    another config or other files, or that holds anything else.
    """
    if config.generated:
        raise InputError(
            f"data.source={config.source}: its rows are made when they are read; there is nothing "
            "to prepare"
        )
    plan = Plan(out, config, content_of(config, tokenizer))
    before = _content_of(out)
    if before is None:
        if out.exists() and not out.is_dir():
            raise InputError(f"{out}: is a file; give a new folder")
        # Another process may begin the same at this moment.
        if out.is_dir() and any(entry.name != WORK for entry in out.iterdir()):
            raise InputError(f"{out}: exists and is not empty; give a new folder")
        plan.work.mkdir(parents=True, exist_ok=True)
        write_atomically(
            plan.work / _PLAN_FILE, json.dumps(plan.content, indent=1).encode(), shared=True
        )
    elif difference := _difference(before, plan.content):
        raise InputError(
            f"{out}: holds data of another config or of other files: {difference}; undo it, or "
            "give a new folder"
        )
    return plan


def read_plan(out: Path) -> Plan:
    """The plan of a preparation that was begun in `out`; InputError without one."""
    content = _content_of(out)
    if content is None:
        raise InputError(
            f"{out}: nothing was prepared here; run nrt-jax data prepare CONFIG {out} first"
        )
    return Plan(out, DataConfig.model_validate(content["config"]), content)


def _content_of(out: Path) -> dict[str, Any] | None:
    if is_prepared(out):
        content = read_manifest(out).content
        read = [{key: source[key] for key in _OF_SOURCE} for source in content["sources"]]
        return {key: content.get(key) for key in _OF_PLAN} | {"sources": read}
    path = out / WORK / _PLAN_FILE
    if not path.is_file():
        return None
    return _read_json(path, f"remove {out} and begin again")


def _read_json(path: Path, remedy: str) -> dict[str, Any]:
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise InputError(f"{path}: is damaged ({error}); {remedy}") from error


def _difference(before: Any, now: Any) -> str | None:
    """The first value that differs, with its name, before and now."""
    old, new = dict(_flat(before)), dict(_flat(now))
    for name in [*old, *new]:
        if not name.endswith(f".{NAMED}") and old.get(name) != new.get(name):
            return f"{name} was {old.get(name)} and is {new.get(name)}"
    return None


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in items:
            yield from _flat(inner, f"{name}.{key}".strip("."))
    else:
        yield name, value
