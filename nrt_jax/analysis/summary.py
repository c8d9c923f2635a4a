"""The figures of a comparison: summary.json, and the table for the terminal."""

import math
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Any

from nrt_jax.analysis.run_records import EXACT_MATCH, RunRecord
from nrt_jax.analysis.seeds import SeedGroup, run_labels

WINDOW = 5
"""Training steps over which the first and the last value of a noisy metric are averaged."""

Rows = Sequence[dict[str, int | float]]

FINISH_SHARES = {
    "think_end": "trace/end_think_end_share",
    "length": "trace/end_length_share",
    "other": "trace/end_other_share",
}


def summarise(groups: Sequence[SeedGroup]) -> dict[str, Any]:
    """The content of summary.json. Exact match and shares are from 0 to 1; null: does not apply.

    `exact_match`, only for a comparison of SFT with NRT, each with one seed or several (means):
        `base`         the model before training, which writes a trace and then answers (the NRT
                       run's evaluation of step 0)
        `base_direct`  the model before training, which answers at once (the SFT run's)
        `sft`, `nrt`   after training, each evaluated as before it
    `problems`  held-out problems per evaluation; null when the runs differ, or when the number is
                unknown because an evaluation file may hold fewer than evaluation.examples
    `seeds`     one entry per config that was run with several seeds:
        `label`, `seeds`   its label in the report, and its seeds
        `exact_match`, `reward`, `trace_tokens`, `entropy`
                           {mean, lowest, highest} after training over the seeds; null as below
    `runs`      one entry per run, seeds of one config together:
        `name`, `label`    end of its path; its label in the report
        `path`             its directory, as given
        `method`, `scheme` sft or nrt; the reward scheme, null for sft
        `seed`, `steps`    as configured
        `pairs_seen`       question-answer pairs trained on, in the warm-up too; a pair seen twice
                           counts twice
        `answer_tokens_seen`  tokens of their answers; null for a run that did not count them
        `warmup`           null without one; else its `updates`, its `pairs` and `answer_tokens`,
                           and {first, last} of `loss`, and of `start_logprob`, `end_logprob`,
                           `trace_logprob` and `answer_logprob` in nats
        `problems`         as above, for this run
        `exact_match`      {first, last}: before training and after its last step
        `reward`           {first, last}: mean reward of the traces; this and the next three are
                           null for sft
        `baseline`         {first, last}: mean reward without a trace
        `trace_tokens`     {first, last}: tokens of a sampled trace, without t_start and t_end
        `finish_shares`    {first, last}: share of the traces that ended in t_end (`think_end`),
                           at the limit (`length`) or in another special token (`other`)
        `entropy`          {first, last}: entropy of the policy in nats per token, over the trace
                           (nrt) or the reference answer (sft)
        `skipped_updates`  updates skipped because a gradient was not finite
        `tokens_per_second`  median over the steps of training; null where it was not measured
        `seconds`          per phase: `data`, `generate`, `update`, `evaluate`, and their sum
                           `total`, without start-up and saving; and `compile`, the part of them
                           that was spent compiling
        `goodput`          over all starts: `life_s`, seconds from the first start to the last step;
                           `share` of them that finished steps took, without compiling; and
                           `starts`. null for a run that did not measure it

    The {first, last} of training metrics are means over the first and the last 5 steps, or null if
    one of these values was not finite.
    """
    names = run_labels(groups)
    by_group = [
        [_summarise_run(record, names[record.name]) for record in group.records] for group in groups
    ]
    runs = [run for members in by_group for run in members]
    counts = {run["problems"] for run in runs}
    summary = {
        "problems": counts.pop() if len(counts) == 1 else None,
        "seeds": [
            _summarise_seeds(group, members)
            for group, members in zip(groups, by_group, strict=True)
            if len(members) > 1
        ],
        "runs": runs,
    }
    by_method = {members[0]["method"]: members for members in by_group}
    if len(groups) == 2 and by_method.keys() == {"sft", "nrt"}:
        exact_match = {
            "base": _mean_match(by_method["nrt"], "first"),
            "base_direct": _mean_match(by_method["sft"], "first"),
            "sft": _mean_match(by_method["sft"], "last"),
            "nrt": _mean_match(by_method["nrt"], "last"),
        }
        return {"exact_match": exact_match} | summary
    return summary


