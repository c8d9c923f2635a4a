"""Runs that differ by their seed alone, as one line of a figure and one row of a table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nrt_jax.analysis.run_records import RunRecord
from nrt_jax.config.load import flat

IGNORED = ("run_dir", "seed", "data.seed")
"""Settings in which the runs of one group may differ."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs with one config and different seeds."""

    label: str
    records: tuple[RunRecord, ...]


def group_by_seed(records: Sequence[RunRecord]) -> list[SeedGroup]:
    """The runs grouped by config, in the order of their first runs.

    Two runs with the same seed are never one group: they are two measurements that the reader
    wants to tell apart. A label is the method's name, with the name of the first run where several
    groups share the method.
    """
    groups: list[list[RunRecord]] = []
    for record in records:
        fitting = (group for group in groups if _fits(record, group))
        group = next(fitting, None)
        if group is None:
            groups.append([record])
        else:
            group.append(record)
    count = Counter(group[0].title for group in groups)
    return [SeedGroup(_label(group, count), tuple(group)) for group in groups]


def run_labels(groups: Sequence[SeedGroup]) -> dict[str, str]:
    """The label of each run by its name: its group's, with the seed where a group has several."""
    return {
        record.name: f"{group.label} · seed {record.config.seed}"
        if len(group.records) > 1
        else group.label
        for group in groups
        for record in group.records
    }


def flat_config(record: RunRecord) -> dict[str, Any]:
    """Every setting of a run by its dotted name."""
    return flat(record.config.model_dump(mode="json"))


def _fits(record: RunRecord, group: Sequence[RunRecord]) -> bool:
    if record.config.seed in (member.config.seed for member in group):
        return False
    config, other = flat_config(record), flat_config(group[0])
    return all(config.get(key) == other.get(key) for key in {*config, *other} if key not in IGNORED)


def _label(group: Sequence[RunRecord], count: Counter[str]) -> str:
    first = group[0]
    return first.title if count[first.title] == 1 else f"{first.title} · {first.name}"
