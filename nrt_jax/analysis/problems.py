"""The held-out problems of a report: what every run wrote and answered, side by side."""

from collections.abc import Sequence
from typing import Any

from nrt_jax.analysis.seeds import SeedGroup, run_labels

MAX_PROBLEMS = 200
"""Problems on the page, so that a browser stays fast."""
MAX_ANSWERS = 600
"""Answers on the page with more than MAX_RUNS runs."""
MAX_RUNS = 8
"""With more runs, the first seed of each config answers."""

OUTCOMES = {
    "all": "all",
    "differ": "runs differ",
    "gained": "learned: wrong before, right after in some run",
    "lost": "lost: right before, wrong after in some run",
    "wrong": "wrong in every run",
}
"""Choices of the page's filter, and what it calls them."""


def problem_rows(groups: Sequence[SeedGroup]) -> list[dict[str, Any]]:
    """The first problems, unselected, with the answers of the base model and of every run, or with
    many runs of the first seed of every config.

    The base model's answers are from the first run that writes traces, or else from the first run.
    `title` is the question alone and `prompt` all of x where a chat template makes them differ.
    """
    records = [record for group in groups for record in group.records]
    most = MAX_PROBLEMS
    if len(records) > MAX_RUNS:
        records = [group.records[0] for group in groups]
        most = max(10, MAX_ANSWERS // len(records))
    names = run_labels(groups)
    first = next((record for record in records if record.scheme), records[0])
    base = "Base model" if len(records) < 3 else f"{names[first.name]} before training"
    before = first.samples_of(-first.config.warmup.updates)
    after = [(names[r.name], r.samples_of(r.config.train.steps)) for r in records]
    keys = list(dict.fromkeys(key for samples in (before, *map(_second, after)) for key in samples))
    return [_problem(key, (base, before), after) for key in keys[:most]]


Samples = dict[tuple[str, str], dict[str, Any]]


def _second(named: tuple[str, Samples]) -> Samples:
    return named[1]


def _problem(
    key: tuple[str, str], base: tuple[str, Samples], after: Sequence[tuple[str, Samples]]
) -> dict[str, Any]:
    question, reference = key
    answers = [(name, samples.get(key)) for name, samples in (base, *after)]
    shown = next(sample for _, sample in answers if sample is not None)
    title = shown.get("user_text") or question
    return {
        "title": title,
        "prompt": question if title != question else None,
        "reference": reference,
        "answers": answers,
        "outcomes": " ".join(_outcomes([sample for _, sample in answers])),
    }


def _outcomes(samples: Sequence[dict[str, Any] | None]) -> list[str]:
    """The choices of the filter that a problem belongs to; the base model's sample comes first."""
    before = samples[0] and samples[0]["correct"]
    after = [sample["correct"] for sample in samples[1:] if sample is not None]
    belongs = {
        "differ": len(set(after)) > 1,
        "gained": before is False and any(after),
        "lost": before is True and not all(after),
        "wrong": bool(after) and not any(after),
    }
    return ["all", *(name for name, holds in belongs.items() if holds)]
