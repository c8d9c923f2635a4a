"""Two recordings of benchmarks/golden.py against each other, old names read as the new ones.

A renames file says what was changed on purpose; it is applied to the older recording:

    metrics: {loss/trace: loss/policy, speed/: rate/, batch/shapes: null}
    config: {objective.scheme: loss.scheme, rollout: sampling, train.packing: null}
    texts: {no such checkpoint: no checkpoint of that step}
    added: {metrics: [loss/value], config: [loss.new_key], export: [file.json]}

A null drops a name. A metric that ends in a slash stands for all that begin with it, a config key
for all keys below it. Texts are replaced in messages, transcripts and the files of an export, not
in values of configs. What is `added` may be in the newer recording alone.
"""

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SHOWN = 20
"""Differences of a section that are printed."""
WIDTH = 100
"""Characters of a value that are printed."""
TIMING = ("time/", "speed/", "weights/seconds")
"""Metrics that differ between two otherwise equal runs."""


class Difference(NamedTuple):
    """A value that is not the same, or is in one recording only."""

    path: str
    before: Any
    after: Any


class _Missing:
    def __repr__(self) -> str:
        return "nothing"


MISSING = _Missing()

Names = dict[str, str | None]


@dataclass(frozen=True)
class Renames:
    """What was renamed, removed or added on purpose."""

    metrics: Names = field(default_factory=dict)
    config: Names = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    added: dict[str, list[str]] = field(default_factory=dict)

    def metric(self, name: str) -> str | None:
        """The new name of a metric; None where it was removed."""
        if name in self.metrics:
            return self.metrics[name]
        for old, new in self.metrics.items():
            if old.endswith("/") and name.startswith(old):
                return None if new is None else new + name.removeprefix(old)
        return name

    def old_metric(self, name: str) -> str:
        """The old name of a metric that may have been renamed."""
        for old, new in self.metrics.items():
            if new is not None and new == name:
                return old
            if new is not None and old.endswith("/") and name.startswith(new):
                return old + name.removeprefix(new)
        return name

    def is_timing(self, name: str) -> bool:
        """Whether a metric, under its old or its new name, is a time or a speed."""
        return name.startswith(TIMING) or self.old_metric(name).startswith(TIMING)

    def key(self, name: str) -> str | None:
        """The new name of a dotted config key; None where it was removed."""
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            old = ".".join(parts[:end])
            if old in self.config:
                new = self.config[old]
                return None if new is None else ".".join([new, *parts[end:]])
        return name

    def text(self, text: str) -> str:
        """A message in its new words."""
        for old, new in self.texts.items():
            text = text.replace(old, new)
        return text

    def is_added(self, kind: str, name: str) -> bool:
        """Whether `name`, or what it is a part of, is new on purpose."""
        separator = "/" if kind == "metrics" else "."
        starts = [added.rstrip(separator) for added in self.added.get(kind, [])]
        return any(name == start or name.startswith(start + separator) for start in starts)


def read_renames(path: Path) -> Renames:
    """Read a renames file, JSON or YAML; SystemExit for a key that it cannot have."""
    values = yaml.safe_load(path.read_text("utf-8")) or {}
    for part, known in (
        (values, {part.name for part in fields(Renames)}),
        (values.get("added") or {}, {"metrics", "config", "export"}),
    ):
        for name in part.keys() - known:
            raise SystemExit(f"{path}: {name}: unknown; there are {', '.join(sorted(known))}")
    return Renames(**{name: value or {} for name, value in values.items()})


def compare(
    before: Mapping[str, Any],
    after: Mapping[str, Any],
    renames: Renames | None = None,
    tolerance: float = 0.0,
) -> int:
    """Print a line per section and every difference; how many there are.

    Numbers of metrics may differ by `tolerance`, relative to the larger; all else is exact.
    """
    renames = renames or Renames()
    for name in ("machine", "schema_sha256"):
        if before["about"].get(name) != after["about"].get(name):
            print(f"note: {name} differs, which is no difference of behaviour in itself")
    found, old, new = 0, before["sections"], after["sections"]
    for name in dict.fromkeys([*old, *new]):
        renamed = rename(name, old.get(name, MISSING), renames)
        expected = without_added(name, new.get(name, MISSING), renamed, renames)
        allowed = tolerance if name.startswith(("metrics/", "padding")) else 0.0
        section = list(differences(renamed, expected, allowed))
        found += len(section)
        print(_section_line(name, renamed, section))
        for path, one, other in section[:SHOWN]:
            print(f"    {path or 'all'}: {_shown(one, other)} → {_shown(other, one)}")
        if len(section) > SHOWN:
            print(f"    and {len(section) - SHOWN} more")
    return found


