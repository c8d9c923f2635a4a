"""The claims of the paper in small: figure, interval and verdict of each, from records of sweeps.

    nrt-jax sweep sweeps/hard_tokens
    nrt-jax sweep sweeps/ablations
    .venv/bin/python -m benchmarks.reproduction runs/sweeps/hard_tokens runs/sweeps/ablations

prints the tables of docs/reproduction.md; --write puts them into that page. A figure is the mean
over seeds of a difference between two runs of one seed, with the 95 % interval of Student's t. A
claim holds where the interval lies above 0, does not where none of it does, and is undecided
otherwise.
"""

import argparse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

import numpy as np

from nrt_jax.analysis.run_records import RunRecord, read_runs
from nrt_jax.data.hard_tokens import worked_steps
from nrt_jax.evaluation.estimates import mean_over_questions
from nrt_jax.evaluation.reference_log import read_references
from nrt_jax.experiments.sweep import read_cells

PAGE = Path(__file__).parents[1] / "docs" / "reproduction.md"
BEGIN, END = "<!-- figures -->\n", "<!-- end of figures -->\n"
SIGNALS = ("derived", "fixed")
SFT, JLB, AM, GM, WS = "sft", "jlb", "rlpr", "nrt_gm", "nrt_ws_neg_log_p"
ONE_SIGNAL = (SFT, JLB)
"""Methods with no other token signal than the derived one: it is missing, or the same."""
HARDEST = 0.05
"""Share of an answer's tokens that count as hardest: those of the highest entropy under SFT."""
END_OF_TRAINING = 0.1
"""Share of the steps over which the entropy and the length at the start and the end are means."""


@dataclass(frozen=True)
class Claim:
    """A difference that the paper says is above 0."""

    text: str
    differences: Sequence[float]
    """Of each seed."""


Runs = dict[tuple[str, str], dict[str, RunRecord]]
"""By method, or change, and token signal; then by seed."""


def read_cells_of(folder: Path) -> Runs:
    """The finished runs of a sweep's folder."""
    cells = {folder / name: options for name, options in read_cells(folder).items()}
    begun = [path for path in cells if path.exists()]
    runs: Runs = {}
    for run in read_runs(begun, cells=begun):
        options = cells[run.path]
        method = options.get("method", options.get("change", ""))
        signal = options.get("objective.token_signal", SIGNALS[0])
        runs.setdefault((method, signal), {})[options["seed"]] = run
    return runs


def last(run: RunRecord, metric: str) -> float:
    """Of the last evaluation; NaN for a metric that the run does not have."""
    return run.evaluations[-1].get(metric, float("nan"))


def kept(run: RunRecord, metric: str) -> float:
    """The mean over the last tenth of the steps over that of the first tenth."""
    values = [row[metric] for row in run.training if metric in row]
    size = max(1, round(END_OF_TRAINING * len(values)))
    return fmean(values[-size:]) / fmean(values[:size]) if values else float("nan")


def paired(
    ours: Mapping[str, RunRecord],
    theirs: Mapping[str, RunRecord],
    value: Callable[[RunRecord], float],
) -> list[float]:
    """The difference of a value for every seed that both have, where it is a number."""
    pairs = [(value(ours[seed]), value(theirs[seed])) for seed in ours if seed in theirs]
    return [first - second for first, second in pairs if np.isfinite(first - second)]


def hardest_ratio(run: RunRecord, sft: RunRecord) -> float:
    """The mean of P / P_SFT over the hardest tokens of the questions that both have."""
    other = {row.key: row for row in sft.references}
    ratios = []
    for row in run.references:
        if row.key not in other:
            continue
        base = other[row.key]
        hard = np.argsort(base.entropies)[-max(1, round(HARDEST * len(base.entropies))) :]
        ratios += np.exp(row.logprobs[hard] - base.logprobs[hard]).tolist()
    return fmean(ratios) if ratios else float("nan")


def claims(runs: Runs, ablations: Runs, signal: str) -> list[Claim]:
    """The paper's claims for runs with one token signal."""

    def of(method: str) -> dict[str, RunRecord]:
        return runs.get((method, SIGNALS[0] if method in ONE_SIGNAL else signal), {})

    def lift(method: str) -> dict[str, float]:
        pairs = {seed: (run, of(SFT)[seed]) for seed, run in of(method).items() if seed in of(SFT)}
        return {seed: hardest_ratio(*pair) for seed, pair in pairs.items()}

    def lifts(method: str) -> list[float]:
        ours, theirs = lift(WS), lift(method)
        return [ours[seed] - theirs[seed] for seed in ours if seed in theirs]

    def match(run: RunRecord) -> float:
        return last(run, "eval/exact_match")

    def gain(run: RunRecord) -> float:
        return last(run, "eval/trace_gain") - last(run, "eval/shuffled_gain")

    found = [
        Claim("exact match: WS(−log p) less GM", paired(of(WS), of(GM), match)),
        Claim("exact match: GM less AM", paired(of(GM), of(AM), match)),
        Claim("exact match: AM less SFT", paired(of(AM), of(SFT), match)),
        Claim("exact match: WS(−log p) less JLB", paired(of(WS), of(JLB), match)),
    ]
    for metric, word in (("trace/tokens", "length"), ("policy/entropy", "entropy")):
        text = f"share of the {word} of traces that is kept: WS(−log p) less AM"
        found.append(Claim(text, paired(of(WS), of(AM), lambda run, m=metric: kept(run, m))))
    for method, title in ((GM, "GM"), (AM, "AM")):
        text = f"P / P_SFT of the hardest tokens: WS(−log p) less {title}"
        found.append(Claim(text, lifts(method)))
    text = "log P of the answer, nats per token: own trace less another question's, WS(−log p)"
    found.append(Claim(text, [gain(run) for run in of(WS).values() if np.isfinite(gain(run))]))
    if signal == SIGNALS[0]:
        unclipped = ablations.get(("rewards_not_clipped", signal), {})
        text = "exact match: WS(−log p) with the clipped baseline less without"
        found.append(Claim(text, paired(of(WS), unclipped, match)))
    return found


