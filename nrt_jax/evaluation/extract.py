"""What a text answers, and whether that is what a reference answers: `evaluation.extract`.

Two texts answer alike when what is found in both, written in one way, is equal. All functions are
pure. Numbers are compared by value: 1,234 is 1234, $5.00 is 5, 50% is 50 and 1/2 is 0.5.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

from nrt_jax.config.evaluation import AFTER
from nrt_jax.evaluation.boxed import boxed, plain_latex
from nrt_jax.evaluation.numbers import find_last_number, number_value, plain_number

LETTERS = "A-J"
MARKUP = r"[\s*_$`\"']*(?:\\(?:boxed|text|textbf|mathbf|mathrm)\s*\{\s*)*"
"""What may stand between "the answer is" and an answer: spaces, emphasis, quotes, LaTeX."""


class Extract(NamedTuple):
    """How to find the answer in a text, and how to write it so that equal answers are equal."""

    name: str
    find: Callable[[str], str | None]
    """The answer as the text has it; None for a text without one."""
    plain: Callable[[str], str]
    """The answer in the form that is compared."""

    def of_answer(self, text: str) -> str | None:
        """What a model's text answers; None for a text without an answer."""
        found = self.find(text)
        return (self.plain(found) or None) if found else None

    def of_reference(self, text: str) -> str:
        """What a reference answers: all of it where it is the bare answer."""
        return self.plain(self.find(text) or text)

    def is_right(self, text: str, references: Sequence[str]) -> bool:
        """Whether a text answers as any of the references does."""
        found = self.of_answer(text)
        return found is not None and found in map(self.of_reference, references)


def make_extract(name: str) -> Extract:
    """The functions of a value of `evaluation.extract`, which the config has checked."""
    if name.startswith(AFTER):
        marker = name.removeprefix(AFTER).strip()
        return Extract(name, partial(after, marker=marker), plain_line)
    find, plain = {
        "whole": (str.strip, str.strip),
        "last_number": (find_last_number, lambda text: number_value(text) or ""),
        "boxed": (boxed, plain_latex),
        "choice": (choice, lambda text: choice(text) or ""),
        "any_of": (str.strip, plain_words),
    }[name]
    return Extract(name, find, plain)


def after(text: str, marker: str) -> str | None:
    """The first line with something in it after the last `marker`."""
    _, found, rest = text.rpartition(marker)
    return next(filter(str.strip, rest.splitlines()), None) if found else None


def plain_line(text: str) -> str:
    """A line without what stands around an answer; a number in one form."""
    return plain_number(text.strip().strip("*`$:").strip().removesuffix(".").strip())


def plain_words(text: str) -> str:
    """A text without case, punctuation, articles and runs of spaces, as SQuAD compares answers."""
    number = number_value(text)
    if number is not None:
        return number
    folded = unicodedata.normalize("NFKC", text).casefold()
    letters = ("" if unicodedata.category(c).startswith("P") else c for c in folded)
    words = "".join(letters).split()
    kept = [word for word in words if word not in ("a", "an", "the")]
    return " ".join(kept or words or folded.split())


# --- choices -------------------------------------------------------------------------------------

_COMMAND = re.compile(r"\\[A-Za-z]+\s*\{([^{}]*)\}")
_ALONE = re.compile(rf"[\W_]*([{LETTERS}])[\W_]*", re.IGNORECASE)
_AT_START = re.compile(rf"[\W_]*([{LETTERS}])\s*(?:[):\]]|\.(?![A-Za-z]))", re.IGNORECASE)
_CLOSED = r"(?=\s*(?:[).,;:\]}*\"'$]|$))"
# A lower-case letter may be an article or part of a sentence, unless something closes it.
_SAID = re.compile(
    r"\b(?:[Aa]nswer|ANSWER|[Cc]hoice|[Oo]ption)\b(?:\s(?:is|was|would be|should be))?\s?"
    rf"[:=–-]?\s?(?:(?:[Oo]ption|[Cc]hoice)\s)?[(\[{{*\"'$\s]*(?:([{LETTERS}])(?![\w'’])|"
    rf"([{LETTERS.lower()}]){_CLOSED})"
)
_BRACKETED = re.compile(rf"\(([{LETTERS}])\)", re.IGNORECASE)
# "A" and "I" are words too, except at the end.
_STANDING = re.compile(r"(?<![\w'’])(?:([B-HJ])(?![\w'’])|([AI])(?=[\W_]*$))")


def choice(text: str) -> str | None:
    """The letter of the choice that a text names, A to J.

    In this order: the letter alone, in a box too; after "answer", "choice" or "option"; alone in
    the last line; at the start, as in "B) 42"; in brackets; standing between words. Of several in
    one of these places the last counts.
    """
    lines = unicodedata.normalize("NFKC", text).split("\n")
    text = " ".join(" ".join(lines).split())
    text = _COMMAND.sub(r"\1", boxed(text) or text)
    if match := _ALONE.fullmatch(text):
        return match[1].upper()
    if said := list(_SAID.finditer(text)):
        return (said[-1][1] or said[-1][2]).upper()
    if match := _ALONE.fullmatch(next(filter(str.strip, reversed(lines)), "")):
        return match[1].upper()
    if match := _AT_START.match(text):
        return match[1].upper()
    for pattern in (_BRACKETED, _STANDING):
        if found := list(pattern.finditer(text)):
            return next(filter(None, found[-1].groups())).upper()
    return None
