"""Tables of benchmarks: as text, as a page, and as CSV and LaTeX.

The detailed table has a row per task, the comparison a row per model and method of the paper.
"""

import csv
import io
import math
from collections.abc import Sequence
from pathlib import Path
from textwrap import wrap
from typing import NamedTuple

from nrt_jax.analysis.ink import DARK, LIGHT
from nrt_jax.analysis.page import page_template
from nrt_jax.analysis.paper_table import find_base, paper_table
from nrt_jax.analysis.summary import aligned, number
from nrt_jax.evaluation.results import SuiteResult, TaskResult, mean
from nrt_jax.evaluation.tasks import BENCHMARKS

NONE = "–"
NOTE_WIDTH = 100
"""Characters of a line under a table in a terminal."""
NINE = tuple(name for name, benchmark in BENCHMARKS.items() if benchmark.headline)
FILES = ("results.html", "results.csv", "results.tex")
_DETAILS = (
    "benchmark",
    "metric",
    "score",
    "n",
    "unclosed",
    "truncated",
    "trace tokens",
    "answer tokens",
)


class Table(NamedTuple):
    """Cells as shown; the first column is text, the others are figures or short words."""

    title: str
    head: tuple[str, ...]
    rows: list[tuple[str, ...]]
    notes: list[str]
    """Sentences under the table."""


def tables(suites: Sequence[SuiteResult]) -> list[Table]:
    """A detailed table of each model; and a comparison of several, or of one with the paper."""
    found = [detailed(suite) for suite in suites]
    if len(suites) > 1 or _bases(suites):
        found.append(comparison(suites))
    return found


def detailed(suite: SuiteResult) -> Table:
    """A row per task and Overall; scores in percent with their standard errors."""
    documents = "" if suite.limit is None else f", {suite.limit:,} documents per task"
    headline = [row for row in suite.tasks if row.headline]
    rows = [_detailed_row(row) for row in headline]
    if headline:
        rows.append(_overall_row(headline))
    rows += [_detailed_row(row) for row in suite.tasks if not row.headline]
    notes = [
        "Scores in percent ± standard error. Unclosed: answers that are empty because their trace "
        "never closed; truncated: answers cut at their limit. Tokens are means per answer."
    ]
    if headline:
        notes.append(_overall_note(headline))
    if parts := _parts(suite.tasks):
        notes.append(f"Documents of the whole benchmark: {', '.join(parts)}.")
    if any(row.task == "ifeval" for row in suite.tasks):
        notes.append(
            "IFEval is greedy, prompt-level and loose, as in OLMES; the paper's Table 7 names "
            "pass@10, which the task ifeval_pass10 measures."
        )
    return Table(f"{suite.model}{documents}", _DETAILS, rows, notes)


def comparison(suites: Sequence[SuiteResult]) -> Table:
    """A row per model, and one per method of the paper for the same base models."""
    shown = [name for name in NINE if any(name in _by_task(suite) for suite in suites)]
    bases = _bases(suites)
    head = [
        "model",
        *(BENCHMARKS[name].title for name in shown),
        "Overall",
        "unclosed",
        "truncated",
    ]
    rows = [_model_row(suite, shown) for suite in suites]
    if bases:
        head.append("Overall as printed")
        rows = [(*row, NONE) for row in rows]
    for base in bases:
        for row in paper_table()[base]:
            values = [row.scores[name] for name in shown]
            cells = [*map(percent, values), percent(mean(values)) if values else NONE]
            cells += [NONE, NONE, percent(row.printed_overall)]
            rows.append((f"{row.method}, paper, {base}", *cells))
    notes = [f"Overall is the plain mean of the columns shown ({len(shown)} of the paper's nine)."]
    if bases:
        notes.append(
            "The paper reports no unclosed and truncated answers. Its printed Overall is the mean "
            "of its nine columns for Mistral, but not for both Llama models: for SFT on "
            "Llama-3.1-8B the mean is 43.3, and 46.0 is printed."
        )
    return Table("Comparison", tuple(head), rows, notes)


def _bases(suites: Sequence[SuiteResult]) -> list[str]:
    found = (find_base(suite.base, suite.model) for suite in suites)
    return list(dict.fromkeys(base for base in found if base is not None))


def _by_task(suite: SuiteResult) -> dict[str, TaskResult]:
    return {row.task: row for row in suite.tasks}


def _model_row(suite: SuiteResult, shown: Sequence[str]) -> tuple[str, ...]:
    by_task = _by_task(suite)
    rows = [by_task[name] for name in shown if name in by_task]
    scores = [percent(by_task[name].value) if name in by_task else NONE for name in shown]
    complete = rows and len(rows) == len(shown)
    overall = percent(mean([row.value for row in rows])) if complete else NONE
    answers = sum(row.answers for row in rows)
    counts = [sum(row.unclosed for row in rows), sum(row.truncated for row in rows)]
    return (suite.model, *scores, overall, *(_share(count, answers) for count in counts))


def _detailed_row(row: TaskResult) -> tuple[str, ...]:
    title = row.title if row.headline else f"{row.title} (variant)"
    return (
        title,
        row.metric,
        with_error(row.value, row.stderr),
        f"{row.n:,}",
        _share(row.unclosed, row.answers),
        _share(row.truncated, row.answers),
        number(row.mean_trace_tokens),
        number(row.mean_answer_tokens),
    )


