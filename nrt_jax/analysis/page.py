"""report.html: one self-contained file, in a light and a dark theme."""

import json
import shlex
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import jinja2
from markupsafe import Markup, escape

from nrt_jax.analysis.figure_sections import Figures, page_context
from nrt_jax.analysis.ink import DARK, GLYPHS, LIGHT, cycle
from nrt_jax.analysis.problems import OUTCOMES, problem_rows
from nrt_jax.analysis.run_records import RunRecord
from nrt_jax.analysis.seeds import SeedGroup, facets, flat_config
from nrt_jax.analysis.summary import (
    WINDOW,
    arrow,
    duration,
    number,
    percent,
    percent_spread,
    problems_text,
    spread,
)
from nrt_jax.config.load import flat

MOST_NAMED = 8
"""Runs that the first sentence names one by one."""
PHASES = {
    "warmup": "warming up",
    "data": "reading data",
    "generate": "sampling traces",
    "update": "scoring and updating",
    "rollout_log": "logging rollouts",
    "evaluate": "evaluating",
    "total": "in total",
    "compile": "of which compiling",
}
ENDINGS = {
    "think_end": "closed by the model",
    "length": "cut at the length limit",
    "other": "another special token",
}


def render_page(
    groups: Sequence[SeedGroup],
    summary: dict[str, Any],
    figures: Figures,
    benchmarks: Sequence[Any] = (),
) -> str:
    """The whole page, with tables of benchmarks. Every text of a model, the data or a config is
    escaped."""
    records = [record for group in groups for record in group.records]
    return page_template("report.html.jinja").render(
        summary=summary,
        benchmarks=benchmarks,
        runs=summary["runs"],
        names=_names(groups),
        groups=groups,
        group_of=[i for i, group in enumerate(groups) for _ in group.records],
        place_of=_places(groups),
        story=_story(groups, summary),
        problems=problems_text(summary["problems"]),
        window=WINDOW,
        glyphs=GLYPHS,
        light=LIGHT,
        dark=DARK,
        samples=problem_rows(groups),
        outcomes=OUTCOMES,
        phases=_phases(summary["runs"]),
        endings=ENDINGS,
        differences=config_differences(records),
        versions=_versions(records),
        commands=_commands(records),
        **page_context(figures),
    )


def _places(groups: Sequence[SeedGroup]) -> list[int]:
    """The place of each run's colour."""
    lines = [line for of_facet in facets(groups).values() for line in of_facet]
    places = {line.group.label: line.place for line in lines}
    return [places[group.label] for group in groups for _ in group.records]


def page_template(name: str) -> jinja2.Template:
    """A template of this package, with the filters of all pages; it escapes every text."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("nrt_jax", "analysis"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "visible": visible,
        "cycle": cycle,
        "percent": percent,
        "number": number,
        "arrow": arrow,
        "duration": duration,
        "spread": spread,
        "percent_spread": percent_spread,
    }
    return environment.get_template(name)


def visible(text: str) -> Markup:
    """Text shown exactly: line ends are marked, and invisible characters written as escapes."""
    if not text:
        return Markup('<span class="note">(empty)</span>')
    escaped = "".join(
        f"\\u{ord(char):04x}" if _hidden(char) else char for char in text.replace("\r\n", "\n")
    )
    return Markup(str(escape(escaped)).replace("\n", '<span class="note">↵</span>\n'))


def _hidden(char: str) -> bool:
    """Control, formatting and surrogate characters, which are invisible or reorder the page."""
    return char != "\n" and unicodedata.category(char) in ("Cc", "Cf", "Cs")


def config_differences(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Settings that differ between the runs, with the value of each run."""
    configs = [_texts(flat_config(record)) for record in records]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = [(key, [config.get(key, "not set") for config in configs]) for key in keys]
    return [
        (key, values)
        for key, values in rows
        if key != "run_dir" and any(value != values[0] for value in values)
    ]


def _texts(settings: dict[str, Any]) -> dict[str, str]:
    return {
        key: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for key, value in settings.items()
    }


def _names(groups: Sequence[SeedGroup]) -> dict[str, str]:
    """What the page compares, by name: the methods, the model and the data."""
    records = [group.records[0] for group in groups]
    return {
        "methods": " and ".join(group.label for group in groups[:2])
        if len(groups) < 3
        else f"{groups[0].label} and {len(groups) - 1} others",
        "models": ", ".join(dict.fromkeys(record.model_name for record in records)),
        "data": ", ".join(dict.fromkeys(record.data_name for record in records)),
    }


