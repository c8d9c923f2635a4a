"""Fig. 3: how probable the tokens of the reference answers are, by how uncertain SFT is of them.

The tokens are those of the held-out questions that a method's runs and the SFT runs have both
scored. A token is as hard as its entropy under SFT, the mean over the SFT runs; P_SFT is the
geometric mean over these runs. In each bin of entropy P / P_SFT is the mean of P over that of
P_SFT: a mean of the ratios would be that of the few tokens whose P_SFT is near 0.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import numpy as np
from jaxtyping import Float, Int
from matplotlib.axes import Axes

from nrt_jax.analysis.drawing import Cell, Drawing, Panel
from nrt_jax.analysis.ink import Ink, cycle, marker, style_axes
from nrt_jax.analysis.run_records import RunRecord
from nrt_jax.analysis.seeds import Line, SeedGroup, facets, legend
from nrt_jax.evaluation.reference_log import ReferenceRow

WIDTHS = (0.02, 0.05, 0.1, 0.2, 0.25, 0.5, 1.0)
"""Of bins, in nats: the first that leaves at most MOST_BINS."""
MOST_BINS = 14
FEWEST = 10
"""Tokens of a bin whose ratio is drawn."""
Key = tuple[str, int, tuple[int, ...]]


@dataclass(frozen=True)
class Baseline:
    """Tokens under SFT, by question."""

    entropies: dict[Key, Float[np.ndarray, "A"]]
    logprobs: dict[Key, Float[np.ndarray, "A"]]


@dataclass(frozen=True)
class Ratios:
    """P / P_SFT of one method, per bin."""

    line: Line
    seeds: list[Float[np.ndarray, "bins"]]
    """Of each seed; NaN in a bin with fewer than FEWEST tokens."""
    counts: Int[np.ndarray, "bins"]
    """Tokens that it has in common with SFT; of the first seed."""


@dataclass(frozen=True)
class TokenGains:
    """What the figure shows of one facet."""

    facet: str
    edges: Float[np.ndarray, "edges"]
    counts: Int[np.ndarray, "bins"]
    """All tokens under SFT."""
    median: float
    methods: list[Ratios]


def token_gains(groups: Sequence[SeedGroup]) -> list[TokenGains]:
    """The figure of each facet with tokens under SFT and under another method."""
    found = []
    for facet, lines in facets(groups).items():
        sft = [record for line in lines if not line.group.reasons for record in line.group.records]
        baseline = baseline_of([record.references for record in sft if record.references])
        others = [line for line in lines if line.group.reasons and _has_tokens(line.group)]
        if not baseline.entropies or not others:
            continue
        entropies = np.concatenate(list(baseline.entropies.values()))
        edges = bin_edges(float(entropies.max()))
        gains = TokenGains(
            facet=facet,
            edges=edges,
            counts=np.histogram(entropies, edges)[0],
            median=float(np.median(entropies)),
            methods=[_ratios(line, baseline, edges) for line in others],
        )
        if any(ratios.counts.any() for ratios in gains.methods):
            found.append(gains)
    return found


def baseline_of(runs: Sequence[Sequence[ReferenceRow]]) -> Baseline:
    """Means over the SFT runs, of the questions that all of them have scored."""
    by_key = [{row.key: row for row in rows} for rows in runs]
    keys = [key for key in by_key[0] if all(key in rows for rows in by_key)] if by_key else []

    def mean_over_runs(field: str) -> dict[Key, np.ndarray]:
        values = {key: [getattr(rows[key], field) for rows in by_key] for key in keys}
        return {key: np.mean(arrays, axis=0) for key, arrays in values.items()}

    return Baseline(mean_over_runs("entropies"), mean_over_runs("logprobs"))


def bin_edges(largest: float) -> Float[np.ndarray, "edges"]:
    """Edges of equal bins from 0 to at least the largest entropy."""
    counts = [max(1, int(np.ceil(largest / width + 1e-9))) for width in WIDTHS]
    chosen = next((i for i, n in enumerate(counts) if n <= MOST_BINS), len(WIDTHS) - 1)
    return np.arange(counts[chosen] + 1) * WIDTHS[chosen]


def ratio_per_bin(
    rows: Sequence[ReferenceRow], baseline: Baseline, edges: Float[np.ndarray, "edges"]
) -> tuple[Float[np.ndarray, "bins"], Int[np.ndarray, "bins"]]:
    """P / P_SFT and the number of tokens in each bin; NaN where there are fewer than FEWEST."""
    common = [row for row in rows if row.key in baseline.entropies]
    if not common:
        return np.full(len(edges) - 1, np.nan), np.zeros(len(edges) - 1, int)
    entropies = np.concatenate([baseline.entropies[row.key] for row in common])
    p_sft = np.exp(np.concatenate([baseline.logprobs[row.key] for row in common]))
    p = np.exp(np.concatenate([row.logprobs for row in common]))
    counts = np.histogram(entropies, edges)[0]
    sums = [np.histogram(entropies, edges, weights=weights)[0] for weights in (p, p_sft)]
    enough = (counts >= FEWEST) & (sums[1] > 0)
    return np.where(enough, sums[0] / np.where(enough, sums[1], 1), np.nan), counts


def _has_tokens(group: SeedGroup) -> bool:
    return any(record.references for record in group.records)


def _ratios(line: Line, baseline: Baseline, edges: np.ndarray) -> Ratios:
    runs: list[RunRecord] = [record for record in line.group.records if record.references]
    of_seeds = [ratio_per_bin(record.references, baseline, edges) for record in runs]
    return Ratios(line, [ratio for ratio, _ in of_seeds], of_seeds[0][1])


# --- drawing -------------------------------------------------------------------------------------


def token_gains_drawing(groups: Sequence[SeedGroup]) -> Drawing | None:
    """Both panels of each facet; None where no tokens are common to SFT and another method."""
    found = token_gains(groups)
    if not found:
        return None
    panels = [
        Panel(title=_titled(title, gains.facet), draw=partial(draw, gains=gains))
        for gains in found
        for title, draw in (
            ("Answer tokens by their entropy under SFT", _draw_counts),
            ("Probability of the tokens over that under SFT", _draw_ratios),
        )
    ]
    shown = {ratios.line.label for gains in found for ratios in gains.methods}
    entries = [entry for entry in legend(facets(groups)) if entry[0] in shown]
    rows: list[list[Cell]] = [
        [
            *("models and data", "entropy from", "entropy to", "tokens under SFT", "method"),
            *("tokens", "mean ratio", "lowest", "highest", "seeds"),
        ]
    ]
    rows += chain.from_iterable(map(_csv_rows, found))
    return Drawing(name="token_gains", panels=tuple(panels), rows=rows, legend=entries)


def _titled(title: str, facet: str) -> str:
    return f"{title}, {facet}" if facet else title


def _csv_rows(gains: TokenGains) -> list[list[Cell]]:
    rows: list[list[Cell]] = []
    for b, count in enumerate(gains.counts):
        bounds = [float(gains.edges[b]), float(gains.edges[b + 1])]
        for ratios in gains.methods:
            values = [float(seed[b]) for seed in ratios.seeds if np.isfinite(seed[b])]
            figures: list[Cell] = [None, None, None]
            if values:
                figures = [float(np.mean(values)), min(values), max(values)]
            tokens = int(ratios.counts[b])
            name = ratios.line.label
            rows.append([gains.facet, *bounds, int(count), name, tokens, *figures, len(values)])
    return rows


def _draw_counts(axes: Axes, ink: Ink, *, gains: TokenGains) -> None:
    width = float(gains.edges[1])
    axes.bar(gains.edges[:-1], gains.counts, 0.94 * width, align="edge", color=ink.runs[4])
    for left, count in zip(gains.edges[:-1], gains.counts, strict=True):
        if count:
            where = (left + 0.47 * width, count)
            look = {"ha": "center", "va": "bottom", "fontsize": 7.5, "color": ink.text}
            axes.text(*where, f"{count:,}", **look)
    axes.axvline(gains.median, color=ink.text, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_yscale("log")
    axes.set_ylim(0.7, 4 * max(1, gains.counts.max()))
    axes.set_ylabel("tokens", color=ink.text)
    axes.set_xlabel(f"nats; median, dashed: {gains.median:.3g}", color=ink.text)
    _finish(axes, ink, "Answer tokens by their entropy under SFT", gains.facet)


def _draw_ratios(axes: Axes, ink: Ink, *, gains: TokenGains) -> None:
    middles = (gains.edges[:-1] + gains.edges[1:]) / 2
    axes.axhline(1, color=ink.text, linewidth=1)
    for ratios in gains.methods:
        colour = cycle(ink.runs, ratios.line.place)
        seeds = np.stack(ratios.seeds)
        drawn = np.isfinite(seeds).all(axis=0)
        means = seeds[:, drawn].mean(axis=0)
        style = {"color": colour, "markersize": 5, "linewidth": 1.9, **marker(ratios.line.place)}
        axes.plot(middles[drawn], means, **style)
        if len(seeds) > 1:
            low, high = seeds[:, drawn].min(axis=0), seeds[:, drawn].max(axis=0)
            axes.fill_between(middles[drawn], low, high, color=colour, alpha=0.2, linewidth=0)
    axes.set_xlim(0, float(gains.edges[-1]))
    axes.set_ylabel("P / P under SFT", color=ink.text)
    axes.set_xlabel("entropy of the token under SFT, nats", color=ink.text)
    _finish(axes, ink, "Probability over that under SFT", gains.facet)


def _finish(axes: Axes, ink: Ink, title: str, facet: str) -> None:
    shown = f"{title}\n{facet}" if facet else title
    axes.set_title(shown, color=ink.text, parse_math=False)
    style_axes(axes, ink)
