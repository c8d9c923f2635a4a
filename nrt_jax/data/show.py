"""Print training rows as the model sees them: `nrt-jax data show`.

line 1
  x         11  <s>⟨1⟩<|user|>↵
                1+2↵
  t_start    1  <|think_start|>⟨32768⟩
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.manifest import read_manifest
from nrt_jax.data.pipeline import first_rows
from nrt_jax.data.prepared import prepared_directory
from nrt_jax.data.source_counts import source_table
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.types import TokenizedExample

BOLD, DIM, RED, RESET = "\x1b[1m", "\x1b[2m", "\x1b[31m", "\x1b[0m"
TRACE = "⟨trace, sampled⟩"
LABEL_WIDTH, COUNT_WIDTH = 8, 6


class Part(NamedTuple):
    """A part of the sequence that has one role in the loss."""

    label: str
    color: str
    meaning: str
    loss: str


X = Part("x", "\x1b[36m", "the prompt", "no loss")
T_START = Part("t_start", "\x1b[35m", "opens the trace", "format term")
Z = Part("z", "\x1b[33m", "the trace", "trace term")
T_END = Part("t_end", "\x1b[35m", "closes the trace", "format term")
Y = Part("y*", "\x1b[32m", "the reference answer", "token term")
EOS = Part("eos", "\x1b[34m", "ends the sequence", "token term")


def show_rows(
    config: DataConfig, tokenizer: Tokenizer, *, reasons: bool, rows: int, color: bool
) -> Iterator[str]:
    """A legend, of prepared data the table of its named sources, and the first `rows` rows of each
    source, each as text to print.

    `reasons` says whether the model writes a trace (NRT) or answers at once (SFT). The texts are
    decoded from the ids of training; special tokens appear by name and id. Without `color`,
    brackets mark the ends of a part. No more rows are read. Raises InputError as `load_dataset`
    does.
    """
    parts = [X, T_START, Z, T_END, Y, EOS] if reasons else [X, *map(_sft, (Y, EOS))]
    paint = _Paint(color)
    yield f"{paint(BOLD, config.location)}\ntemplate {config.template_file or config.template}"
    yield _legend(parts, paint)
    directory = prepared_directory(config)
    counts = {} if directory is None else read_manifest(directory).train_rows
    if any(counts):
        yield "\n".join(["", *source_table(config, counts), ""])
    for place, row in first_rows(config, tokenizer, rows):
        if isinstance(row, BadRow):
            yield f"{paint(BOLD, place)}\n  {paint(RED, 'left out')}  {_visible(str(row))}\n"
        else:
            yield f"{paint(BOLD, place)}\n{_row(row, parts, config, tokenizer, paint)}\n"


class _Paint:
    def __init__(self, color: bool):
        self.color = color

    def __call__(self, style: str, text: str) -> str:
        return f"{style}{text}{RESET}" if self.color and text else text


def _sft(part: Part) -> Part:
    return part._replace(loss="cross-entropy")


def _legend(parts: Sequence[Part], paint: _Paint) -> str:
    lines = [
        f"  {paint(part.color, part.label.ljust(LABEL_WIDTH))} {part.meaning:<22}"
        f"{paint(DIM, part.loss)}"
        for part in parts
    ]
    return "\n".join(["", *lines, ""])


def _row(
    row: TokenizedExample,
    parts: Sequence[Part],
    config: DataConfig,
    tokenizer: Tokenizer,
    paint: _Paint,
) -> str:
    ids = {
        X.label: row.prompt_tokens.tolist(),
        T_START.label: [tokenizer.think_start_id, *row.after_start_tokens.tolist()],
        T_END.label: [tokenizer.think_end_id],
        Y.label: row.answer_tokens[:-1].tolist(),
        EOS.label: row.answer_tokens[-1:].tolist(),
    }
    lines = []
    for part in parts:
        if part.label == Z.label:
            count, text = "?", TRACE
        else:
            starts = part.label == X.label and config.template == "plain"
            count = str(len(ids[part.label]))
            text = _text(ids[part.label], tokenizer, starts=starts).removesuffix("\n")
            text = text if paint.color else f"[{text}]"
        label = paint(part.color, part.label.ljust(LABEL_WIDTH))
        indent = "\n" + " " * (2 + LABEL_WIDTH + COUNT_WIDTH + 2)
        shown = indent.join(paint(part.color, line) for line in text.split("\n"))
        lines.append(f"  {label}{paint(DIM, count.rjust(COUNT_WIDTH))}  {shown}")
    return "\n".join(lines)


def _text(ids: Sequence[int], tokenizer: Tokenizer, *, starts: bool) -> str:
    """Special tokens as name⟨id⟩, the texts between them decoded."""
    texts = []
    for special, run in itertools.groupby(ids, key=tokenizer.special_ids.__contains__):
        if special:
            texts += [f"{tokenizer.token(i)}⟨{i}⟩" for i in run]
        else:
            texts.append(_visible(_decode(list(run), tokenizer, starts=starts)))
    return "".join(texts)


def _decode(ids: list[int], tokenizer: Tokenizer, *, starts: bool) -> str:
    if starts or tokenizer.inner is tokenizer.backend:
        return tokenizer.decode(ids)
    # Decoding removes a first space, which these ids do not have; after a token it removes none.
    before = tokenizer.decode([tokenizer.eos_id])
    return tokenizer.decode([tokenizer.eos_id, *ids]).removeprefix(before)


def _visible(text: str) -> str:
    """Mark line ends, and escape what a terminal would interpret."""
    shown = ("↵\n" if c == "\n" else c if c.isprintable() else repr(c)[1:-1] for c in text)
    return "".join(shown)
