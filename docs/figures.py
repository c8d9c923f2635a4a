"""Measured figures: from the files of a measurement into docs/figures.json and the documents.

    make demo figures
    .venv/bin/python docs/figures.py quickstart runs/quickstart
    .venv/bin/python docs/figures.py peers OURS_8192 PEER_8192 OURS_32000 PEER_32000
    .venv/bin/python docs/figures.py real_model runs/smollm2_gsm8k/summary.json
    .venv/bin/python docs/figures.py plans plans.json
    .venv/bin/python docs/figures.py format_where runs/format_where/summary.json

`quickstart` reads summary.json of a report and takes its pictures. `peers` reads four files in
the form that `benchmarks/peer_workload.py --out` writes; a peer's needs rollout_cpu_s, update_cpu_s
and peak_rss_gb. `real_model` reads what `benchmarks/real_model.py` writes, `plans` what
`benchmarks/plans.py` does, `format_where` what `benchmarks/format_where.py` does, with its picture.

Each text of TEXTS with the old figures is replaced by that with the new ones; a text that a
document does not hold is an error, and then nothing is written. tests/test_docs.py compares the
documents with docs/figures.json, and a slow test compares docs/figures.json with a fresh run,
within TOLERANCES.
"""

import argparse
import json
import math
import runpy
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
FIGURES = DOCS / "figures.json"
PICTURES = ("curves", "gains", "token_gains", "tokens")
"""Of the quickstart's report, in docs/images."""

REAL_MODEL = runpy.run_path(str(DOCS.parent / "benchmarks" / "real_model.py"))

Figures = dict[str, float]
Text = str | Callable[[Mapping[str, float]], str]
"""With names of figures in braces, or a function of them."""


def real_model_tables(kind: str, figures: Mapping[str, float]) -> str:
    """The tables of the models that were measured with one kind of answers."""
    rows = {}
    for name in REAL_MODEL["TITLES"]:
        prefix = f"{kind}_{name}_"
        of = {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}
        rows |= {name: of} if of else {}
    return REAL_MODEL["tables"](rows) if rows else f"(not measured: {kind})"


PLANNED_MODELS = {
    "llama3_2_3b": "Llama-3.2-3B",
    "mistral_7b_v0_3": "Mistral-7B-v0.3",
    "llama3_1_8b": "Llama-3.1-8B",
    "llama3_1_70b": "Llama-3.1-70B",
}
PLANNED_MACHINES = ("v5e_64", "v5p_32", "v6e_64", "h100x8", "h200x8", "h100x1")


def plans_table(figures: Mapping[str, float]) -> str:
    """A row per model: memory, and time of a step and of the run where it fits."""
    lines = [
        "| | " + " | ".join(f"`{machine}`" for machine in PLANNED_MACHINES) + " |",
        "| --- " * (len(PLANNED_MACHINES) + 1) + "|",
    ]
    smallest = next(iter(PLANNED_MODELS))
    usable = (f"{figures[f'{smallest}_{m}_usable_gb']:.1f} GB" for m in PLANNED_MACHINES)
    lines.append(f"| can be used | {' | '.join(usable)} |")
    for model, title in PLANNED_MODELS.items():
        cells = []
        for machine in PLANNED_MACHINES:
            prefix = f"{model}_{machine}_"
            of = {k.removeprefix(prefix): v for k, v in figures.items() if k.startswith(prefix)}
            if not of:
                cells.append("does not divide")
            elif of["fits"]:
                cells.append(
                    f"**fits**: {of['gb']:.1f} GB, {of['step_s']:.1f} s, {of['hours']:.1f} h"
                )
            else:
                cells.append(f"{of['gb']:.1f} GB")
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


TEXTS: dict[str, dict[str, Sequence[Text]]] = {
    "quickstart": {
        "../README.md": [
            "| base, with a trace | {base_percent:.1f} % | {reward_first:.3f} "
            "| {trace_tokens_first:.2f} | {entropy_first:.2f} |",
            "| base, direct answer | {base_direct_percent:.1f} % | – | – | – |",
            "| SFT | {sft_percent:.1f} % | – | – | – |",
            "| NRT-WS(−log p) | {nrt_percent:.1f} % | {reward_last:.3f} "
            "| {trace_tokens_last:.2f} | {entropy_last:.3f} |",
            "The two runs took {minutes:.1f} minutes, {compile_minutes:.1f} of them compiling.",
        ]
    },
    "peers": {
        "../README.md": [
            "| rollout, vocabulary 8,192 | {rollout_8192:.1f} | {peer_rollout_8192:.1f} "
            "| {rollout_ratio_8192:.2f} |",
            "| rollout, vocabulary 32,000 | {rollout_32000:.1f} | {peer_rollout_32000:.1f} "
            "| {rollout_ratio_32000:.2f} |",
            "| update, vocabulary 8,192 | {update_8192:.1f} | {peer_update_8192:.1f} "
            "| {update_ratio_8192:.2f} |",
            "| update, vocabulary 32,000 | {update_32000:.1f} | {peer_update_32000:.1f} "
            "| {update_ratio_32000:.2f} |",
            "| {gb_8192:.1f} and {gb_32000:.1f} GB "
            "| {peer_gb_8192:.1f} and {peer_gb_32000:.1f} GB |",
            "would take {matrix_percent_8192:.0f} % and {matrix_percent_32000:.0f} % of its time",
        ]
    },
    "real_model": {
        "real_model.md": [partial(real_model_tables, kind) for kind in REAL_MODEL["ANSWERS"]]
    },
    "format_where": {
        "method.md": [
            f"| `{where}` | {{{where}_tokens_first:.1f}} → {{{where}_tokens_last:.1f}} "
            f"| {{{where}_end_length_share_first:.2f}} → {{{where}_end_length_share_last:.2f}} "
            f"| {{{where}_format_nats_first:.1f}} → {{{where}_format_nats_last:.1f}} |"
            for where in ("all", "not_emitted", "natural_end")
        ]
    },
    "plans": {
        "plan.md": [
            plans_table,
            "{maxtext_tokens:,.0f} tokens/s per chip, {maxtext_mfu_percent:.1f} % MFU "
            "| {maxtext_error_percent:+.0f} % |",
            "| {nemo_step_s:.1f} s | {nemo_error_percent:+.0f} % |",
            "rollouts {nemo_rollout_s:.1f} s, scoring {nemo_scoring_s:.1f} s and updates "
            "{nemo_update_s:.1f} s",
        ]
    },
}
"""The texts with figures, by section of docs/figures.json and by document."""

