"""`nrt-jax data merge`: from the parts of all processes to shards, metadata and manifest.

Which rows are duplicates, drawn, held out and left out is decided here, from digests of all parts.
Some 46 bytes per row are in memory for it, and the records pass through one by one.
"""

import hashlib
import json
import logging
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64
from tqdm import tqdm

from nrt_jax.atomic_files import write_atomically
from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRows, rejected_lines
from nrt_jax.data.leave_out import LeaveOut
from nrt_jax.data.manifest import (
    FORMAT,
    MANIFEST_FILE,
    REJECTED_FILE,
    Manifest,
    Shard,
    read_manifest,
)
from nrt_jax.data.mixture import draw_mixture
from nrt_jax.data.part_duplicates import Repeated, find_repeated, runs_by_part
from nrt_jax.data.parts import TABLE, Part, read_part, read_records, read_table
from nrt_jax.data.plan import Plan
from nrt_jax.data.prepared_files import FOLDER, shard_name, write_metadata, write_shard
from nrt_jax.data.row_choice import row_ranks
from nrt_jax.data.selection import IN_EVALUATION, Permuted, select
from nrt_jax.data.source_counts import licences
from nrt_jax.data.workers import in_workers
from nrt_jax.errors import InputError

log = logging.getLogger(__name__)

SHARD_BYTES = 2**27
"""Most bytes of records per shard, before they are packed."""


def merge(plan: Plan, workers: int) -> Manifest:
    """Write what the parts of a plan hold as prepared data, and remove them.

    A killed merge goes on with its unfinished shards. Raises InputError when parts are missing,
    when too many rows of a source cannot be used, and when nothing is left to train on.
    """
    if not plan.finished:
        if missing := plan.missing_part():
            raise InputError(f"{plan.out}: {missing}")
        try:
            _merge(plan, workers)
        except FileNotFoundError:
            # Another process may have merged the same parts, and removed them.
            if not plan.finished:
                raise
    shutil.rmtree(plan.work, ignore_errors=True)
    return read_manifest(plan.out)


def _merge(plan: Plan, workers: int) -> None:
    read = [[read_part(path) for path in paths] for paths in plan.part_paths()]
    training = chain.from_iterable(plan.part_paths()[: len(plan.training)])
    repeated = find_repeated(list(training), keep=plan.config.duplicates == "keep")
    bad = _bad_rows(plan, read, repeated)
    _check_leave_out(plan, bad)
    chosen, overlap = _choose(plan, read, repeated)
    shards = _write_shards(plan, chosen, workers)
    write_metadata(plan.out / FOLDER, {name: [s.rows for s in of] for name, of in shards.items()})
    rejected = [row for of_source in bad for row in of_source.rejected]
    if rejected:
        write_atomically(plan.out / REJECTED_FILE, rejected_lines(rejected), shared=True)
    reasons = sum((of_source.counts for of_source in bad), Counter())
    if overlap:
        reasons[IN_EVALUATION] = overlap
    content = {
        "format": FORMAT,
        "rejected": dict(reasons),
        "splits": {split: _split(chosen[split], of) for split, of in shards.items()},
        "examples_by_source": _by_source(plan.config, chosen),
        **plan.content,
        "sources": _sources(plan, read, bad),
    }
    write_atomically(
        plan.out / MANIFEST_FILE, (json.dumps(content, indent=1) + "\n").encode(), shared=True
    )


# --- which rows ----------------------------------------------------------------------------------


class Rows(NamedTuple):
    """Chosen rows of some sources' parts."""

    places: Int64[np.ndarray, "rows"]
    """Of the rows in the joined tables, in the order in which they are written."""
    table: np.ndarray
    """The joined tables."""
    first_places: Int64[np.ndarray, "parts"]
    """Of each part."""
    paths: list[Path]
    """Of each part."""
    source_names: list[str]
    """To which the table's column `source` points."""

    def column(self, name: str) -> np.ndarray:
        """A column of the table, for the chosen rows."""
        return self.table[name][self.places]


_DECIDING = ("key", "source")
"""What of the parts' tables decides about rows; a permutation needs their numbers too."""
_WRITTEN = ("nbytes", "prompt_tokens", "answer_tokens", "source")
"""What is needed of the chosen rows."""


class _Questions(Sequence[bytes]):
    """Digests of the questions of some rows."""

    def __init__(self, rows: Rows):
        self._keys, self._places = rows.table["key"], rows.places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, i: Any) -> Any:
        return self._keys[self._places[i]].tobytes()


