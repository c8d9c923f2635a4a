"""Strict JSON: what `json.loads` reads in silence is refused."""

import math

import pytest

from nrt_jax.strict_json import KeyTwice, Number, parse_json, parse_row


@pytest.mark.parametrize("parse", [parse_json, parse_row])
@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a": 1, "a": 1}', "a"),
        ('{"a": 1, "b": 2, "b": 2, "a": 3}', "b"),
        ('{"x": [{"y": {"a b": 1, "a b": 2}}]}', "a b"),
        ('{"a": 1, "\\u0061": 2}', "a"),
    ],
)
def test_a_key_twice(parse, text, key):
    with pytest.raises(KeyTwice, match=f"the key '{key}' occurs twice in one object; keep one"):
        parse(text)


def test_equal_keys_of_different_objects():
    assert parse_json('[{"a": 1}, {"a": {"a": 2}}]') == [{"a": 1}, {"a": {"a": 2}}]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("NaN", "NaN is no number of JSON"),
        ('{"a": [-Infinity]}', "-Infinity is no number of JSON"),
        ("1" * 5000, "has more than 4300 digits"),
        ("[" * 100_000, "nested too deeply"),
        ("{", "Expecting property name"),
    ],
)
def test_what_is_no_number_or_no_json(text, said):
    with pytest.raises(ValueError, match=said):
        parse_json(text)


def test_values_for_a_caller_that_checks_fields():
    assert math.isnan(parse_json("NaN", allow_nan=True))
    assert parse_json("1e999", allow_nan=True) == math.inf
    with pytest.raises(KeyTwice):
        parse_json('{"a": NaN, "a": 1}', allow_nan=True)


def test_bytes_in_any_encoding_of_json():
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32-be"):
        assert parse_json('{"a": "ü"}'.encode(encoding)) == {"a": "ü"}


def test_numbers_of_rows_stay_as_they_are_written():
    digits = "9" * 5000
    row = parse_row(f'{{"a": 5.0, "b": [-0, 1e3, 0.10], "c": {digits}, "d": true, "e": "5"}}')
    assert row == {"a": "5.0", "b": ["-0", "1e3", "0.10"], "c": digits, "d": True, "e": "5"}
    assert isinstance(row["a"], Number)
    assert repr(row["b"]) == "[-0, 1e3, 0.10]"
    assert type(row["e"]) is str
    assert math.isnan(parse_row('{"a": NaN}')["a"])
