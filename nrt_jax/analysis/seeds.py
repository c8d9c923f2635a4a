"""Runs that differ by their seed alone, as one line of a figure and one row of a table."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nrt_jax.analysis.run_records import RunRecord

IGNORED = ("run_dir", "seed", "data.seed")
"""Settings in which the runs of one group may differ."""
_LONGEST_SETTINGS = 40
"""Characters of the settings in a label; where they are more, the runs' names tell groups apart."""


@dataclass(frozen=True)
class SeedGroup:
    """Runs with one config and different seeds."""

    label: str
    records: tuple[RunRecord, ...]

    @property
    def reasons(self) -> bool:
        """Whether its models write traces."""
        return self.records[0].scheme is not None


@dataclass(frozen=True)
class Line:
    """A group as a figure shows it."""

    label: str
    """Unique among the groups of one facet."""
    place: int
    """Of its colour and marker; the same method has the same place in every facet."""
    group: SeedGroup


def facets(groups: Sequence[SeedGroup]) -> dict[str, list[Line]]:
    """The groups by model and data, since figures compare methods on one model and one task.

    A facet's name says in what the facets differ; it is empty where there is one.
    """
    by_facet: dict[tuple[str, str], list[SeedGroup]] = {}
    for group in groups:
        first = group.records[0]
        by_facet.setdefault((first.model_name, first.data_name), []).append(group)
    several_models = len({model for model, _ in by_facet}) > 1
    several_data = len({data for _, data in by_facet}) > 1
    places: dict[str, int] = {}
    found = {}
    for (model, data), members in by_facet.items():
        count = Counter(group.records[0].title for group in members)
        labels = [
            title if count[title := group.records[0].title] == 1 else group.label
            for group in members
        ]
        name = " on ".join([model] * several_models + [data] * several_data)
        found[name] = [
            Line(label, places.setdefault(label, len(places)), group)
            for label, group in zip(labels, members, strict=True)
        ]
    return found


def legend(by_facet: dict[str, list[Line]]) -> list[tuple[str, int]]:
    """Every label with the place of its colour."""
    return sorted(
        {(line.label, line.place) for lines in by_facet.values() for line in lines},
        key=lambda entry: entry[1],
    )


def group_by_seed(records: Sequence[RunRecord]) -> list[SeedGroup]:
    """The runs grouped by config, in the order of their first runs.

    Two runs with the same seed are never one group: they are two measurements that the reader
    wants to tell apart. A label is the method's name; where several groups share the method, with
    the settings in which these differ, or with the name of the first run if they are many.
    """
    groups: list[list[RunRecord]] = []
    for record in records:
        fitting = (group for group in groups if _fits(record, group))
        group = next(fitting, None)
        if group is None:
            groups.append([record])
        else:
            group.append(record)
    labels = _labels([group[0] for group in groups])
    return [SeedGroup(label, tuple(g)) for label, g in zip(labels, groups, strict=True)]


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
    return record.settings


def _fits(record: RunRecord, group: Sequence[RunRecord]) -> bool:
    if record.config.seed in (member.config.seed for member in group):
        return False
    config, other = flat_config(record), flat_config(group[0])
    return all(config.get(key) == other.get(key) for key in {*config, *other} if key not in IGNORED)


def _labels(firsts: Sequence[RunRecord]) -> list[str]:
    """The labels of groups by their first runs."""
    found: dict[str, str] = {}
    for title in dict.fromkeys(record.title for record in firsts):
        alike = [record for record in firsts if record.title == title]
        settings = [", ".join(_differing(record, alike)) for record in alike]
        unlike = len(set(settings)) == len(alike) and max(map(len, settings)) <= _LONGEST_SETTINGS
        for record, of_record in zip(alike, settings, strict=True):
            ending = of_record if unlike else record.name
            found[record.name] = title if len(alike) == 1 else f"{title} · {ending}"
    return [found[record.name] for record in firsts]


def _differing(record: RunRecord, alike: Sequence[RunRecord]) -> list[str]:
    """The settings of a run in which the others do not all agree with it."""
    configs = [flat_config(other) for other in alike]
    mine = flat_config(record)
    keys = [key for key in mine if key not in IGNORED]
    return [
        record.model_name if key == "model.path" else f"{key.split('.')[-1]}={mine[key]}"
        for key in keys
        if any(config.get(key) != mine[key] for config in configs)
    ]
