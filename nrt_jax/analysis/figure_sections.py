"""The figures of a report: which of them the records allow, and how the page shows each."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup

from nrt_jax.analysis.case_study import Case, case_drawing, choose_case, probability_text
from nrt_jax.analysis.curves import curves_drawing, further_drawings, learning_drawing
from nrt_jax.analysis.drawing import Drawing, panel_svg
from nrt_jax.analysis.gain_table import GainRow, estimate_text, gain_rows, signed
from nrt_jax.analysis.score_table import ScoreTable, score_drawing, score_table
from nrt_jax.analysis.seeds import SeedGroup
from nrt_jax.analysis.token_gains import token_gains_drawing
from nrt_jax.analysis.token_view import MOST_TOKENS, token_lines, tokens_drawing
from nrt_jax.analysis.words import Vocabulary, vocabularies, words_drawing

log = logging.getLogger(__name__)

MOST_VOCABULARIES = 7
"""Methods whose words are drawn: those of one model and task."""

_DYNAMICS = (
    "How the traces change while the model learns (the paper's Fig. 2). A collapse shows as short "
    "traces of low entropy that all problems share."
)
_GAINS = (
    "How much a trace adds to the log probability of the reference answer over the empty trace, on "
    "held-out questions: the model's own trace, and as a control another question's (dashed). A "
    "trace that says something about its question gains more than the control."
)
_TOKENS = (
    "How uncertain SFT is of each token of the held-out reference answers, and how probable these "
    "tokens are after a trace over how probable they are under SFT (the paper's Fig. 3): the mean "
    "probability of a bin's tokens over their mean under SFT, at 1 where both agree. Bands: from "
    "the lowest to the highest seed. Bins with fewer than 10 tokens are left out on the right."
)
_WARMUP = "The steps before NRT, which teach the format alone."


@dataclass(frozen=True)
class Section:
    """Panels under a heading."""

    title: str
    note: str
    drawing: Drawing
    panels: list[Markup]
    folded: bool = False

    @property
    def files(self) -> str:
        """Names of the files with the same figure."""
        return f"{self.drawing.name}.png, .svg and .csv"


@dataclass(frozen=True)
class Figures:
    """Everything that is drawn."""

    scores: ScoreTable
    curves: Section
    sections: list[Section]
    gains: list[GainRow]
    case: Case | None
    drawings: list[Drawing] = field(repr=False)
    """All that are written to files."""
    missing: str
    """What the records do not allow, in one sentence; empty where nothing is missing."""


def make_figures(groups: Sequence[SeedGroup], question: str | None = None) -> Figures:
    """Draw what the records of the runs allow; InputError for a question that no run was asked."""
    case, scores = choose_case(groups, question), score_table(groups)
    further = {drawing.name: drawing for drawing in further_drawings(groups)}
    found = [
        _section(title, note, further[name])
        for name, title, note in (
            ("warmup", "Warm-up", _WARMUP),
            ("dynamics", "The traces over training", _DYNAMICS),
            ("gains", "What a trace adds", _GAINS),
        )
        if name in further
    ]
    tokens = token_gains_drawing(groups)
    if tokens is not None:
        found.append(_section("Which tokens become more probable", _TOKENS, tokens))
    words = vocabularies(groups)[:MOST_VOCABULARIES]
    found += [_words_section(number, words) for number in range(1, len(words) + 1)]
    drawings = [
        *(score_drawing(scores), curves_drawing(groups)),
        *(section.drawing for section in found),
        *([] if case is None else [case_drawing(case), tokens_drawing(case)]),
    ]
    missing = _missing(groups)
    if missing:
        log.warning("%s", missing)
    return Figures(
        scores=scores,
        curves=_section("Curves", "", learning_drawing(groups)),
        sections=found,
        gains=gain_rows(groups),
        case=case,
        drawings=drawings,
        missing=missing,
    )


def page_context(figures: Figures) -> dict[str, Any]:
    """What the page's templates need of the figures."""
    return {
        "figures": figures,
        "token_lines": token_lines,
        "most_tokens": MOST_TOKENS,
        "probability_text": probability_text,
        "estimate_text": estimate_text,
        "signed": signed,
    }


def _section(title: str, note: str, drawing: Drawing, *, folded: bool = False) -> Section:
    panels = [Markup(panel_svg(drawing, panel)) for panel in drawing.panels]
    return Section(title, note, drawing, panels, folded)


def _words_section(number: int, words: Sequence[Vocabulary]) -> Section:
    vocabulary = words[number - 1]
    note = (
        f"{sum(vocabulary.traces.values()):,} words of held-out traces and "
        f"{sum(vocabulary.references.values()):,} of the reference answers of the same questions "
        "(the paper's Fig. 4), with the count of each word in both. Bars: the log odds ratio with "
        "a Dirichlet prior over its standard error; pale ones are below 1.96. The clouds leave out "
        "small words of English."
    )
    title = f"Words of the traces: {vocabulary.group.label}"
    drawing = words_drawing(vocabulary, number)
    # One open, the others at hand: they are four panels each.
    return _section(title, note, drawing, folded=number < len(words))


def _missing(groups: Sequence[SeedGroup]) -> str:
    records = [record for group in groups for record in group.records]
    without = [record.name for record in records if not record.references]
    if not without:
        return ""
    named = without[0] if len(without) == 1 else f"{without[0]} and {len(without) - 1} others"
    return (
        f"{named} kept no tokens of reference answers after the last step (records of an older "
        "version, or evaluation.reference_rows=0), so the figures by token are without them"
    )
