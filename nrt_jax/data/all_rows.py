"""Every row of a source in order, whatever holds it: files, TensorFlow Datasets, or the hub."""

from collections.abc import Iterator
from typing import Any

from nrt_jax.config.data import DataConfig
from nrt_jax.data.column_rows import count_parquet
from nrt_jax.data.files import find_files, reaching
from nrt_jax.data.hub_rows import HubRows
from nrt_jax.data.rows import FieldsOf, Keep, Row, every_row
from nrt_jax.data.sources import read_rows
from nrt_jax.data.tfds_rows import TfdsRows, is_tfds_directory


def library_rows(config: DataConfig, where: Any) -> TfdsRows | HubRows | None:
    """The data set of a library that a data path means; None for files."""
    if config.source == "hub":
        return HubRows(config, where)
    if config.source == "tfds" or (config.source is None and is_tfds_directory(where)):
        return TfdsRows(config, where)
    return None


def read_all(
    config: DataConfig, where: Any, fields_of: FieldsOf, first: int = 0, keep: Keep = every_row
) -> Iterator[Row]:
    """The kept rows as they stand, numbered through from `first`.

    Where there are several files, the place of a row names its own. Raises InputError for what
    cannot be found or read.
    """
    library = library_rows(config, where)
    if library is not None:
        for row in library.rows(fields_of, _after(first, keep)):
            yield row._replace(number=first + row.number)
        return
    files = find_files(where, config.source)
    options = {"columns": config.columns, "unescape": config.unescape}
    for file in files:
        number, of_file = -1, _after(first, keep)
        with reaching(file.path):
            for row in read_rows(file.format, file.path, fields_of, keep=of_file, **options):
                number = row.number
                if of_file(number):
                    place = row.place if len(files) == 1 else f"{file.path} {row.place}"
                    yield Row(first + number, place, row.fields, str(file.path))
        first += number + 1


def _after(first: int, keep: Keep) -> Keep:
    return lambda number: keep(first + number)


def told_rows(config: DataConfig, where: Any) -> int | None:
    """How many rows a source tells that it has, as Parquet, TFDS and most cards of the hub do."""
    library = library_rows(config, where)
    if library is not None:
        return library.count()
    files = find_files(where, config.source)
    if any(file.format != "parquet" for file in files):
        return None
    return sum(count_parquet(file.path) for file in files)


def count_rows(config: DataConfig, where: Any) -> int | None:
    """How many rows a source has, bad ones and blank lines between rows included.

    Files that do not tell it are read. None for a data set of the hub that does not, since the hub
    would send all of it.
    """
    told = told_rows(config, where)
    if told is not None or config.source == "hub":
        return told
    count = 0
    for row in read_all(config, where, lambda names: names[:1]):
        count = row.number + 1
    return count
