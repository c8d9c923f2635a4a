"""Fig. 4: words that traces use more than the reference answers of the same questions, and less.

Two counts of a word are compared by the log of its odds in both texts, with a Dirichlet prior from
both together (Monroe et al. 2008, "Fightin' Words"), and the difference is divided by its standard
error: a rare word must differ more than a common one.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.font_manager import FontProperties, findfont
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from matplotlib.textpath import TextPath
from matplotlib.transforms import Affine2D

from nrt_jax.analysis.drawing import Cell, Drawing, Panel
from nrt_jax.analysis.ink import Ink, cycle, style_axes
from nrt_jax.analysis.run_records import RunRecord
from nrt_jax.analysis.seeds import SeedGroup

PRIOR_WORDS = 500.0
"""Size of the prior: that many words with the shares of both texts together."""
SHOWN = 14
"""Words of each list."""
CLOUD_WORDS = 60
CERTAIN = 1.96
"""Standard errors: a word below it is drawn pale."""
_WIDTH, _HEIGHT = 520, 300
_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")


@dataclass(frozen=True)
class WordUse:
    """How often a word occurs in traces and in reference answers."""

    word: str
    in_traces: int
    in_references: int
    log_odds: float
    """Above 0 where traces use it more; nats."""
    z: float
    """The same in standard errors."""


@dataclass(frozen=True)
class Vocabulary:
    """The words of one group."""

    group: SeedGroup
    traces: Counter[str]
    references: Counter[str]
    used: list[WordUse]
    """By z, those of the traces first."""


def vocabularies(groups: Sequence[SeedGroup]) -> list[Vocabulary]:
    """The words of every group whose last evaluation has traces."""
    found = []
    for group in groups:
        texts = [pair for record in group.records for pair in _texts(record)]
        traces = count_words([trace for trace, _ in texts])
        references = count_words([reference for _, reference in texts])
        if traces and references:
            used = word_use(traces, references)
            found.append(Vocabulary(group, traces, references, used))
    return found


def _texts(record: RunRecord) -> list[tuple[str, str]]:
    """Traces with the reference answers of their questions, after the last step."""
    kept = {(row.question, row.reference): row.trace for row in record.references}
    samples = record.samples_of(record.config.train.steps).values()
    kept |= {(s.get("user_text") or s["question"], s["reference"]): s["trace"] for s in samples}
    return [(trace, reference) for (_, reference), trace in kept.items() if trace is not None]


def count_words(texts: Sequence[str]) -> Counter[str]:
    """Words in small letters, and numbers."""
    return Counter(word for text in texts for word in _WORD.findall(text.lower()))


def word_use(traces: Counter[str], references: Counter[str]) -> list[WordUse]:
    """Every word with its log odds ratio, from the most over-used in traces to the least."""
    words = sorted(traces.keys() | references.keys())
    y = np.asarray([[traces[word], references[word]] for word in words], np.float64)
    both = y.sum(axis=1)
    prior = (PRIOR_WORDS * both / both.sum())[:, None]
    smoothed = y + prior
    rest = smoothed.sum(axis=0) - smoothed
    log_odds = np.log(smoothed) - np.log(np.maximum(rest, 1e-9))
    delta = log_odds[:, 0] - log_odds[:, 1]
    z = delta / np.sqrt((1 / smoothed).sum(axis=1))
    order = np.argsort(-z, kind="stable")
    return [
        WordUse(words[i], int(y[i, 0]), int(y[i, 1]), float(delta[i]), float(z[i])) for i in order
    ]


# --- drawing -------------------------------------------------------------------------------------


def words_drawing(vocabulary: Vocabulary, number: int) -> Drawing:
    """The four panels of Fig. 4 for one group; `number` names its files."""
    more = [use for use in vocabulary.used if use.z > 0][:SHOWN]
    less = [use for use in reversed(vocabulary.used) if use.z < 0][:SHOWN]
    bars = {"Words that traces use more": more, "Words that reference answers use more": less}
    clouds = {"Traces": vocabulary.traces, "Reference answers": vocabulary.references}
    panels = []
    for place, ((title, uses), (of, counts)) in enumerate(
        zip(bars.items(), clouds.items(), strict=True)
    ):
        height = 1.3 + 0.21 * max(len(uses), 6)
        draw = partial(_draw_bars, title=title, uses=uses, place=place)
        panels.append(Panel(title=title, draw=draw, height=height))
        draw = partial(_draw_cloud, title=of, counts=counts, place=place)
        panels.append(Panel(title=f"Word cloud: {of}", draw=draw, height=height))
    rows: list[list[Cell]] = [
        ["method", "word", "in traces", "in reference answers", "log odds ratio", "z"],
        *(
            [
                vocabulary.group.label,
                use.word,
                use.in_traces,
                use.in_references,
                use.log_odds,
                use.z,
            ]
            for use in vocabulary.used
        ),
    ]
    return Drawing(name=f"words_{number}", panels=tuple(panels), rows=rows)


def _draw_bars(axes: Axes, ink: Ink, *, title: str, uses: Sequence[WordUse], place: int) -> None:
    colour = cycle(ink.runs, place)
    for y, use in enumerate(uses):
        alpha = 1.0 if abs(use.z) >= CERTAIN else 0.4
        axes.barh(y, abs(use.z), height=0.72, color=colour, alpha=alpha, linewidth=0)
        counts = f" {use.in_traces:,} : {use.in_references:,}"
        axes.text(abs(use.z), y, counts, va="center", fontsize=8.5, color=ink.text)
    axes.set_yticks(range(len(uses)), [use.word for use in uses])
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    axes.set_ylim(max(len(uses), 1) - 0.5, -0.5)
    axes.set_xlim(0, 1.3 * max((abs(use.z) for use in uses), default=1))
    axes.set_title(title, color=ink.text)
    axes.set_xlabel("log odds ratio in standard errors; traces : references", color=ink.text)
    style_axes(axes, ink)
    axes.grid(visible=False, axis="y")


def _draw_cloud(axes: Axes, ink: Ink, *, title: str, counts: Counter[str], place: int) -> None:
    """Words as outlines, so that they fit in a browser with other fonts too."""
    axes.set_xlim(0, _WIDTH)
    axes.set_ylim(_HEIGHT, 0)
    axes.set_aspect("equal")
    axes.set_axis_off()
    axes.set_title(title, color=ink.text)
    outlines = _outlines(_frequent(counts))
    for words, colour in ((outlines[:12], cycle(ink.runs, place)), (outlines[12:], ink.text)):
        if words:
            # No patch of the axes: their limits are known, and a patch would be measured.
            whole = Path.make_compound_path(*words)
            axes.add_artist(PathPatch(whole, facecolor=colour, linewidth=0))


@cache
def _outlines(frequent: tuple[tuple[str, int], ...]) -> list[Path]:
    return [_outline(placed) for placed in _layout(frequent)]


def _outline(placed: "_Placed") -> Path:
    """The word where the layout has it: its box begins at the pen, and at the top of its ink."""
    path = TextPath((0, 0), placed.word, size=placed.size, prop=_font(), usetex=False)
    path = path.transformed(Affine2D().scale(1, -1))
    if not placed.upwards:
        top = path.get_extents().y0
        return path.transformed(Affine2D().translate(placed.left, placed.top - top))
    turned = path.transformed(Affine2D().rotate_deg(-90))
    left = turned.get_extents().x0
    return turned.transformed(Affine2D().translate(placed.left - left, placed.top + placed.length))


def _frequent(counts: Counter[str]) -> tuple[tuple[str, int], ...]:
    """The most frequent words, without the small ones of English unless there are no others."""
    from wordcloud import STOPWORDS

    content = {word: n for word, n in counts.items() if word not in STOPWORDS}
    ranked = sorted((content or counts).items(), key=lambda item: (-item[1], item[0]))
    return tuple(ranked[:CLOUD_WORDS])


class _Placed(NamedTuple):
    """A word of a cloud, in pixels."""

    word: str
    size: float
    top: float
    left: float
    upwards: bool
    length: float
    """Of its box, along the word."""


def _layout(frequent: tuple[tuple[str, int], ...]) -> list[_Placed]:
    from PIL import ImageFont
    from wordcloud import WordCloud

    file = findfont(_font())
    cloud = WordCloud(
        width=_WIDTH,
        height=_HEIGHT,
        font_path=file,
        max_font_size=84,
        random_state=0,
        prefer_horizontal=0.85,
        relative_scaling=0.5,
        margin=4,
    )
    return [
        _Placed(
            word=word,
            size=size,
            top=top,
            left=left,
            upwards=turn is not None,
            length=ImageFont.truetype(file, size).getbbox(word, anchor="lt")[2],
        )
        for (word, _), size, (top, left), turn, _ in cloud.generate_from_frequencies(
            dict(frequent)
        ).layout_
    ]


def _font() -> FontProperties:
    return FontProperties(family="DejaVu Sans", weight="bold")
