"""Values of Parquet columns as Python values, whatever type the columns have."""

from typing import Any, NamedTuple

_NANOSECONDS = "[ns"
"""In the name of a type that has them, as in timestamp[ns, tz=UTC]."""


class Unreadable(NamedTuple):
    """A value that Python has no type for, such as a time in nanoseconds."""

    what: str
    """Its Arrow type, or what is wrong with it, for messages."""

    def __repr__(self) -> str:
        return self.what


def column_values(array: Any) -> list[Any]:
    """Each value of an Arrow array; those that cannot be converted as `Unreadable`."""
    if _NANOSECONDS in str(array.type):
        return [_value(scalar) for scalar in array]
    try:
        values = array.to_pylist()
    except Exception:  # of many kinds: of Arrow, of datetime, of zoneinfo, of UTF-8
        return [_value(scalar) for scalar in array]
    if str(array.type) in ("halffloat", "float"):
        narrow = array.type.to_pandas_dtype()
        # The shortest text of the stored precision: 0.1, not 0.10000000149011612.
        return [value if value is None else float(str(narrow(value))) for value in values]
    return values


def _value(scalar: Any) -> Any:
    try:
        return _in_microseconds(scalar).as_py()
    except Exception:  # as above
        return _parts(scalar)


def _in_microseconds(scalar: Any) -> Any:
    """The scalar, a time in microseconds; an exception where one of nanoseconds has more digits.

    Arrow gives nanoseconds as values of pandas where pandas is installed.
    """
    import pyarrow

    of = scalar.type
    if not scalar.is_valid or _NANOSECONDS not in str(of):
        return scalar
    if pyarrow.types.is_timestamp(of):
        return scalar.cast(pyarrow.timestamp("us", of.tz))
    return scalar.cast(pyarrow.duration("us") if pyarrow.types.is_duration(of) else "time64[us]")


def _parts(scalar: Any) -> Any:
    """A struct or a list with its parts converted one by one; else `Unreadable`."""
    import pyarrow

    if isinstance(scalar, pyarrow.StructScalar):
        names = [field.name for field in scalar.type]
        if len(set(names)) == len(names):
            return {name: _value(scalar[i]) for i, name in enumerate(names)}
        twice = next(name for name in names if names.count(name) > 1)
        return Unreadable(f"a struct with the field {twice!r} twice")
    kinds = pyarrow.ListScalar | pyarrow.LargeListScalar | pyarrow.FixedSizeListScalar
    if isinstance(scalar, kinds) and not isinstance(scalar, pyarrow.MapScalar):
        return [_value(part) for part in scalar.values]
    if "string" in str(scalar.type):
        return Unreadable("bytes that are not UTF-8")
    return Unreadable(f"a value of the type {scalar.type}")