def _overall_row(rows: Sequence[TaskResult]) -> tuple[str, ...]:
    answers = sum(row.answers for row in rows)
    errors = [row.stderr for row in rows if row.stderr is not None]
    stderr = math.hypot(*errors) / len(rows) if len(errors) == len(rows) else None
    return (
        "Overall",
        f"mean of {len(rows)}",
        with_error(mean([row.value for row in rows]), stderr),
        f"{sum(row.n for row in rows):,}",
        _share(sum(row.unclosed for row in rows), answers),
        _share(sum(row.truncated for row in rows), answers),
        "",
        "",
    )


def _overall_note(headline: Sequence[TaskResult]) -> str:
    missing = [BENCHMARKS[name].title for name in NINE if name not in {r.task for r in headline}]
    if not missing:
        return (
            "Overall is the plain mean of the nine. The paper's printed Overall is not, for both "
            "of its Llama models."
        )
    return f"Overall is the plain mean of the {len(headline)} shown, without {', '.join(missing)}."


def _parts(rows: Sequence[TaskResult]) -> list[str]:
    """Which rows are about a part of their benchmark."""
    sizes = [(row, BENCHMARKS[row.task].full_size) for row in rows if row.task in BENCHMARKS]
    return [f"{row.title} {row.n:,} of {size:,}" for row, size in sizes if row.n < size]


def percent(share: float) -> str:
    """A score from 0 to 1 in percent, without its unit."""
    return f"{100 * share:.1f}"


def with_error(value: float, stderr: float | None) -> str:
    """A score in percent with its standard error."""
    return percent(value) if stderr is None else f"{percent(value)} ± {percent(stderr)}"


def _share(count: int, answers: int) -> str:
    return f"{count:,} ({percent(count / answers)} %)" if answers else NONE


# --- text, LaTeX, CSV ----------------------------------------------------------------------------


def as_text(found: Sequence[Table]) -> str:
    """The tables for a terminal."""
    return "\n\n".join("\n".join(_text_lines(table)) for table in found)


def _text_lines(table: Table) -> list[str]:
    notes = [line for note in table.notes for line in wrap(note, NOTE_WIDTH)]
    return [table.title, *aligned([table.head, *table.rows], right=True), *notes]


def as_latex(found: Sequence[Table]) -> str:
    """The tables with the rules of booktabs."""
    return "\n".join(map(_latex, found))


def _latex(table: Table) -> str:
    lines = [
        "% \\usepackage{booktabs}",
        f"% {' '.join(table.title.split())}",
        f"\\begin{{tabular}}{{l{'r' * (len(table.head) - 1)}}}",
        "\\toprule",
        _latex_row(table.head),
        "\\midrule",
        *map(_latex_row, table.rows),
        "\\bottomrule",
        "\\end{tabular}",
        *(f"\\par{{\\footnotesize {_escaped(note)}\\par}}" for note in table.notes),
    ]
    return "\n".join(lines) + "\n"


def _latex_row(cells: Sequence[str]) -> str:
    return " & ".join(map(_escaped, cells)) + " \\\\"


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "−": "$-$",
        "±": r"$\pm$",
        "–": "--",
        **{char: f"\\{char}" for char in "&%$#_{}"},
    }
)


def _escaped(text: str) -> str:
    return text.translate(_LATEX)


COLUMNS = (
    *("model", "task", "title", "metric", "headline", "score", "stderr", "n", "answers"),
    *("unclosed", "truncated", "mean_trace_tokens", "mean_answer_tokens"),
)


def as_csv(suites: Sequence[SuiteResult]) -> str:
    """A row per model and task with unrounded scores from 0 to 1, then the paper's rows."""
    out = io.StringIO()
    writer = csv.DictWriter(out, COLUMNS, restval="", lineterminator="\n")
    writer.writeheader()
    for suite in suites:
        for row in suite.tasks:
            values = {name: getattr(row, name, "") for name in COLUMNS}
            writer.writerow(values | {"model": suite.model, "score": row.value})
        if suite.overall is not None:
            writer.writerow({"model": suite.model, "task": "overall", "score": suite.overall})
    for base in _bases(suites):
        for row in paper_table()[base]:
            model = f"{row.method}, paper, {base}"
            for task, score in row.scores.items():
                title = BENCHMARKS[task].title
                writer.writerow({"model": model, "task": task, "title": title, "score": score})
            writer.writerow({"model": model, "task": "overall", "score": row.overall})
            printed = row.printed_overall
            writer.writerow({"model": model, "task": "overall_as_printed", "score": printed})
    return out.getvalue()


# --- files ---------------------------------------------------------------------------------------


def text_tables(suites: Sequence[SuiteResult]) -> str:
    """What `nrt-jax evaluate` prints at its end."""
    return as_text(tables(suites))


def benchmark_page(suites: Sequence[SuiteResult], found: Sequence[Table]) -> str:
    """A page of tables alone; every text is escaped."""
    return page_template("benchmarks.html.jinja").render(
        title=f"Benchmarks of {', '.join(suite.model for suite in suites)}",
        benchmarks=found,
        light=LIGHT,
        dark=DARK,
    )


def write_tables(suites: Sequence[SuiteResult], out: Path) -> None:
    """Write results.html, results.csv and results.tex."""
    found = tables(suites)
    texts = (benchmark_page(suites, found), as_csv(suites), as_latex(found))
    write_texts(out, dict(zip(FILES, texts, strict=True)))


def write_texts(out: Path, texts: dict[str, str]) -> None:
    """Write files by their names into a folder, which is made if needed."""
    out.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", errors="backslashreplace")
