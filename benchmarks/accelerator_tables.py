"""The report of accelerator.py as Markdown."""

from collections.abc import Sequence
from typing import Any


def markdown(report: dict[str, Any]) -> str:
    """A page with a section for each part that the report has."""
    here, measured = report["environment"], report["measured"]
    versions = ", ".join(f"{name} {number}" for name, number in here["versions"].items())
    lines = [
        f"# {here['device']}",
        "",
        f"{here['devices']} {here['platform']} devices; Python {here['python']}, {versions}; "
        f"{here['runtime']}. Measured: {measured['flops_per_s'] / 1e12:.4g} TFLOP/s of a bfloat16 "
        f"matmul, {measured['bytes_per_s'] / 1e9:.4g} GB/s.",
    ]
    if report["tiny"]:
        lines += ["", "**Tiny sizes: the rates mean nothing.**"]
    for name, result in report["parts"].items():
        lines += ["", f"## {TITLES[name]}", "", *_section(name, result)]
    return "\n".join(lines) + "\n"


TITLES = {
    "agreement": "Against float32 on the CPU",
    "update": "Update of a 1B-shaped model",
    "decode": "Decoding with a 1B-shaped model",
    "step": "An NRT step",
}


def _section(name: str, result: dict[str, Any]) -> list[str]:
    if "not_run" in result:
        return [f"Not run: {result['not_run']}."]
    if "error" in result:
        return [f"Failed: {result['error']}"]
    return SECTIONS[name](result)


def _agreement(result: dict[str, Any]) -> list[str]:
    rows = [
        (row["dtype"], row["through"], row["what"], row["why"], "", "")
        if "why" in row
        else (
            *(row[key] for key in ("dtype", "through", "what")),
            f"{row['error']:.2g}",
            f"{row['largest']:.2g}",
            "yes" if row["right"] else "**no**",
        )
        for row in result["rows"]
    ]
    return _table(("dtype", "through", "what", "error", "largest", "right"), rows)


def _update(result: dict[str, Any]) -> list[str]:
    rows = [
        ("layers", str(result["layers"])),
        ("micro-batch", f"{result['rows']} rows of {result['row_tokens']} tokens"),
        ("attention, remat", f"{result['attention']}, {result['remat']}"),
        ("seconds per micro-batch", f"{result['micro_batch_s']:.3g}"),
        ("tokens per second", f"{result['tokens_per_s']:.0f}"),
        ("MFU by the measured matmul", _share(result["mfu"], result["goal_mfu"])),
        ("peak memory", f"{result['peak_bytes'] / 1e9:.3g} GB, by {result['peak_from']}"),
        (
            "over the plan's",
            f"{result['peak_over_planned']:.2f} of {result['planned_bytes'] / 1e9:.3g} GB",
        ),
    ]
    return _table(("what", "figure"), rows)


def _decode(result: dict[str, Any]) -> list[str]:
    rows = [
        (str(row["slots"]), row["attention"], row["why"], "", "")
        if "why" in row
        else (
            str(row["slots"]),
            row["attention"],
            f"{row['step_ms']:.3g}",
            f"{row['tokens_per_s']:.0f}",
            _share(row["share_of_bandwidth"], result["goal_share_of_bandwidth"]),
        )
        for row in result["rows"]
    ]
    return _table(("slots", "attention", "ms per step", "tokens per second", "bandwidth"), rows)


def _step(result: dict[str, Any]) -> list[str]:
    rows = [(phase, f"{seconds:.3g}") for phase, seconds in result["seconds"].items()]
    return [f"Model: {result['model']}.", "", *_table(("phase", "seconds"), rows)]


SECTIONS = {"agreement": _agreement, "update": _update, "decode": _decode, "step": _step}


def _share(value: float, goal: float) -> str:
    return f"{100 * value:.1f} % (goal {100 * goal:.0f} %)"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
