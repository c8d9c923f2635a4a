"""Rows → tokenised examples: what a run trains and evaluates on."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import location
from nrt_jax.data.bad_rows import BadRow, BadRows, Rejected
from nrt_jax.data.generators import generate_evaluation, generate_row
from nrt_jax.data.manifest import Manifest
from nrt_jax.data.mixture import draw_mixture
from nrt_jax.data.prepared import Prepared, open_cached, open_prepared, prepared_directory
from nrt_jax.data.prepared_cache import cached_directory
from nrt_jax.data.row_choice import choose_rows, row_ranks
from nrt_jax.data.row_filters import RowFilters
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.selection import IN_EVALUATION, Permuted, select
from nrt_jax.data.source_counts import log_counts
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.training_rows import evaluation_source, read_source, sources_of
from nrt_jax.errors import InputError
from nrt_jax.types import Example, TokenizedExample

ROWS_PER_SLICE = 4096


class SourceRows(NamedTuple):
    """What was read of one source of training rows."""

    name: str
    """In a mixture; empty where there is one source."""
    usable: int
    left_out: dict[str, int]
    """The other rows by reason."""


@dataclass(frozen=True)
class Dataset:
    """What a run trains and evaluates on; no question is in both."""

    train: Sequence[TokenizedExample]
    eval: list[TokenizedExample]
    bad_rows: dict[str, int]
    """Left-out rows by reason, training rows with a question of the evaluation included."""
    rejected: Sequence[Rejected] = ()
    """The rows that could not be used, file by file."""
    sources: Sequence[SourceRows] = ()
    """What was read of each source of files."""
    manifest: Manifest | None = None
    """Of prepared data, which has the lengths of all examples."""


def load_dataset(config: DataConfig, tokenizer: Tokenizer) -> Dataset:
    """Read, check and tokenise the config's data.

    The training rows of small files are in memory. Those of large ones are prepared once, and they,
    prepared and generated rows come on access. Raises InputError for files and templates that
    cannot be read and for too many bad rows.
    """
    if config.generated:
        return _generated(config, RowTokenizer(config, tokenizer))
    if (directory := prepared_directory(config)) is not None:
        return _of_prepared(open_prepared(directory, config, tokenizer))
    if (directory := cached_directory(config, tokenizer)) is not None:
        return _of_cache(config, open_cached(directory, config, tokenizer))
    read = _read_training(config, tokenizer)
    train, bad, from_files = read.examples, read.bad, None
    if config.eval_path is not None:
        source = evaluation_source(config)
        held_out = _read_files(source, config.eval_path, RowTokenizer(source, tokenizer), 0)
        from_files, bad = held_out.examples, [*bad, held_out.bad]
    in_files = None if from_files is None else _questions(from_files)
    chosen = select(config, _questions(train), in_files, _permuted(read.order, train))
    evaluation = [(train if from_files is None else from_files)[i] for i in chosen.evaluation]
    bad_rows = sum((one.counts for one in bad), Counter())
    if chosen.overlap:
        bad_rows[IN_EVALUATION] = chosen.overlap
    kept = [train[i] for i in chosen.train]
    log_counts(config, Counter(example.example.source for example in kept))
    rejected = [row for one in bad for row in one.rejected]
    return Dataset(kept, evaluation, dict(bad_rows), rejected, read.sources)


def first_rows(
    config: DataConfig, tokenizer: Tokenizer, count: int
) -> Iterator[tuple[str, TokenizedExample | BadRow]]:
    """The first `count` rows of each source with their places, in its order; no more are read.

    Training may hold some of them out for the evaluation.
    """
    if config.generated:
        rows = RowTokenizer(config, tokenizer)
        for index in range(min(count, config.generated_rows)):
            example = generate_row(config, index)
            yield f"row {index}", rows.of_example(example)
        return
    if (directory := prepared_directory(config)) is not None:
        train = open_prepared(directory, config, tokenizer).train
        yield from ((f"row {row.example.index}", row) for row in islice(train, count))
        return
    filters = RowFilters(config)
    for source, name in zip(sources_of(config), config.source_names, strict=True):
        assert source.path is not None, "DataConfig requires a path for file sources"
        row, unread = None, islice(read_source(source, source.path), count)
        tokenized_rows = RowTokenizer(source, tokenizer).of_rows(unread)
        for row, tokenized in filters.of_rows(source, tokenized_rows):
            yield f"{name} {row.place}".strip(), tokenized
        if row is None:
            BadRows(source.location).check(0, config.max_bad_share)


def _of_prepared(prepared: Prepared) -> Dataset:
    """Without the left-out rows, which its folder names."""
    manifest = prepared.manifest
    return Dataset(
        train=prepared.train,
        eval=prepared.eval,
        bad_rows=manifest.rejected,
        sources=[
            SourceRows(source["name"], source["usable"], source["rejected"])
            for source in manifest.content["sources"]
            if not source["evaluates"]
        ],
        manifest=manifest,
    )


def _of_cache(config: DataConfig, prepared: Prepared) -> Dataset:
    """What the files themselves would give."""
    log_counts(config, prepared.manifest.train_rows)
    return replace(_of_prepared(prepared), rejected=prepared.manifest.read_rejected())


# --- files ---------------------------------------------------------------------------------------


class _ReadFiles(NamedTuple):
    examples: list[TokenizedExample]
    bad: BadRows
    next_number: int
    """Of the first row of the next source."""
    order: np.ndarray | None
    """The numbers of all rows in the permuted order."""


class _Training(NamedTuple):
    examples: list[TokenizedExample]
    bad: list[BadRows]
    sources: list[SourceRows]
    order: np.ndarray | None
    """As in `_ReadFiles`; a permutation is of one source."""


def _read_training(config: DataConfig, tokenizer: Tokenizer) -> _Training:
    """The usable training rows of every source, of a mixture those that are drawn."""
    first, order = 0, None
    by_source, bad, sources = [], [], []
    filters = RowFilters(config)
    for source, name in zip(sources_of(config), config.source_names, strict=True):
        assert source.path is not None, "DataConfig requires a path for file sources"
        rows = RowTokenizer(source, tokenizer, name)
        read = _read_files(source, source.path, rows, first, filters)
        first, order = read.next_number, read.order
        bad.append(read.bad)
        by_source.append(read.examples)
        sources.append(SourceRows(name, len(read.examples), dict(read.bad.counts)))
    filters.finish()
    drawn = draw_mixture(config, [len(examples) for examples in by_source])
    examples = [of[i] for of, rows in zip(by_source, drawn, strict=True) for i in rows]
    return _Training(examples, bad, sources, order)


def _read_files(
    config: DataConfig,
    where: Path | str | Sequence[Path | str],
    rows: RowTokenizer,
    first: int,
    filters: RowFilters | None = None,
) -> _ReadFiles:
    """The usable rows of one source that pass the filters, numbered from `first`."""
    examples: list[TokenizedExample] = []
    bad_rows = BadRows(location(where))
    choice = choose_rows(config)
    unread = read_source(config, where, first, choice)
    while rows_of_slice := list(islice(unread, ROWS_PER_SLICE)):
        tokenized_rows = rows.of_rows(rows_of_slice)
        if filters is not None:
            tokenized_rows = filters.of_rows(config, tokenized_rows)
        for row, tokenized in tokenized_rows:
            if isinstance(tokenized, BadRow):
                bad_rows.add(row.place, tokenized, file=row.file, fields=row.fields)
            else:
                examples.append(tokenized)
        first = rows_of_slice[-1].number + 1
    bad_rows.check(len(examples), config.max_bad_share)
    return _ReadFiles(examples, bad_rows, first, None if choice is None else choice.order)


def _permuted(order: np.ndarray | None, train: list[TokenizedExample]) -> Permuted | None:
    if order is None:
        return None
    examples = [example.example for example in train]
    ranks = row_ranks(order)[[example.index for example in examples]]
    return Permuted(ranks, [example.source for example in examples])


def _questions(examples: list[TokenizedExample]) -> list[str]:
    return [example.example.question for example in examples]


# --- generators ----------------------------------------------------------------------------------


class _GeneratedExamples(Sequence):
    """The training rows of a built-in task, by index."""

    def __init__(self, config: DataConfig, rows: RowTokenizer):
        self._config = config
        self._rows = rows

    def __len__(self) -> int:
        return self._config.generated_rows

    def __getitem__(self, index: int) -> TokenizedExample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        example = generate_row(self._config, int(index))
        return _tokenize_generated(example, self._config, self._rows)


def _generated(config: DataConfig, rows: RowTokenizer) -> Dataset:
    held_out = generate_evaluation(config)
    evaluation = [_tokenize_generated(example, config, rows) for example in held_out]
    return Dataset(_GeneratedExamples(config, rows), evaluation, {})


def _tokenize_generated(
    example: Example, config: DataConfig, rows: RowTokenizer
) -> TokenizedExample:
    tokenized = rows.of_example(example)
    if isinstance(tokenized, BadRow):
        raise InputError(f"data.source={config.source}: {tokenized.detail}") from tokenized
    return tokenized