TOLERANCES = {
    "base_percent": 1.0,
    "base_direct_percent": 0.5,
    "sft_percent": 10.0,
    "nrt_percent": 3.0,
    "reward_first": 0.05,
    "reward_last": 0.15,
    "trace_tokens_first": 0.3,
    "trace_tokens_last": 0.3,
    "entropy_first": 0.05,
    "entropy_last": 0.05,
}
"""How far a fresh quickstart may be from docs/figures.json, in the unit of each figure.

Kernels of other processors round differently, and 200 updates amplify that. Times are not compared.
"""


def quickstart_figures(summary: dict[str, Any]) -> Figures:
    """The figures of a report of quickstart/sft and quickstart/nrt."""
    exact = {f"{name}_percent": 100 * share for name, share in summary["exact_match"].items()}
    (nrt,) = (run for run in summary["runs"] if run["method"] == "nrt")
    ends = {
        f"{name}_{when}": nrt[name][when]
        for name in ("reward", "trace_tokens", "entropy")
        for when in ("first", "last")
    }
    seconds = math.fsum(run["seconds"]["total"] for run in summary["runs"])
    compiling = math.fsum(run["seconds"]["compile"] for run in summary["runs"])
    return exact | ends | {"minutes": seconds / 60, "compile_minutes": compiling / 60}


def peer_figures(files: list[Path]) -> Figures:
    """CPU-seconds, memory and ratios at both vocabularies."""
    figures: Figures = {}
    for vocabulary, ours_file, peer_file in ((8192, *files[:2]), (32000, *files[2:])):
        ours, peer = (json.loads(file.read_text("utf-8")) for file in (ours_file, peer_file))
        for phase in ("rollout", "update"):
            own, other = ours[f"{phase}_cpu_s"], peer[f"{phase}_cpu_s"]
            figures[f"{phase}_{vocabulary}"] = own
            figures[f"peer_{phase}_{vocabulary}"] = other
            figures[f"{phase}_ratio_{vocabulary}"] = own / other
        figures[f"gb_{vocabulary}"] = ours["peak_rss_gb"]
        figures[f"peer_gb_{vocabulary}"] = peer["peak_rss_gb"]
        figures[f"matrix_percent_{vocabulary}"] = 100 * ours["update_matrix_share"]
    return figures


def replaced(section: str, old: Figures, new: Figures) -> dict[Path, str]:
    """The documents with the new figures; ValueError for a text that a document does not hold."""
    texts = {}
    for name, templates in TEXTS[section].items():
        path = (DOCS / name).resolve()
        text = path.read_text("utf-8")
        for template in templates:
            before, after = (
                template.format(**figures) if isinstance(template, str) else template(figures)
                for figures in (old, new)
            )
            if text.count(before) != 1:
                raise ValueError(f"{path}: must hold once: {before!r}")
            text = text.replace(before, after)
        texts[path] = text
    return texts


def main() -> None:
    """Read a measurement, and write its figures where they are shown."""
    parser = argparse.ArgumentParser(description="Figures of a measurement into the documents.")
    parser.add_argument("section", choices=TEXTS)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE")
    args = parser.parse_args()
    recorded = json.loads(FIGURES.read_text("utf-8"))
    if args.section == "quickstart":
        (folder,) = args.files
        new = quickstart_figures(json.loads((folder / "summary.json").read_text("utf-8")))
    elif args.section == "peers":
        new = peer_figures(args.files)
    else:
        (summary,) = args.files
        new = json.loads(summary.read_text("utf-8"))
    texts = replaced(args.section, recorded[args.section], new)
    for path, text in texts.items():
        path.write_text(text, encoding="utf-8")
    if args.section == "quickstart":
        for name in PICTURES:
            shutil.copy(folder / f"{name}.png", DOCS / "images" / f"quickstart_{name}.png")
    if args.section == "format_where":
        shutil.copy(summary.parent / "curves.png", DOCS / "images" / "format_where.png")
    recorded[args.section] = new
    FIGURES.write_text(json.dumps(recorded, indent=1) + "\n", encoding="utf-8")
    print(f"wrote {FIGURES} and {', '.join(str(path) for path in texts)}", file=sys.stderr)


if __name__ == "__main__":
    main()
