"""`nrt-jax report`: the results of runs as a page, a picture, and figures for other programs."""

import json
from collections.abc import Sequence
from pathlib import Path

from nrt_jax.analysis.curves import write_png
from nrt_jax.analysis.page import render_page
from nrt_jax.analysis.run_records import read_runs
from nrt_jax.analysis.seeds import group_by_seed
from nrt_jax.analysis.summary import summarise, table
from nrt_jax.errors import InputError


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Compare finished runs: report.html, curves.png and summary.json in `out`, a table on stdout.

    Runs that differ by their seed alone become one line with a band. The keys of summary.json are
    those of `summarise`. Raises InputError, and writes nothing, for a directory that is not a run,
    a run that is unfinished or has no evaluation, and a broken record; raises it for an `out` that
    cannot be written.
    """
    groups = group_by_seed(read_runs(runs))
    summary = summarise(groups)
    page = render_page(groups, summary)
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "summary.json").write_text(
            json.dumps(summary, indent=1, allow_nan=False) + "\n",
            encoding="utf-8",
        )
        (out / "report.html").write_text(page, encoding="utf-8", errors="backslashreplace")
        write_png(groups, out / "curves.png")
    except OSError as error:
        raise InputError(
            f"--out {out}: {error.strerror}; choose a directory that you may write to"
        ) from error
    print(table(summary))
    print(f"\nwrote report.html, curves.png and summary.json to {out}")
