"""`nrt-jax data stats`: what data a config trains on, as a table, a page and a picture."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from nrt_jax.analysis.ink import DARK, LIGHT
from nrt_jax.analysis.length_figures import Side, legend, panel_svgs, sides, write_png
from nrt_jax.analysis.padding import AT_LIMIT, MINI_BATCHES, NO_TRACES, SPREAD, padding
from nrt_jax.analysis.page import page_template
from nrt_jax.analysis.summary import aligned, number, percent
from nrt_jax.checkpoints.abstract_model import architecture_of, load_tokenizer
from nrt_jax.config.data import DataConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.config.tulu3 import SOURCES
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.source_counts import source_table
from nrt_jax.data.stats import (
    RowLengths,
    SourceLengths,
    lengths_of_dataset,
    lengths_of_first_rows,
    summarise_source,
    together,
)
from nrt_jax.errors import InputError
from nrt_jax.training.setup import layout_on

GENERATED_ROWS = 10_000
"""Rows of a generator that are measured unless more are asked for."""
LENGTHS = {"mean": "mean", "p50": "median", "p90": "90 %", "p99": "99 %", "max": "longest"}
NO_ROWS = "–"
MOST_NAMED = 3
"""Sources that are named beside a reason."""
TRACES = {
    NO_TRACES: "no traces",
    SPREAD: "traces of 0 tokens to their limit, evenly",
    AT_LIMIT: "all traces at their limit",
}


def write_stats(config: RunConfig, rows: int | None, out: Path | None) -> None:
    """Measure the config's data, all of it or the first `rows` of each source, and print a table;
    write data_stats.html, data_stats.png and data_stats.json into `out` where it is given.

    Raises InputError as `load_dataset` does, and for an `out` that cannot be written.
    """
    tokenizer, data = load_tokenizer(config), config.data
    if rows is None and data.generated:
        rows = GENERATED_ROWS
    if rows is None:
        dataset = load_dataset(data, tokenizer)
        sources = lengths_of_dataset(dataset, data.short_location(2))
        summary = summarise(config, sources, rows, RowLengths(dataset.train))
    else:
        sources = lengths_of_first_rows(data, tokenizer, rows)
        every = together(sources)
        pairs = zip(every.prompt_tokens.tolist(), every.answer_tokens.tolist(), strict=True)
        summary = summarise(config, sources, rows, [*pairs])
    print(text(summary))
    if out is None:
        return
    both = sides(data.max_prompt_tokens, data.max_answer_tokens)
    page = render(summary, sources, both)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "data_stats.json").write_text(json.dumps(summary, indent=1) + "\n", "utf-8")
        (out / "data_stats.html").write_text(page, "utf-8", errors="backslashreplace")
        write_png(sources, both, out / "data_stats.png")
    except OSError as error:
        raise InputError(
            f"--out {out}: {error.strerror}; choose a directory that you may write to"
        ) from error
    print(f"\nwrote data_stats.html, data_stats.png and data_stats.json to {out}")


def summarise(
    config: RunConfig,
    sources: Sequence[SourceLengths],
    rows: int | None,
    lengths: Sequence[tuple[int, int]],
) -> dict[str, Any]:
    """All figures of the page, ready for JSON; `lengths` are those of the training rows in their
    order."""
    every = together(sources)
    if not len(every.prompt_tokens):
        reasons = ", ".join(f"{n} {reason}" for reason, n in Counter(every.left_out).most_common())
        raise InputError(
            f"{config.data.location}: none of the first {every.read} rows can be used ({reasons}); "
            "mend the rows or the settings of data that read them"
        )
    # Devices along an axis of -1 are those of the machine that trains; here they count as one.
    sizes = {axis: max(1, getattr(config.mesh, axis)) for axis in ("data", "fsdp", "context")}
    layout = layout_on(config, architecture_of(config.model), sizes)
    return {
        "data": config.data.location,
        "method": config.method,
        "first_rows": rows,
        "sources": [summarise_source(source) for source in sources],
        "all": summarise_source(every),
        "limits": {
            "prompt": config.data.max_prompt_tokens,
            "answer": config.data.max_answer_tokens,
        },
        "padding": padding(config, layout, lengths),
        "table4": table4(config.data, sources),
    }


def table4(data: DataConfig, sources: Sequence[SourceLengths]) -> list[str]:
    """Lines that set the rows that are trained on beside the paper's, where they are of tulu-3."""
    counts = {source.name: len(source.prompt_tokens) for source in sources}
    if not any(name in SOURCES for name in counts):
        return []
    return source_table(data, {name: count for name, count in counts.items() if count})