def _choose(plan: Plan, read: list[list[Part]], repeated: Repeated) -> tuple[dict[str, Rows], int]:
    """The rows of each split, and how many the overlap with the evaluation leaves out."""
    paths, trains = plan.part_paths(), len(plan.training)
    chosen = _selected(plan, read, repeated)
    # Read anew, since the digests of the questions take more memory than all other columns.
    train = _joined(read[:trains], paths[:trains], _WRITTEN)
    evaluates = _joined(read[trains:], paths[trains:], _WRITTEN) if read[trains:] else train
    splits = {"train": train._replace(places=chosen.train)}
    if len(chosen.evaluation):
        splits["eval"] = evaluates._replace(places=chosen.evaluation)
    return splits, chosen.overlap


class _Chosen(NamedTuple):
    train: Int64[np.ndarray, "train"]
    """Places of rows in the joined tables of the training sources."""
    evaluation: Int64[np.ndarray, "evaluation"]
    """The same in those of the evaluation files, or in these without such files."""
    overlap: int


def _selected(plan: Plan, read: list[list[Part]], repeated: Repeated) -> _Chosen:
    """The places of the rows of training and evaluation."""
    paths, trains = plan.part_paths(), len(plan.training)
    columns = _DECIDING if plan.config.permutation_seed is None else (*_DECIDING, "index")
    rows = _joined(read[:trains], paths[:trains], columns)
    ends = np.cumsum([sum(part.usable for part in parts) for parts in read[:trains]])
    rows = rows._replace(places=_drawn(plan.config, rows, ends, repeated))
    from_files = _joined(read[trains:], paths[trains:], _DECIDING) if read[trains:] else None
    in_files = None if from_files is None else _Questions(from_files)
    chosen = select(plan.config, _Questions(rows), in_files, _permuted(plan, rows))
    evaluates = rows if from_files is None else from_files
    return _Chosen(
        train=rows.places[chosen.train],
        evaluation=evaluates.places[chosen.evaluation],
        overlap=chosen.overlap,
    )


def _drawn(
    config: DataConfig, rows: Rows, ends: Int64[np.ndarray, "sources"], repeated: Repeated
) -> Int64[np.ndarray, "rows"]:
    """The places of the rows that are no duplicates, of a mixture of those that are drawn."""
    usable = np.delete(rows.places, repeated.places)
    if not config.mixture:
        return usable
    of_sources = np.split(usable, np.searchsorted(usable, ends[:-1]))
    drawn = draw_mixture(config, [len(of) for of in of_sources])
    return np.concatenate([of[chosen] for of, chosen in zip(of_sources, drawn, strict=True)])


def _permuted(plan: Plan, rows: Rows) -> Permuted | None:
    if plan.config.permutation_seed is None:
        return None
    names = [rows.source_names[number] for number in rows.column("source")]
    return Permuted(row_ranks(plan.row_order())[rows.column("index")], names)


def _joined(read: list[list[Part]], paths: list[list[Path]], columns: Sequence[str]) -> Rows:
    """All rows of some sources, with columns of their tables."""
    parts, files = list(chain.from_iterable(read)), list(chain.from_iterable(paths))
    names = list(dict.fromkeys(name for part in parts for name in part.source_names))
    ends = np.cumsum([part.usable for part in parts])
    table = np.empty(ends[-1], [(name, TABLE[name]) for name in columns])
    for part, file, end in zip(parts, files, ends, strict=True):
        of_part = table[end - part.usable : end]
        of_part[:] = read_table(file)[list(columns)]
        renumbered = np.array([names.index(name) for name in part.source_names], np.uint32)
        of_part["source"] = renumbered[of_part["source"]]
    first_places = ends - [part.usable for part in parts]
    return Rows(np.arange(len(table)), table, first_places, files, names)


def _bad_rows(plan: Plan, read: list[list[Part]], repeated: Repeated) -> list[BadRows]:
    """The rows of each source that are left out; InputError when too many are unusable."""
    found = []
    for source, parts, paths in zip(plan.sources, read, plan.part_paths(), strict=True):
        bad = BadRows(source.config.location)
        for part, path in zip(parts, paths, strict=True):
            rows = part.discarded_rows() + repeated.by_part.get(path, [])
            for _, row in sorted(rows):
                bad.add_discarded(row)
        bad.check(_usable(parts, bad), plan.config.max_bad_share)
        found.append(bad)
    return found


def _usable(parts: list[Part], bad: BadRows) -> int:
    """How many rows of a source are not left out."""
    return sum(part.rows for part in parts) - bad.counts.total()


