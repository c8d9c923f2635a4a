"""What the doctor finds, one line each, and how it is shown."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple


class Finding(NamedTuple):
    """One line of the table."""

    name: str
    value: str
    remedy: str | None = None
    """What to do; None where nothing is wrong."""
    figures: Mapping[str, float | int | str] = MappingProxyType({})
    """Numbers behind the value, for `--json`."""

    def to_json(self) -> dict[str, Any]:
        """The line for `--json`."""
        line = {"name": self.name, "value": self.value, "ok": self.remedy is None}
        if self.remedy is not None:
            line["remedy"] = self.remedy
        return line | dict(self.figures)


def first_wrong(findings: Sequence[Finding]) -> Finding | None:
    """The first line with a remedy."""
    return next((finding for finding in findings if finding.remedy is not None), None)


def table(findings: Sequence[Finding]) -> list[str]:
    """Lines of the terminal: a mark, the name, the value."""
    width = max(len(finding.name) for finding in findings)
    marks = ("ok   " if finding.remedy is None else "WRONG" for finding in findings)
    return [
        f"{mark}  {f.name:<{width}}  {f.value}" for mark, f in zip(marks, findings, strict=True)
    ]


def size(nbytes: float | int) -> str:
    """Bytes in the unit that reads best: 512 MB, 2.05 TB."""
    for unit, scale in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if nbytes >= scale:
            return f"{nbytes / scale:.3g} {unit}"
    return f"{nbytes:.0f} bytes"