def _story(groups: Sequence[SeedGroup], summary: dict[str, Any]) -> str:
    """What was trained and what the result was, in two sentences."""
    if "exact_match" in summary:
        records = [record for group in groups for record in group.records]
        return _story_of_pair(records, summary)
    runs, problems = summary["runs"], problems_text(summary["problems"])
    if len(runs) == 1:
        run, match = runs[0], runs[0]["exact_match"]
        return (
            f"{run['label']} was trained on {run['pairs_seen']:,} question–answer pairs. Exact "
            f"match on {problems} went from {percent(match['first'])} to {percent(match['last'])}."
        )
    names = ", ".join(run["label"] for run in runs)
    if len(runs) > MOST_NAMED:
        names = ", ".join(group.label for group in groups)
    pairs = " to ".join(f"{count:,}" for count in _range(run["pairs_seen"] for run in runs))
    after = " to ".join(percent(share) for share in _range(r["exact_match"]["last"] for r in runs))
    return (
        f"{len(runs)} runs were trained on {pairs} question–answer pairs each: {names}. "
        f"After training they answer {after} of {problems} right."
    )


def _story_of_pair(records: Sequence[RunRecord], summary: dict[str, Any]) -> str:
    by_method = {run["method"]: run for run in summary["runs"]}
    sft, nrt = by_method["sft"], by_method["nrt"]
    seeds = summary["seeds"]
    labels = {run["method"]: run["label"].partition(" · seed ")[0] for run in (sft, nrt)}
    firsts = [next(r for r in records if r.config.method == method) for method in ("sft", "nrt")]
    differing = [key for key, _ in config_differences(firsts)]
    if any(key.startswith(("model.", "data.", "seed", "train.")) for key in differing):
        what = (
            f"Two models were trained on {sft['pairs_seen']:,} and {nrt['pairs_seen']:,} "
            "question–answer pairs"
        )
    else:
        what = (
            f"Two copies of one model were trained on the same {sft['pairs_seen']:,} "
            "question–answer pairs"
        )
    exact = {name: percent(share) for name, share in summary["exact_match"].items()}
    return (
        f"{what}: {labels['sft']} learns to answer at once, while {labels['nrt']} first writes a "
        "trace of its own, of which no example is given, and is rewarded when that makes it surer "
        f"of the reference answer. On {problems_text(summary['problems'])}, the model answers "
        f"{exact['base']} right with a trace and {exact['base_direct']} without one before "
        f"training, and after it {exact['sft']} ({labels['sft']}) and {exact['nrt']} "
        f"({labels['nrt']})." + (" Figures are means over seeds." if seeds else "")
    )


def _range(values: Iterable[Any]) -> list[Any]:
    """The smallest and the largest value, or the one if they are equal."""
    values = set(values)
    return sorted({min(values), max(values)})


def _phases(runs: Sequence[dict[str, Any]]) -> list[tuple[str, list[float | None]]]:
    names = dict.fromkeys([*PHASES, *(name for run in runs for name in run["seconds"])])
    rows = [(PHASES.get(name, name), [run["seconds"].get(name) for run in runs]) for name in names]
    return [row for row in rows if any(value is not None for value in row[1])]


def _versions(records: Sequence[RunRecord]) -> list[tuple[str, list[str]]]:
    """Versions by name; one value where all runs agree."""
    saved = [_texts(flat(record.versions)) for record in records]
    rows = []
    for key in dict.fromkeys(key for versions in saved for key in versions):
        values = [versions.get(key, "not saved") for versions in saved]
        name = key.removeprefix("packages.").replace("_", " ").replace("nrt jax", "nrt-jax")
        rows.append((name, values[:1] if len(set(values)) == 1 else values))
    return rows


def _commands(records: Sequence[RunRecord]) -> list[str]:
    """The commands that repeat the runs and this page."""
    lines = []
    revisions = {record.versions.get("git_revision") for record in records}
    for revision in sorted(str(revision) for revision in revisions if revision):
        clean = revision.removesuffix("-dirty")
        note = "  # with changes that were not committed" if clean != revision else ""
        lines.append(f"git checkout {clean}{note}")
    for record in records:
        config = shlex.quote(str(record.path / "config.yaml"))
        lines.append(f"nrt-jax train {config} run_dir={shlex.quote(f'again/{record.name}')}")
    runs = " ".join(shlex.quote(f"again/{record.name}") for record in records)
    return [*lines, f"nrt-jax report {runs} --out again"]
