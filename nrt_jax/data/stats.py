"""How many rows each source gives, and how long their prompts and answers are."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.pipeline import Dataset, SourceRows, first_rows
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.types import TokenizedExample

PERCENTILES = (50, 90, 99)


class SourceLengths(NamedTuple):
    """One source: its rows, and the lengths of those that are trained on."""

    name: str
    prompt_tokens: Int32[np.ndarray, "rows"]
    """Of x, with what a chat template writes after t_start."""
    answer_tokens: Int32[np.ndarray, "rows"]
    """Of y*, its end-of-sequence token included."""
    usable: int
    """Rows that may be trained on; those held out for an evaluation, or not drawn for a mixture,
    are not trained on."""
    left_out: Mapping[str, int]
    """The other rows by reason."""

    @property
    def read(self) -> int:
        """All rows."""
        return self.usable + sum(self.left_out.values())


def lengths_of_dataset(dataset: Dataset, name: str) -> list[SourceLengths]:
    """The sources of loaded data; a source without a name of its own gets `name`."""
    rows = {row.name: row for row in dataset.sources}
    by_source: dict[str, list[TokenizedExample]] = {row: [] for row in rows}
    for example in dataset.train:
        by_source.setdefault(example.example.source, []).append(example)
    # Rows may name their sources themselves; then those read without a name are the others.
    named = sum(len(examples) for source, examples in by_source.items() if source not in rows)
    if named and "" in rows:
        rows[""] = rows[""]._replace(usable=rows[""].usable - named)
    # Prepared data know their left-out rows, but not of which source these are.
    left_out = dataset.bad_rows if not rows and len(by_source) == 1 else {}
    return [
        _lengths(rows.get(source, SourceRows(source, len(examples), left_out)), examples, name)
        for source, examples in by_source.items()
    ]


def lengths_of_first_rows(
    config: DataConfig, tokenizer: Tokenizer, count: int
) -> list[SourceLengths]:
    """The same of the first rows of each source alone, none of them held out or left to chance.

    Raises InputError for files that cannot be read.
    """
    found = []
    for source, name in zip(config.sources, config.source_names, strict=True):
        rows = [row for _, row in first_rows(source, tokenizer, count)]
        examples = [row for row in rows if isinstance(row, TokenizedExample)]
        left_out = Counter(row.reason for row in rows if isinstance(row, BadRow))
        read = SourceRows(name, len(examples), dict(left_out))
        found.append(_lengths(read, examples, config.short_location(2)))
    return found


def _lengths(read: SourceRows, examples: Sequence[TokenizedExample], name: str) -> SourceLengths:
    prompts = (len(example.prompt_tokens) + len(example.after_start_tokens) for example in examples)
    answers = (len(example.answer_tokens) for example in examples)
    return SourceLengths(
        name=read.name or name,
        prompt_tokens=np.fromiter(prompts, np.int32, len(examples)),
        answer_tokens=np.fromiter(answers, np.int32, len(examples)),
        usable=read.usable,
        left_out=read.left_out,
    )


def together(sources: Sequence[SourceLengths]) -> SourceLengths:
    """All sources as one."""
    return SourceLengths(
        name="all sources",
        prompt_tokens=np.concatenate([source.prompt_tokens for source in sources]),
        answer_tokens=np.concatenate([source.answer_tokens for source in sources]),
        usable=sum(source.usable for source in sources),
        left_out=sum((Counter(source.left_out) for source in sources), Counter()),
    )


def summarise_source(source: SourceLengths) -> dict[str, Any]:
    """Counts of rows and tokens, and lengths in tokens; lengths are None where no row is left."""
    return {
        "source": source.name,
        "read": source.read,
        "usable": source.usable,
        "trained": len(source.prompt_tokens),
        "left_out": dict(Counter(source.left_out).most_common()),
        "tokens": int(source.prompt_tokens.sum() + source.answer_tokens.sum()),
        "prompt": summarise_lengths(source.prompt_tokens),
        "answer": summarise_lengths(source.answer_tokens),
    }


def summarise_lengths(lengths: Int32[np.ndarray, "rows"]) -> dict[str, float | int] | None:
    """Mean, smallest, percentiles that are lengths of rows, and largest."""
    if not len(lengths):
        return None
    at = np.percentile(lengths, PERCENTILES, method="inverted_cdf")
    percentiles = {f"p{p}": int(value) for p, value in zip(PERCENTILES, at, strict=True)}
    ends = {"min": int(lengths.min()), "max": int(lengths.max())}
    return {"mean": float(lengths.mean()), **percentiles, **ends}