def table_rows(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """One per source, and one for all where there are several."""
    return summary["sources"] + ([summary["all"]] if len(summary["sources"]) > 1 else [])


def reasons(summary: dict[str, Any]) -> list[tuple[str, int, str]]:
    """Reasons for which rows were left out, the commonest first: rows, and the sources that have
    most of them."""
    found = []
    for reason, count in summary["all"]["left_out"].items():
        by_source = Counter(
            {row["source"]: row["left_out"].get(reason, 0) for row in summary["sources"]}
        )
        named = [f"{source} {n:,}" for source, n in by_source.most_common() if n]
        more = [f"{len(named) - MOST_NAMED} more"] if len(named) > MOST_NAMED else []
        found.append((reason, count, ", ".join(named[:MOST_NAMED] + more)))
    return found


# --- text ----------------------------------------------------------------------------------------


def text(summary: dict[str, Any]) -> str:
    """The tables as text."""
    rows = table_rows(summary)
    head = ("source", "read", "usable", "kept", "trained on", "tokens")
    counts = [
        (
            row["source"],
            *(f"{row[name]:,}" for name in ("read", "usable")),
            percent(kept_share(row)),
            *(f"{row[name]:,}" for name in ("trained", "tokens")),
        )
        for row in rows
    ]
    parts = [_heading(summary), *aligned([head, *counts], right=True)]
    if summary["table4"]:
        parts += ["", *summary["table4"]]
    for side in ("prompt", "answer"):
        limit = summary["limits"][side]
        head = (f"{side} tokens (at most {limit:,})", *LENGTHS.values())
        lengths = [(row["source"], *shown_lengths(row[side])) for row in rows]
        parts += ["", *aligned([head, *lengths], right=True)]
    if summary["all"]["left_out"]:
        cells = [(reason, f"{count:,}", where) for reason, count, where in reasons(summary)]
        parts += ["", *aligned([("left out", "rows", "of which"), *cells])]
    head = ("padding", "packing", "share", "micro-batches", "shapes")
    cells = [
        (
            TRACES[row["traces"]],
            f"{'on' if row['packing'] else 'off'}{' *' if row['configured'] else ''}",
            percent(row["padding"]),
            number(row["micro_batches"]),
            str(row["shapes"]),
        )
        for row in summary["padding"]
    ]
    parts += ["", *aligned([head, *cells]), "* as configured; micro-batches per update"]
    return "\n".join(parts)


def _heading(summary: dict[str, Any]) -> str:
    first = summary["first_rows"]
    return summary["data"] + ("" if first is None else f", the first {first:,} rows of each source")


def kept_share(row: dict[str, Any]) -> float:
    """Usable rows of those read."""
    return row["usable"] / row["read"]


def shown_lengths(lengths: dict[str, float] | None) -> list[str]:
    """The figures of `LENGTHS`."""
    if lengths is None:
        return [NO_ROWS] * len(LENGTHS)
    return [f"{lengths[key]:,.1f}" if key == "mean" else f"{lengths[key]:,}" for key in LENGTHS]


# --- page ----------------------------------------------------------------------------------------


def render(summary: dict[str, Any], sources: Sequence[SourceLengths], both: Sequence[Side]) -> str:
    """The page; every text of the data or the config is escaped."""
    configured = [row for row in summary["padding"] if row["configured"]]
    return page_template("data_stats.html.jinja").render(
        summary=summary,
        heading=_heading(summary),
        rows=table_rows(summary),
        kept_share=kept_share,
        lengths=LENGTHS,
        shown_lengths=shown_lengths,
        reasons=reasons(summary),
        traces=TRACES,
        configured=configured[0],
        mini_batches=MINI_BATCHES,
        legend=legend(sources),
        panels=[Markup(svg) for svg in panel_svgs(sources, both)],
        light=LIGHT,
        dark=DARK,
    )