def _check_leave_out(plan: Plan, bad: list[BadRows]) -> None:
    """InputError when the parts have not met every row of data.leave_out."""
    config = plan.config
    if config.leave_out is not None:
        leave_out = LeaveOut(config.leave_out)
        of_training = bad[: len(plan.training)]
        leave_out.meet((row.file, row.row) for of in of_training for row in of.rejected)
        leave_out.check_all_met(every_row=config.reads_every_row)


# --- shards --------------------------------------------------------------------------------------


class ShardTask(NamedTuple):
    """A shard to write."""

    out: Path
    name: str
    work: Path
    runs: list[tuple[Path, np.ndarray]]
    """Parts, and the places of the records in each."""


def _write_shards(plan: Plan, chosen: dict[str, Rows], workers: int) -> dict[str, list[Shard]]:
    (plan.out / FOLDER).mkdir(parents=True, exist_ok=True)
    shards: dict[str, list[Shard]] = {}
    total = sum(len(rows.places) for rows in chosen.values())
    with tqdm(total=total, unit=" rows", disable=None) as bar:
        for split, rows in chosen.items():
            count = max(1, -(-int(rows.column("nbytes").sum()) // SHARD_BYTES))
            tasks = _shard_tasks(plan, split, rows, count)
            shards[split] = []
            for shard in in_workers(write_task, tasks, min(workers, count)):
                shards[split].append(shard)
                bar.update(shard.rows)
    return shards


def _shard_tasks(plan: Plan, split: str, rows: Rows, count: int) -> Iterator[ShardTask]:
    """Shards of equally many rows."""
    total = len(rows.places)
    for i in range(count):
        places = rows.places[i * total // count : (i + 1) * total // count]
        in_parts = runs_by_part(rows.first_places, places)
        runs = [(rows.paths[part], in_part) for part, in_part in in_parts]
        yield ShardTask(plan.out, shard_name(split, i, count), plan.work, runs)


def write_task(task: ShardTask) -> Shard:
    """Write a shard, unless an earlier try has."""
    path, done = task.out / FOLDER / task.name, task.work / f"{task.name}.json"
    if done.exists() and path.exists():
        with suppress(ValueError, TypeError):  # a damaged one is made again
            return Shard(**json.loads(done.read_bytes()))
    partial = task.work / f".{task.name}.{os.getpid()}"
    records = chain.from_iterable(read_records(part, places) for part, places in task.runs)
    write_shard(partial, records)
    with partial.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    rows = sum(len(places) for _, places in task.runs)
    shard = Shard(f"{FOLDER}/{task.name}", rows, partial.stat().st_size, digest)
    partial.replace(path)
    write_atomically(done, json.dumps(shard._asdict()).encode(), shared=True)
    return shard


# --- manifest ------------------------------------------------------------------------------------


def _split(rows: Rows, shards: list[Shard]) -> dict[str, Any]:
    return {
        "rows": len(rows.places),
        "prompt_tokens": int(rows.column("prompt_tokens").sum()),
        "answer_tokens": int(rows.column("answer_tokens").sum()),
        "shards": [shard._asdict() for shard in shards],
    }


def _sources(plan: Plan, read: list[list[Part]], bad: list[BadRows]) -> list[dict[str, Any]]:
    """What was read from where."""
    return [
        {
            **of_plan,
            "rows": sum(part.rows for part in parts),
            "usable": _usable(parts, of_bad),
            "rejected": dict(of_bad.counts),
        }
        for of_plan, parts, of_bad in zip(plan.content["sources"], read, bad, strict=True)
    ]


def _by_source(config: DataConfig, chosen: dict[str, Rows]) -> dict[str, Any]:
    """By the source's name of the examples: licence, rows of the splits, and how many examples have
    each length in tokens."""
    found: dict[str, Any] = {}
    licence_of = licences(config)
    for split, rows in chosen.items():
        numbers = rows.column("source")
        lengths = {name: rows.column(name) for name in ("prompt_tokens", "answer_tokens")}
        for number in np.unique(numbers):
            of_source = numbers == number
            source = rows.source_names[number]
            licence = licence_of.get(source, config.licence)
            entry = found.setdefault(source, {"licence": licence})
            entry[split] = {"rows": int(of_source.sum())}
            entry[split] |= {name: _histogram(of[of_source]) for name, of in lengths.items()}
    return found


def _histogram(lengths: np.ndarray) -> dict[str, int]:
    values, counts = np.unique(lengths, return_counts=True)
    return {str(value): int(count) for value, count in zip(values, counts, strict=True)}
