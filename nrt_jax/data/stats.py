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
    trained = dict.fromkeys(rows, _NONE) | _trained(dataset)
    # Rows may name their sources themselves; then those read without a name are the others.
    named = sum(len(lengths.prompt) for source, lengths in trained.items() if source not in rows)
    if named and "" in rows:
        rows[""] = rows[""]._replace(usable=rows[""].usable - named)
    found = [
        _of_source(rows.get(source, SourceRows(source, len(lengths.prompt), {})), lengths, name)
        for source, lengths in trained.items()
    ]
    return [source for source in found if source.read]


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
        lengths = _lengths([lengths_of(example) for example in examples])
        found.append(_of_source(read, lengths, config.short_location(2)))
    return found


class _Lengths(NamedTuple):
    prompt: Int32[np.ndarray, "rows"]
    answer: Int32[np.ndarray, "rows"]


def lengths_of(example: TokenizedExample) -> tuple[int, int]:
    """Tokens of x, with what a chat template writes after t_start, and of y*."""
    prompt = len(example.prompt_tokens) + len(example.after_start_tokens)
    return prompt, len(example.answer_tokens)


class RowLengths(Sequence[tuple[int, int]]):
    """`lengths_of` each example, which is read when it is asked for."""

    def __init__(self, examples: Sequence[TokenizedExample]):
        self._examples = examples

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, row: Any) -> Any:
        return lengths_of(self._examples[row])


def _lengths(pairs: Sequence[tuple[int, int]]) -> _Lengths:
    return _Lengths(*np.array(pairs, np.int32).reshape(-1, 2).T)


_NONE = _lengths([])


def _trained(dataset: Dataset) -> dict[str, _Lengths]:
    """Lengths by source of the rows that are trained on; prepared data are not read for it."""
    manifest = dataset.manifest
    if manifest is not None:
        return {
            source: _Lengths(
                manifest.train_lengths(source, "prompt_tokens"),
                manifest.train_lengths(source, "answer_tokens"),
            )
            for source in manifest.train_rows
        }
    pairs: dict[str, list[tuple[int, int]]] = {}
    for example in dataset.train:
        pairs.setdefault(example.example.source, []).append(lengths_of(example))
    return {source: _lengths(of_source) for source, of_source in pairs.items()}


def _of_source(read: SourceRows, lengths: _Lengths, name: str) -> SourceLengths:
    return SourceLengths(
        name=read.name or name,
        prompt_tokens=lengths.prompt,
        answer_tokens=lengths.answer,
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
