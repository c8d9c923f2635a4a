"""Rows of files that are stored by columns: Parquet, and the Arrow files of saved data sets."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from nrt_jax.data.parquet_values import column_values
from nrt_jax.data.rows import FieldsOf, Keep, Row, every_row
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import HEAD_BYTES, recognise

BATCH_ROWS = 1024


def read_parquet(
    path: Any, file: Any, fields_of: FieldsOf, keep: Keep = every_row
) -> Iterator[Row]:
    """The rows of a Parquet file; only the columns `fields_of(names of all columns)` are read.

    Rows that are not kept have no fields.
    """
    import pyarrow
    import pyarrow.parquet

    _check_kind(path, file, (b"PAR1",))
    try:
        with pyarrow.parquet.ParquetFile(file) as table:
            columns = columns_of(path, table.schema_arrow.names, fields_of)
            batches = table.iter_batches(batch_size=BATCH_ROWS, columns=columns)
            yield from _rows(batches, columns, keep)
    # Of a damaged file pyarrow raises also a bare OSError.
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, "Parquet", error) from error


def count_parquet(path: Any) -> int:
    """The number of rows that a Parquet file tells."""
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            return pyarrow.parquet.read_metadata(file).num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise _unreadable(path, "Parquet", error) from error


def read_arrow(path: Any, file: Any, fields_of: FieldsOf, keep: Keep = every_row) -> Iterator[Row]:
    """The rows of an Arrow stream, as `datasets` saves it, or of an Arrow file, batch by batch."""
    import pyarrow
    import pyarrow.ipc

    head = _check_kind(path, file, (b"ARROW1", b"\xff\xff\xff\xff"))
    try:
        if head.startswith(b"ARROW1"):
            with pyarrow.ipc.open_file(file) as table:
                columns = columns_of(path, table.schema.names, fields_of)
                every = (table.get_batch(i) for i in range(table.num_record_batches))
                yield from _rows(_small(every), columns, keep)
        else:
            with pyarrow.ipc.open_stream(file) as stream:
                columns = columns_of(path, stream.schema.names, fields_of)
                yield from _rows(_small(stream), columns, keep)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, "Arrow", error) from error


def _check_kind(path: Any, file: Any, marks: tuple[bytes, ...]) -> bytes:
    head = file.read(HEAD_BYTES)
    file.seek(0)
    told = None if head.startswith(marks) else recognise(head)
    if told is not None:
        raise InputError(f"{path}: {told}")
    return head


def _rows(batches: Iterable[Any], columns: Sequence[str], keep: Keep) -> Iterator[Row]:
    import pyarrow

    number = 0
    for batch in batches:
        kept = [keep(number + i) for i in range(batch.num_rows)]
        # To convert a value costs far more than to leave its row out.
        read = batch if all(kept) else batch.filter(pyarrow.array(kept, pyarrow.bool_()))
        values = zip(*(column_values(read.column(name)) for name in columns), strict=True)
        for is_kept in kept:
            fields = dict(zip(columns, next(values), strict=True)) if is_kept else {}
            yield Row(number, f"row {number}", fields)
            number += 1


def _small(batches: Iterable[Any]) -> Iterator[Any]:
    """The batches in pieces: a batch of a saved data set may be large."""
    for batch in batches:
        for first in range(0, batch.num_rows, BATCH_ROWS):
            yield batch.slice(first, BATCH_ROWS)


def _unreadable(path: Any, kind: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split())
    return InputError(f"{path}: not a readable {kind} file ({reason}); check data.source")


def columns_of(path: Any, names: Sequence[str], fields_of: FieldsOf) -> list[str]:
    """The columns to read; InputError when one of them is missing or there twice."""
    columns = list(dict.fromkeys(fields_of(names)))
    for column in columns:
        if column not in names:
            has = ", ".join(map(repr, names[:5])) or "none"
            raise InputError(
                f"{path}: has no column {column!r} (it has {has}); name the columns in "
                "data.question_field and data.answer_field, or in data.messages_field"
            )
        if names.count(column) > 1:
            raise InputError(
                f"{path}: has {names.count(column)} columns named {column!r}, and which one is "
                "meant is not known; rename or drop the others"
            )
    return columns