def _mean_match(runs: Sequence[dict[str, Any]], when: str) -> float:
    return math.fsum(run["exact_match"][when] for run in runs) / len(runs)


def _summarise_seeds(group: SeedGroup, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    return {
        "label": group.label,
        "seeds": [run["seed"] for run in runs],
        **{key: _spread(runs, key) for key in ("exact_match", "reward", "trace_tokens", "entropy")},
    }


def _spread(runs: Sequence[dict[str, Any]], key: str) -> dict[str, float] | None:
    """Mean, smallest and largest last value; None where a run has none."""
    values = [run[key]["last"] if run[key] else None for run in runs]
    if None in values:
        return None
    mean = math.fsum(values) / len(values)
    return {"mean": mean, "lowest": min(values), "highest": max(values)}


def _summarise_run(record: RunRecord, label: str) -> dict[str, Any]:
    config = record.config
    shares = {name: _ends(record.training, metric) for name, metric in FINISH_SHARES.items()}
    return {
        "name": record.name,
        "label": label,
        "path": str(record.path),
        "method": config.method,
        "scheme": record.scheme,
        "seed": config.seed,
        "steps": config.train.steps,
        "pairs_seen": config.train.steps * config.train.batch_prompts
        + round(_total(record.warmup, "warmup/rows") or 0),
        "answer_tokens_seen": _answer_tokens(record),
        "warmup": _summarise_warmup(record.warmup),
        "problems": record.problems,
        "exact_match": {
            "first": record.evaluations[0][EXACT_MATCH],
            "last": record.evaluations[-1][EXACT_MATCH],
        },
        "reward": _ends(record.training, "reward/mean"),
        "baseline": _ends(record.training, "reward/baseline"),
        "trace_tokens": _ends(record.training, "trace/tokens"),
        "finish_shares": {
            when: {name: share[when] for name, share in shares.items() if share}
            for when in ("first", "last")
        }
        if all(shares.values())
        else None,
        "entropy": _ends(record.training, "policy/entropy"),
        "skipped_updates": int(record.training[-1].get("update/skipped", 0)),
        "tokens_per_second": _median(record, "speed/tokens_per_second"),
        "seconds": _seconds(record),
        "goodput": _goodput(record),
    }


def _goodput(record: RunRecord) -> dict[str, float] | None:
    last = record.training[-1]
    if "goodput/share" not in last:
        return None
    return {
        "life_s": last["goodput/life_s"],
        "share": last["goodput/share"],
        "starts": int(last["goodput/starts"]),
    }


def _median(record: RunRecord, metric: str) -> float | None:
    values = [row[metric] for row in record.training if metric in row]
    return median(values) if values and all(map(math.isfinite, values)) else None


def _summarise_warmup(rows: Rows) -> dict[str, Any] | None:
    if not rows:
        return None
    values = ("loss", *(f"{part}_logprob" for part in ("start", "end", "trace", "answer")))
    return {
        "updates": len(rows),
        "pairs": _total(rows, "warmup/rows"),
        "answer_tokens": _total(rows, "warmup/answer_tokens"),
    } | {name: _ends(rows, f"warmup/{name}") for name in values}


def _answer_tokens(record: RunRecord) -> float | None:
    """Answer tokens of the steps and of the warm-up."""
    of_steps = _total(record.training, "data/answer_tokens")
    of_warmup = _total(record.warmup, "warmup/answer_tokens") or 0.0
    return None if of_steps is None else of_steps + of_warmup


def _total(rows: Rows, metric: str) -> float | None:
    """Sum over the rows; None where one lacks the metric."""
    if not rows or any(metric not in row for row in rows):
        return None
    return math.fsum(row[metric] for row in rows)


def _ends(rows: Rows, metric: str) -> dict[str, float | None] | None:
    values = [row[metric] for row in rows if metric in row]
    if not values:
        return None
    return {"first": _mean(values[:WINDOW]), "last": _mean(values[-WINDOW:])}


def _mean(values: Sequence[float]) -> float | None:
    mean = math.fsum(values) / len(values) if all(map(math.isfinite, values)) else math.nan
    return mean if math.isfinite(mean) else None


def _seconds(record: RunRecord) -> dict[str, float]:
    phases: dict[str, list[float]] = {}
    for row in [*record.warmup, *record.training, *record.evaluations]:
        for metric, value in row.items():
            if metric.startswith("time/"):
                phase = metric.removeprefix("time/").removesuffix("_s")
                phases.setdefault(phase, []).append(value)
    seconds = {phase: math.fsum(values) for phase, values in phases.items()}
    # Compiling is part of the phase that needed it.
    total = math.fsum(value for phase, value in seconds.items() if phase != "compile")
    return seconds | {"total": total}


# --- text ----------------------------------------------------------------------------------------


def percent(share: float) -> str:
    """A share from 0 to 1 as a percentage."""
    return f"{100 * share:.1f} %"


def number(value: float | None) -> str:
    """A number with three significant digits."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:#.3g}".rstrip(".") if value and abs(value) >= 1e-3 else f"{value:.2g}"


def arrow(ends: dict[str, float | None] | None) -> str:
    """First → last."""
    return "–" if ends is None else f"{number(ends['first'])} → {number(ends['last'])}"


def spread(values: dict[str, float] | None) -> str:
    """Mean (lowest to highest)."""
    if values is None:
        return "–"
    return f"{number(values['mean'])} ({number(values['lowest'])} to {number(values['highest'])})"


def percent_spread(values: dict[str, float]) -> str:
    """As `spread`, of shares from 0 to 1 as percentages."""
    low, high = f"{100 * values['lowest']:.1f}", percent(values["highest"])
    return f"{percent(values['mean'])} ({low} to {high})"


def duration(seconds: float) -> str:
    """Seconds in the largest two units that apply."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def problems_text(problems: int | None) -> str:
    """The problems that exact match was measured on."""
    return "held-out problems" if problems is None else f"{problems:,} held-out problems"


def table(summary: dict[str, Any]) -> str:
    """The comparison as text."""
    lines = [f"Exact match on {problems_text(summary['problems'])}"]
    if "exact_match" in summary:
        exact = {name: percent(value) for name, value in summary["exact_match"].items()}
        lines = [
            f"{lines[0]}: base {exact['base']} ({exact['base_direct']} without a trace), "
            f"SFT {exact['sft']}, NRT {exact['nrt']}"
        ]
    rows = [("", "exact match", "reward", "trace tokens", "entropy", "time")]
    for run in summary["runs"]:
        match = run["exact_match"]
        rows.append(
            (
                run["label"],
                f"{percent(match['first'])} → {percent(match['last'])}",
                arrow(run["reward"]),
                arrow(run["trace_tokens"]),
                arrow(run["entropy"]),
                duration(run["seconds"]["total"]),
            )
        )
    for seeds in summary["seeds"]:
        cells = [spread(seeds[key]) for key in ("reward", "trace_tokens", "entropy")]
        label = f"{seeds['label']}, {len(seeds['seeds'])} seeds"
        rows.append((label, percent_spread(seeds["exact_match"]), *cells, ""))
    return "\n".join([*lines, "", *aligned(rows)])


def aligned(rows: Iterable[tuple[str, ...]], *, right: bool = False) -> list[str]:
    """The cells in columns; with `right` all columns but the first end at their right."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if right and i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
