"""Numbers in texts: found, and written in one form."""

import re
from fractions import Fraction

_MINUS = str.maketrans(dict.fromkeys("\u2212\ufe63\uff0d\u2013\u2012", "-"))
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_VALUE = rf"(?:{_DIGITS}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)(?:[eE][-+]?[0-9]{{1,2}}(?![0-9]))?"
_CURRENCY = r"(?:US)?[$€£¥]"
_NUMBER = re.compile(
    # A minus after a digit, a letter or a bracket is a difference or a range.
    rf"(?P<sign>(?<![\w.)\]}}])[-+])?(?:{_CURRENCY}\s?(?P<inner>-)?)?(?<![A-Za-z_0-9])"
    rf"(?:(?P<over>(?<![/0-9])[0-9]+)\s?/\s?(?P<under>[1-9][0-9]*)(?![/0-9.,]*[/0-9])|"
    rf"(?P<value>{_VALUE}))\s?%?"
)
_LATEX = [
    (re.compile(r"\\[dt]?frac\s*\{\s*(-?[0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}"), r"\1/\2"),
    (re.compile(r"\{,\}|\\[,!](?=[0-9])"), ""),
    (re.compile(r"\\([$%])"), r"\1"),
]
MAX_DIGITS = 300
"""A longer number is none."""


def find_last_number(text: str) -> str | None:
    """The last number of a text as it has it, with sign, currency and per cent."""
    found = list(_NUMBER.finditer(_readable(text)))
    return found[-1][0] if found else None


def plain_number(text: str) -> str:
    """The value of a text that is a number, and other texts stripped."""
    value = number_value(text)
    return text.strip() if value is None else value


def number_value(text: str) -> str | None:
    """The value of a text that is one number, as an integer or a fraction; None for other texts.

    5.00, $5, "5." and 5% are "5"; 0.5 and 1/2 are "1/2"; 1,234 is "1234".
    """
    match = _NUMBER.fullmatch(_readable(text).strip().removesuffix("."))
    if match is None or len(match[0]) > MAX_DIGITS:
        return None
    if match["over"]:
        value = Fraction(int(match["over"]), int(match["under"]))
    else:
        value = Fraction(match["value"].replace(",", ""))
    negative = (match["sign"] == "-") != bool(match["inner"])
    return str(-value if negative else value)


def _readable(text: str) -> str:
    text = text.translate(_MINUS)
    for pattern, plain in _LATEX:
        text = pattern.sub(plain, text)
    return text
