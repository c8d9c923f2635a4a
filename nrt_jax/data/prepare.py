"""`nrt-jax data prepare`: tokenise a config's rows once, in parts that outlive the process.

    files ─► slices of rows ─► workers: tokens ─► parts ─► merge: shards, metadata, manifest

A part holds a slice of a source's rows and depends on nothing but the config and the files. So any
number of processes on any number of machines make the same parts, and a part that a killed process
did not finish is made again.
"""

import hashlib
import logging
import time
import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, discarded, excerpt
from nrt_jax.data.duplicates import digest_of
from nrt_jax.data.parts import KEY_BYTES, TABLE, Note, Part, write_part
from nrt_jax.data.plan import ROWS_PER_PART, Plan, Source, begin
from nrt_jax.data.prepared_files import encode
from nrt_jax.data.row_choice import rows_to_read
from nrt_jax.data.row_fields import RowFields
from nrt_jax.data.row_filters import RowFilters
from nrt_jax.data.row_tokens import RowTokenizer, as_text
from nrt_jax.data.rows import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.training_rows import read_unchanged, with_fields
from nrt_jax.data.workers import in_workers
from nrt_jax.types import TokenizedExample

log = logging.getLogger(__name__)


class Slice(NamedTuple):
    """The rows of a part, as they stand in the files."""

    source: int
    path: Path
    rows: list[Row]


def prepare(
    config: DataConfig, tokenizer: Tokenizer, out: Path, *, workers: int, share: tuple[int, int]
) -> Plan:
    """Tokenise a share of the rows, (its index, how many there are), into parts.

    Parts that are there are kept, and nothing is read when all are.

    Raises InputError for rows and templates that cannot be read, and for an `out` that holds
    anything else.
    """
    plan = begin(config, tokenizer, out)
    if plan.finished or plan.missing_part() is None:
        return plan
    writer = PartWriter(plan.sources, tokenizer, RowFilters(config))
    index, count = share
    rows, done, started = [0] * len(plan.sources), 0, time.monotonic()
    with tqdm(total=known_rows(plan), unit=" rows", disable=None) as bar:

        def unmade() -> Iterator[Slice]:
            for number, of_part in enumerate(slices(plan)):
                rows[of_part.source] += len(of_part.rows)
                if number % count == index and not of_part.path.exists():
                    yield of_part
                elif not bar.disable:
                    # The rate is that of the rows which are tokenised here.
                    bar.initial += len(of_part.rows)
                    bar.update(len(of_part.rows))

        for made in in_workers(writer, unmade(), workers, threads=2):
            bar.update(made)
            done += made
    plan.write_totals(rows, count)
    seconds = time.monotonic() - started
    log.info("tokenised %d of %d rows, %.0f per second", done, sum(rows), done / seconds)
    return plan


def slices(plan: Plan) -> Iterator[Slice]:
    """The rows of all sources in order, by parts."""
    first = 0
    for number, source in enumerate(plan.sources):
        if source.evaluates:
            first = 0
        config = source.config
        assert config.path is not None, "DataConfig requires a path for file sources"
        choice = plan.choices[number]
        unread = read_unchanged(config, config.path, RowFields(config), first, choice)
        part = 0
        while rows := list(islice(unread, ROWS_PER_PART)):
            yield Slice(number, plan.part_path(number, part), rows)
            first, part = rows[-1].number + 1, part + 1


def known_rows(plan: Plan) -> int | None:
    """How many rows are read, where all sources tell it; else None."""
    chosen = zip(plan.sources, plan.choices, strict=True)
    told = [rows_to_read(source.config, choice) for source, choice in chosen]
    counts = [count for count in told if count is not None]
    return sum(counts) if len(counts) == len(told) else None


class PartWriter:
    """Makes the part of a slice; a worker builds the readers and tokenizers that it needs."""

    def __init__(self, sources: list[Source], tokenizer: Tokenizer, filters: RowFilters):
        self._sources = sources
        self._tokenizer = tokenizer
        self._filters = filters
        self._opened: dict[int, tuple[RowFields, RowTokenizer]] = {}

    def __call__(self, of_part: Slice) -> int:
        """Write the part; the number of its rows."""
        source = self._sources[of_part.source]
        if of_part.source not in self._opened:
            config = source.config
            opened = RowFields(config), RowTokenizer(config, self._tokenizer, source.name)
            self._opened[of_part.source] = opened
        fields, tokenizer = self._opened[of_part.source]
        bad, entries, records, notes, labels = [], [], [], [], {}
        rows = [with_fields(row, fields) for row in of_part.rows]
        for position, (row, tokenized) in enumerate(tokenizer.of_rows(rows)):
            found = None if source.evaluates else self._filters.find(source.config, row, tokenized)
            if found is not None or isinstance(tokenized, BadRow):
                why = found or tokenized
                left_out = discarded(row.place, why, file=row.file, fields=row.fields)
                bad.append((position, left_out))
                continue
            records.append(encode(tokenized, _turns(row, tokenizer, source.config)))
            notes.append(Note(row.place, row.file, excerpt(row.fields)).encode())
            label = labels.setdefault(tokenized.example.source, len(labels))
            entries.append(_entry(tokenized, label, position, records[-1], notes[-1]))
        part = Part(len(rows), len(records), bad, list(labels))
        write_part(of_part.path, part, np.array(entries, TABLE), records, notes)
        return len(rows)


def _entry(
    example: TokenizedExample, label: int, position: int, record: bytes, note: bytes
) -> tuple:
    """The line of the part's table."""
    question = example.example.question.encode()
    key = hashlib.blake2b(question, digest_size=KEY_BYTES).digest()
    of_note = position, len(note), zlib.crc32(note)
    of_record = example.example.index, len(record), zlib.crc32(record)
    prompt = len(example.prompt_tokens) + len(example.after_start_tokens)
    lengths = prompt, len(example.answer_tokens)
    return key, digest_of(example.example), *of_note, *of_record, *lengths, label


def _turns(row: Row, tokenizer: RowTokenizer, config: DataConfig) -> list[dict[str, str]]:
    """The turns of a row that is a conversation, which the prompt may be rendered from anew."""
    assert isinstance(row.fields, dict), "an unusable row has no tokens"
    if tokenizer.fields_of(row.fields) != (config.messages_field,):
        return []
    turns = row.fields[config.messages_field]
    return [{"role": turn["role"], "content": str(as_text(turn["content"]))} for turn in turns]
