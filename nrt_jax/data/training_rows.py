"""The rows of all files of a config, as the fields that it reads."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import CONVERSATIONS, Benchmark, RowsConfig
from nrt_jax.data.all_rows import read_all
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.row_choice import RowChoice, choose_rows
from nrt_jax.data.row_fields import RowFields
from nrt_jax.data.row_presets import with_preset
from nrt_jax.data.rows import Row
from nrt_jax.errors import InputError


def sources_of(config: DataConfig) -> list[DataConfig]:
    """The config of each source of rows alone, its preset resolved."""
    return [with_preset(source) for source in config.sources]


def evaluation_source(config: DataConfig) -> DataConfig:
    """The config of the rows of `eval_path`, as that of a source; none of them is left out."""
    others = {
        "mixture": (),
        "path": config.eval_path,
        "split": config.eval_split or config.split,
        "permutation_seed": None,
        "exclude_licences": (),
    }
    return with_preset(config.model_copy(update=others))


def benchmark_source(config: DataConfig, benchmark: Benchmark) -> DataConfig:
    """The config of the rows of a benchmark, as that of a source, with its question for an answer
    too; none of them is left out."""
    others: dict[str, Any] = {name: getattr(benchmark, name) for name in RowsConfig.model_fields}
    others |= {"mixture": (), "permutation_seed": None, "source_rows": None, "exclude_licences": ()}
    others["template"] = "tulu" if benchmark.preset in CONVERSATIONS else config.template
    source = with_preset(config.model_copy(update=others))
    answer = {"answer_field": source.question_field, "answer_jinja": source.question_jinja}
    return source.model_copy(update=answer | {"strip_suffixes": ()})


@contextmanager
def naming_benchmarks() -> Iterator[None]:
    """Errors in reading a benchmark name the setting that names its files."""
    try:
        yield
    except InputError as error:
        said = str(error).replace("data.path or data.eval_path", "data.contamination")
        raise InputError(f"a benchmark of data.contamination: {said}") from error


def read_source(
    config: DataConfig,
    where: Path | str | Sequence[Path | str],
    first: int = 0,
    choice: RowChoice | None = None,
) -> Iterator[Row]:
    """The rows of the files that `where` means, in order and numbered through from `first`.

    Where there are several files, the place of a row names its own. `config` is one of
    `sources_of`, and `choice` what `choose_rows` says of it, where it is known already. Raises
    InputError for files that cannot be found or read.
    """
    fields, choice = RowFields(config), choice or choose_rows(config)
    unchanged = read_unchanged(config, where, fields, first, choice)
    return (with_fields(row, fields) for row in unchanged)


def read_unchanged(
    config: DataConfig,
    where: Path | str | Sequence[Path | str],
    fields: RowFields,
    first: int,
    choice: RowChoice | None,
) -> Iterator[Row]:
    """The rows as they stand in the files, for `with_fields`, all of them without a choice; else as
    `read_source`."""
    if choice is None:
        return read_all(config, where, fields.columns, first)
    return read_all(config, where, fields.columns, first, choice.keep(first))


def with_fields(row: Row, fields: RowFields) -> Row:
    """The row with the fields that the config reads."""
    return row._replace(fields=_read(row.fields, fields))


def _read(row: dict | BadRow, fields: RowFields) -> dict | BadRow:
    if isinstance(row, BadRow):
        return row
    try:
        return fields.read(row)
    except BadRow as bad:
        return bad
