"""Final answers in LaTeX, as the solutions of MATH have them: \\boxed{...} and its content."""

import re

from nrt_jax.evaluation.numbers import plain_number

_BOX = re.compile(r"\\(?:boxed|fbox)(?![A-Za-z])\s*")
_WORD = re.compile(r"[^\s$.{}]+")


def boxed(text: str) -> str | None:
    """The content of the last \\boxed or \\fbox that is closed, without boxes around all of it."""
    closing = _closing_braces(text)
    start, stop, found = 0, len(text), None
    while True:
        inner, end = None, start
        for match in _BOX.finditer(text, start, stop):
            opening = match.end()
            if match.start() < end:
                continue  # part of the content of another box
            if opening in closing:
                inner, end = (opening + 1, closing[opening]), closing[opening] + 1
            elif word := _WORD.match(text, opening, stop):
                inner, end = word.span(), word.end()
        if inner is None:
            return found
        found = text[inner[0] : inner[1]]
        if _BOX.match(found.strip()) is None:
            return found
        start, stop = inner


def _closing_braces(text: str) -> dict[int, int]:
    """From each opening brace that is closed to its closing one; \\{ and \\} are no braces."""
    closing, opened = {}, []
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if match[0] == "{":
            opened.append(match.start())
        elif match[0] == "}" and opened:
            closing[opened.pop()] = match.start()
    return closing


_RULES = [
    (re.compile(pattern), plain)
    for pattern, plain in [
        (r"\\[!,;: ]|~|(?<!\\)\$", ""),
        (r"\{,\}", ","),
        (r"\\(?:left|right)(?![A-Za-z])\.?", ""),
        (r"\\[dt]frac(?![A-Za-z])", r"\\frac"),
        # A unit after a number.
        (r"(?<=[0-9}])\s*\\(?:text|mbox|mathrm)\s*\{\s[^{}]*\}(?:\^\{?[0-9]\}?)?\s*$", ""),
        (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}", r"\1"),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degree(?![A-Za-z])|°", ""),
        (r"\\?%", ""),
        (r"\\\$", ""),
        (r"\\frac\s*([0-9])\s*([0-9])(?![0-9])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*([0-9])\s*\{", r"\\frac{\1}{"),
        (r"\\sqrt\s*([0-9])", r"\\sqrt{\1}"),
        (r"\s+", ""),
        (r"^[A-Za-z]{1,2}=(?=.)", ""),
        (r"\.$", ""),
    ]
]


def plain_latex(text: str) -> str:
    """An answer without what changes nothing in it: spaces, sizes, units, degrees, x = in front."""
    for pattern, plain in _RULES:
        text = pattern.sub(plain, text)
    return plain_number(text)