def rename(section: str, value: Any, renames: Renames) -> Any:
    """A section of the older recording in new names."""
    if _is_skipped(value):
        return value
    if section.startswith("metrics/"):
        return [_renamed_keys(row, renames.metric) for row in value]
    if section == "padding":
        return {run: _renamed_keys(row, renames.metric) for run, row in value.items()}
    if section == "schema":
        return _renamed_keys(value, renames.key)
    if section == "config":
        return {preset: _renamed_preset(shown, renames) for preset, shown in value.items()}
    return _renamed_texts(value, renames)


def without_added(section: str, value: Any, before: Any, renames: Renames) -> Any:
    """A section of the newer recording without the names that are new on purpose."""
    if _is_skipped(value) or _is_skipped(before):
        return value

    def cut(kind: str, row: dict[str, Any], old: Any) -> dict[str, Any]:
        known = old if isinstance(old, dict) else {}
        return {k: v for k, v in row.items() if k in known or not renames.is_added(kind, k)}

    if section.startswith("metrics/"):
        olds = [*before, *([{}] * len(value))]
        return [cut("metrics", row, old) for row, old in zip(value, olds, strict=False)]
    if section == "padding":
        return {run: cut("metrics", row, before.get(run)) for run, row in value.items()}
    if section == "schema":
        return cut("config", value, before)
    if section == "export":
        return {dtype: cut("export", files, before.get(dtype)) for dtype, files in value.items()}
    if section == "config":
        return {
            preset: shown | {"values": cut("config", shown["values"], _values(before, preset))}
            for preset, shown in value.items()
        }
    return value


def differences(
    before: Any, after: Any, tolerance: float = 0.0, path: str = ""
) -> Iterator[Difference]:
    """Every leaf that differs, in order; `path` is that of the values."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in dict.fromkeys([*before, *after]):
            below = f"{path} › {key}" if path else str(key)
            pair = before.get(key, MISSING), after.get(key, MISSING)
            yield from differences(*pair, tolerance, below)
    elif isinstance(before, list) and isinstance(after, list):
        for index in range(max(len(before), len(after))):
            pair = [side[index] if index < len(side) else MISSING for side in (before, after)]
            yield from differences(pair[0], pair[1], tolerance, f"{path}[{index}]")
    elif not _equal(before, after, tolerance):
        yield Difference(path, before, after)


def _equal(before: Any, after: Any, tolerance: float) -> bool:
    if before is MISSING or after is MISSING:
        return before is after
    # As JSON, so that nan equals nan, and 0.0 neither -0.0 nor 0.
    if json.dumps(before) == json.dumps(after):
        return True
    numbers = all(
        isinstance(value, int | float) and not isinstance(value, bool) for value in (before, after)
    )
    return numbers and tolerance > 0 and math.isclose(before, after, rel_tol=tolerance)


def _renamed_keys(row: dict[str, Any], new_name: Any) -> dict[str, Any]:
    named = ((new_name(name), value) for name, value in row.items())
    return {name: value for name, value in named if name is not None}


def _renamed_preset(shown: dict[str, Any], renames: Renames) -> dict[str, Any]:
    return shown | {
        "values": _renamed_keys(shown["values"], renames.key),
        "error": renames.text(shown["error"]),
    }


def _renamed_texts(value: Any, renames: Renames) -> Any:
    """All strings but the names."""
    if isinstance(value, str):
        return renames.text(value)
    if isinstance(value, list):
        return [_renamed_texts(item, renames) for item in value]
    if isinstance(value, dict):
        return {key: _renamed_texts(item, renames) for key, item in value.items()}
    return value


def _values(presets: Any, name: str) -> Any:
    return presets[name]["values"] if name in presets else {}


def _is_skipped(value: Any) -> bool:
    return value is MISSING or (isinstance(value, dict) and "skipped" in value)


def _section_line(name: str, value: Any, found: list[Difference]) -> str:
    if found:
        return f"DIFFERENT  {name}: {len(found)} of {_leaves(value)} values"
    if _is_skipped(value):
        return f"skipped    {name}: {value['skipped']}"
    return f"same       {name}: {_leaves(value)} values"


def _leaves(value: Any) -> int:
    if isinstance(value, dict):
        return sum(map(_leaves, value.values()))
    return sum(map(_leaves, value)) if isinstance(value, list) else 1


def _shown(value: Any, other: Any) -> str:
    """The value on one line; of a long text the part where it begins to differ from `other`."""
    if value is MISSING:
        return repr(value)
    text = json.dumps(value, ensure_ascii=False)
    if len(text) <= WIDTH:
        return text
    rest = json.dumps(other, ensure_ascii=False) if other is not MISSING else ""
    pairs = enumerate(zip(text, rest, strict=False))
    start = max(next((i for i, (a, b) in pairs if a != b), 0) - WIDTH // 3, 0)
    return ("…" if start else "") + text[start : start + WIDTH] + "…"
