"""What a trace adds to log P of the answer after the last step, with the control and intervals."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from nrt_jax.analysis.run_records import RunRecord
from nrt_jax.analysis.seeds import SeedGroup
from nrt_jax.evaluation.estimates import Estimate, mean_over_questions


@dataclass(frozen=True)
class GainRow:
    """One method; gains over the empty trace in nats per token of the answer."""

    label: str
    over: str
    """What the intervals are over: seeds, or questions where there is one seed."""
    own: Estimate
    shuffled: Estimate | None
    """After another question's trace; None where all questions are the same."""
    difference: Estimate | None
    """The first less the second."""


def gain_rows(groups: Sequence[SeedGroup]) -> list[GainRow]:
    """The methods whose runs have kept tokens of their references after the last step."""
    found = []
    for group in groups:
        by_run = [gains for record in group.records if (gains := _by_question(record))]
        if not by_run:
            continue
        over = f"{len(by_run[0]['own'])} questions"
        values = by_run[0]
        if len(by_run) > 1:
            over = f"{len(by_run)} seeds"
            names = [name for name in values if all(name in of_run for of_run in by_run)]
            values = {name: [float(np.mean(run[name])) for run in by_run] for name in names}
        estimates = {name: mean_over_questions(of) for name, of in values.items()}
        found.append(
            GainRow(
                label=group.label,
                over=over,
                own=estimates["own"],
                shuffled=estimates.get("shuffled"),
                difference=estimates.get("difference"),
            )
        )
    return found


def _by_question(record: RunRecord) -> dict[str, list[float]]:
    """Gains per question; empty for a run without traces or without tokens."""
    own = [gain for row in record.references if (gain := row.own_gain) is not None]
    if not own:
        return {}
    shuffled = [gain for row in record.references if (gain := row.shuffled_gain) is not None]
    if len(shuffled) < len(own):
        return {"own": own}
    difference = [a - b for a, b in zip(own, shuffled, strict=True)]
    return {"own": own, "shuffled": shuffled, "difference": difference}


def estimate_text(estimate: Estimate | None) -> str:
    """A gain with its 95 % interval."""
    if estimate is None:
        return "–"
    if estimate.low is None or estimate.high is None:
        return signed(estimate.value)
    return f"{signed(estimate.value)} ({signed(estimate.low)} to {signed(estimate.high)})"


def signed(value: float) -> str:
    """A gain with three decimals and its sign."""
    return f"{value:+.3f}".replace("-", "−")
