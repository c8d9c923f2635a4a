"""JSON in which nothing is ambiguous: no key twice in an object, no number that is none.

`json.loads` keeps the last of two equal keys and reads NaN and Infinity.
"""

import json
from typing import Any, NoReturn

MAX_DIGITS = 4300
"""Longest integer that Python converts."""


class Number(str):
    """A number as it is written in the JSON, such as 5.0 or 1e3."""

    def __repr__(self) -> str:
        return str(self)


class KeyTwice(ValueError):
    """An object gives a key twice, and which value is meant is not known."""


def parse_json(text: str | bytes, *, allow_nan: bool = False) -> Any:
    """The value of a JSON text; bytes may be in UTF-8, UTF-16 or UTF-32.

    ValueError, in one line, for what is no JSON, a key that an object has twice (at any depth),
    NaN, Infinity, integers that Python does not convert, and texts nested too deeply. `allow_nan`
    leaves NaN and Infinity to a caller that checks them field by field, as 1e999 is in any case.
    """
    if allow_nan:
        return _loads(text, parse_int=_integer)
    return _loads(text, parse_int=_integer, parse_constant=_no_constant)


def parse_row(text: str) -> Any:
    """As `parse_json`, with each number as the `Number` that was written, and NaN as a float."""
    return _loads(text, **_AS_WRITTEN)


def _loads(text: str | bytes, **hooks: Any) -> Any:
    try:
        return json.loads(text, object_pairs_hook=_object, **hooks)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise KeyTwice(f"the key {_shorten(twice)!r} occurs twice in one object; keep one")
    return result


_AS_WRITTEN = {"parse_int": Number, "parse_float": Number, "parse_constant": float}
ROW_DECODER = json.JSONDecoder(object_pairs_hook=_object, **_AS_WRITTEN)
"""Reads one value within a text as `parse_row` does; deep nesting is a RecursionError."""


def _integer(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"the number {_shorten(text)} has more than {MAX_DIGITS} digits")
    return int(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _shorten(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."
