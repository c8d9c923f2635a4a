"""`nrt-jax report`: the results of runs and benchmarks as a page and figures for other programs."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from nrt_jax.analysis.benchmark_report import (
    differences,
    read_evaluations,
    report_tables,
    summarise_evaluations,
)
from nrt_jax.analysis.benchmark_tables import as_csv, as_latex, as_text, benchmark_page, write_texts
from nrt_jax.analysis.drawing import write_drawing
from nrt_jax.analysis.figure_sections import make_figures
from nrt_jax.analysis.page import render_page
from nrt_jax.analysis.run_records import read_runs
from nrt_jax.analysis.seeds import group_by_seed
from nrt_jax.analysis.summary import summarise, table
from nrt_jax.errors import InputError
from nrt_jax.evaluation.results import is_evaluation


def write_report(
    folders: Sequence[Path],
    out: Path,
    *,
    cells: Collection[Path] = (),
    question: str | None = None,
) -> None:
    """Compare finished runs and evaluations of benchmarks, in `out` and as tables on stdout.

    Writes report.html and summary.json; where there are runs also each figure as PNG, SVG and CSV;
    and benchmarks.csv and benchmarks.tex where there are evaluations. Runs that differ by their
    seed alone become one line with a band. `cells` are those of the folders that belong to a sweep:
    of these an unfinished one is left out with a warning. `question` is the row or a part of the
    text of the question that is shown under every model. The keys of summary.json are those of
    `summarise`, with `benchmarks` as `summarise_evaluations` gives it. Raises InputError, and
    writes nothing, for a folder that is neither a run nor an evaluation, a run that is unfinished
    or has no exact match, a broken record, and a question that no run was asked; raises it for an
    `out` that cannot be written.
    """
    evaluations = read_evaluations([folder for folder in folders if is_evaluation(folder)])
    runs = [folder for folder in folders if not is_evaluation(folder)]
    groups = group_by_seed(read_runs(runs, cells)) if runs else []
    if question is not None and not groups:
        raise InputError(f"--question {question}: evaluations keep no traces; name runs too")
    against = differences(evaluations)
    tables = report_tables(evaluations, against) if evaluations else []
    figures = make_figures(groups, question) if groups else None
    summary = summarise(groups) if groups else {}
    printed, texts = [], {}
    if figures is not None:
        printed.append(table(summary))
        texts["report.html"] = render_page(groups, summary, figures, tables)
    if evaluations:
        printed.append(as_text(tables))
        suites = [evaluation.suite for evaluation in evaluations]
        texts.setdefault("report.html", benchmark_page(suites, tables))
        texts |= {"benchmarks.csv": as_csv(suites), "benchmarks.tex": as_latex(tables)}
        summary = summary | {"benchmarks": summarise_evaluations(evaluations, against)}
    texts["summary.json"] = json.dumps(summary, indent=1, allow_nan=False) + "\n"
    drawings = [] if figures is None else figures.drawings
    try:
        write_texts(out, texts)
        for drawing in drawings:
            write_drawing(drawing, out)
    except OSError as error:
        raise InputError(
            f"--out {out}: {error.strerror}; choose a directory that you may write to"
        ) from error
    print("\n\n".join(printed))
    pictures = [f"{drawing.name}.{{png,svg,csv}}" for drawing in drawings]
    *first, last = [*texts, *pictures]
    print(f"\nwrote {', '.join(first)} and {last} to {out}")
