"""Prepared data to train on: examples at random places, read from the shards when they are used."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.config.data import DataConfig
from nrt_jax.data.manifest import MANIFEST_FILE, Manifest, Shard, is_prepared, read_manifest
from nrt_jax.data.plan import WORK
from nrt_jax.data.prepared_files import decode, open_shard, turns_of
from nrt_jax.data.rows import Row
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample


class PreparedExamples(Sequence[TokenizedExample]):
    """The examples of a split in order, each read when it is taken.

    A shard is opened at its first example; several threads may read. Raises InputError, with the
    name of the shard, where one is damaged.
    """

    def __init__(self, manifest: Manifest, split: str):
        """Those of a split of a manifest; none where it has no such split."""
        self._directory, self._remedy = manifest.directory, manifest.remedy
        self._shards = manifest.splits.get(split, [])
        self._ends = list(accumulate(shard.rows for shard in self._shards))
        self._readers: dict[int, Any] = {}

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: Any) -> Any:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._read(index, decode)

    def turns(self, index: int) -> list[dict[str, str]]:
        """The turns of an example whose row is a conversation; else none."""
        return self._read(index, turns_of)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle: another process opens the shards itself."""
        return self.__dict__ | {"_readers": {}}

    def at(self, indices: Sequence[int]) -> list[TokenizedExample]:
        """The examples of these indices in their order, by one read per shard."""
        by_shard: dict[int, list[tuple[int, int]]] = {}
        for position, index in enumerate(indices):
            number, place = self._place(index)
            by_shard.setdefault(number, []).append((position, place))
        found: dict[int, TokenizedExample] = {}
        for number, rows in by_shard.items():
            positions, places = zip(*rows, strict=True)
            examples = self._parsed(number, list(places), decode)
            found |= zip(positions, examples, strict=True)
        return [found[position] for position in range(len(indices))]

    def first(self, count: int) -> list[TokenizedExample]:
        """The first examples, at most `count`, by one read per shard."""
        examples: list[TokenizedExample] = []
        for number, shard in enumerate(self._shards):
            wanted = min(shard.rows, count - len(examples))
            if wanted > 0:
                examples += self._parsed(number, list(range(wanted)), decode)
        return examples

    def _read(self, index: int, parse: Callable[[bytes], Any]) -> Any:
        number, place = self._place(index)
        (value,) = self._parsed(number, [place], parse)
        return value

    def _place(self, index: int) -> tuple[int, int]:
        """The shard of an example, and its place there."""
        number = bisect_left(self._ends, index + 1)
        return number, int(index) - (self._ends[number] - self._shards[number].rows)

    def _parsed(self, number: int, places: list[int], parse: Callable[[bytes], Any]) -> list[Any]:
        """What `parse` makes of the records at some places of a shard."""
        shard = self._shards[number]
        path = self._directory / shard.path
        try:
            if number not in self._readers:
                self._readers[number] = self._open(path, shard)
            return [parse(record) for record in self._readers[number].read(places)]
        except InputError:
            raise
        except Exception as error:  # of ArrayRecord and protobuf, each with classes of its own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(f"{path}: is damaged ({reason}); {self._remedy}") from error

    def _open(self, path: Path, shard: Shard) -> Any:
        reader = open_shard(path)
        if (rows := reader.num_records()) != shard.rows:
            raise InputError(
                f"{path}: is damaged ({rows} readable rows of {shard.rows}); {self._remedy}"
            )
        return reader


class Prepared(NamedTuple):
    """Prepared data that fits a config."""

    manifest: Manifest
    train: PreparedExamples
    eval: list[TokenizedExample]


def open_prepared(directory: Path, config: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """Open prepared data for a run: of the evaluation the first data.eval_rows examples.

    Nothing but these is read. Raises InputError for data that was prepared for other tokens or
    with other filters, and for missing and damaged files.
    """
    return _opened(read_manifest(directory), config, tokenizer)


def open_cached(directory: Path, config: DataConfig, tokenizer: Tokenizer) -> Prepared:
    """The same for data that `cached_directory` has prepared, and the next start can again."""
    manifest = read_manifest(directory)
    remedy = f"remove the folder {directory}, and the next start prepares the data again"
    return _opened(replace(manifest, remedy=remedy), config, tokenizer)


def _opened(manifest: Manifest, config: DataConfig, tokenizer: Tokenizer) -> Prepared:
    manifest.check_tokens(config, tokenizer)
    manifest.check_filters(config)
    manifest.check_files()
    held_out = PreparedExamples(manifest, "eval").first(config.eval_rows)
    return Prepared(manifest, PreparedExamples(manifest, "train"), held_out)


def prepared_directory(config: DataConfig) -> Path | None:
    """The directory of prepared data that a config names; None where it names anything else.

    Raises InputError for prepared data beside other sources, or that is not finished.
    """
    if config.generated:
        return None
    paths = [_paths(source.path) for source in config.sources]
    for path in chain.from_iterable(paths):
        if (path / WORK).is_dir() and not is_prepared(path):
            raise InputError(
                f"{path}: its preparation has not finished; run nrt-jax data prepare again, or "
                "nrt-jax data merge after all of its shards"
            )
        if not is_prepared(path):
            continue
        if len(paths) > 1 or len(paths[0]) > 1:
            raise InputError(
                f"{path}: is prepared data, which can only be the one source; prepare the mixture, "
                "or name the files that this was prepared from"
            )
        if config.source not in (None, "prepared"):
            raise InputError(
                f"data.source={config.source}: {path} is prepared data; set data.source=prepared"
            )
        if config.eval_path is not None:
            raise InputError(
                f"data.eval_path={config.eval_path}: {path} has its own evaluation, and its "
                "training rows ask none of those questions; set data.eval_path=null"
            )
        return path
    if config.source == "prepared":
        raise InputError(
            f"{config.location}: has no {MANIFEST_FILE} of prepared data; name a directory of this "
            "machine that nrt-jax data prepare has written"
        )
    return None


def rows_by_number(directory: Path, config: DataConfig, wanted: Sequence[int]) -> Iterator[Row]:
    """Training rows with the fields that they were rendered from, by their numbers in order."""
    manifest = read_manifest(directory)
    train = PreparedExamples(manifest, "train")
    permuted = manifest.content["config"]["permutation_seed"] is not None
    numbers = _by_number(train) if permuted else range(len(train))
    for number in wanted:
        index = numbers[bisect_left(numbers, number, key=lambda i: train[i].example.index)]
        of = train[index].example
        question, turns = of.user_text or of.question, train.turns(index)
        fields: dict[str, Any] = {config.question_field: question, config.answer_field: of.answer}
        yield Row(number, f"row {number}", {config.messages_field: turns} if turns else fields)


def _by_number(train: PreparedExamples) -> list[int]:
    """The places of examples in a permuted order by their numbers; all of them are read."""
    numbers = [example.example.index for example in train]
    return sorted(range(len(numbers)), key=numbers.__getitem__)


def _paths(where: Any) -> list[Path]:
    paths = where if isinstance(where, tuple) else (where,)
    return [path for path in paths if isinstance(path, Path)]