def interval(values: Sequence[float]) -> tuple[float, float] | None:
    """The mean of the values and half the width of its 95 % interval; None for fewer than two."""
    if len(values) < 2:
        return None
    mean, low, _ = mean_over_questions(values)
    assert low is not None
    return mean, mean - low


def verdict(values: Sequence[float]) -> str:
    """Whether what a claim says is above 0 is so."""
    found = interval(values)
    if found is None:
        return "undecided, one seed" if values else "not measured"
    mean, half = found
    if mean - half > 0:
        return "holds"
    return "does not hold" if mean + half <= 0 else "undecided"


def shown(values: Sequence[float]) -> str:
    """A mean with its interval."""
    if not values:
        return "–"
    found = interval(values)
    return f"{values[0]:.3f}" if found is None else f"{found[0]:.3f} ± {found[1]:.3f}"


def claims_table(runs: Runs, ablations: Runs) -> list[str]:
    """The claims under both token signals."""
    lines = [
        "| claim: above 0 | signal | seeds | difference | verdict |",
        "| --- | --- | --- | --- | --- |",
    ]
    for signal in SIGNALS:
        for claim in claims(runs, ablations, signal):
            values = claim.differences
            cells = (claim.text, f"`{signal}`", str(len(values)), shown(values), verdict(values))
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def worked_share(run: RunRecord) -> float:
    """The share of traces that are the worked steps with every total right; NaN without traces."""
    traced = [(row.trace, row.question) for row in run.references if row.trace is not None]
    right = [trace.strip() == worked_steps(question) for trace, question in traced]
    return fmean(right) if right else float("nan")


COLUMNS = {
    "exact match": lambda run: last(run, "eval/exact_match"),
    "worked steps": worked_share,
    "own trace": lambda run: last(run, "eval/trace_gain"),
    "another's": lambda run: last(run, "eval/shuffled_gain"),
    "length kept": lambda run: kept(run, "trace/tokens"),
    "entropy kept": lambda run: kept(run, "policy/entropy"),
}
"""Figures of a method: the gains are of log P(y*) in nats per token over the empty trace."""


def before_training(run: RunRecord) -> RunRecord:
    """The records of the run's first evaluation alone."""
    first = run.evaluations[0]
    references = read_references(run.path, first["step"])
    return replace(run, evaluations=[first], training=[], references=references)


def methods_table(runs: Runs) -> list[str]:
    """The figures of every method after training, means over seeds, and of the base model."""
    lines = [
        f"| method | signal | seeds | {' | '.join(COLUMNS)} |",
        "| --- " * (3 + len(COLUMNS)) + "|",
    ]
    ours = runs.get((WS, SIGNALS[0]), {})
    base = {seed: before_training(run) for seed, run in ours.items()}
    for (method, signal), by_seed in {("before training", ""): base, **runs}.items():
        of_method = list(by_seed.values())
        cells = [shown(_finite(map(value, of_method))) for value in COLUMNS.values()]
        named = "–" if method == SFT or not signal else f"`{signal}`"
        lines.append(f"| {method} | {named} | {len(of_method)} | {' | '.join(cells)} |")
    return lines


def _finite(values: Iterable[float]) -> list[float]:
    return [value for value in values if np.isfinite(value)]


def with_figures(page: str, tables: Sequence[str]) -> str:
    """The page with the tables between its two marks."""
    before, _, rest = page.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{PAGE} needs the lines {BEGIN.strip()} and {END.strip()}"
    return before + BEGIN + "\n" + "\n".join(tables) + "\n\n" + END + after


def main() -> None:
    parser = argparse.ArgumentParser(description="The claims of the paper, from records of sweeps.")
    parser.add_argument("sweep", type=Path, help="folder of sweeps/hard_tokens")
    parser.add_argument("ablations", type=Path, nargs="?", help="folder of sweeps/ablations")
    parser.add_argument("--write", action="store_true", help=f"put the tables into {PAGE.name}")
    args = parser.parse_args()
    runs = read_cells_of(args.sweep)
    ablations = {} if args.ablations is None else read_cells_of(args.ablations)
    tables = [*methods_table(runs), "", *claims_table(runs, ablations)]
    print("\n".join(tables))
    if args.write:
        PAGE.write_text(with_figures(PAGE.read_text("utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
