"""Control tokens in a rendered prompt: the template's are ids, a row's are characters.

Before rendering, every special token's name in a row's text is broken by a noncharacter; what a
split then finds was written by the template:

    content   a <s> b                       the mark shown as ·
    marked    a <·s> b
    rendered  <s>[INST] a <·s> b[/INST]
    split     <s>, [INST], " a <s> b", [/INST]
"""

import re
from typing import NamedTuple

from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.tokenizer import Tokenizer

MARK = "\ufdd0"
# White_Space of Unicode: what tokens that strip take in, which is not Python's idea of a space.
WHITESPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class Text(NamedTuple):
    """A piece of a prompt without control tokens."""

    text: str
    starts: bool
    """Whether the sequence starts with it, but for a token that is put in front of any text."""


class ControlSplit:
    """Knows the special tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokens = {token.content: (i, token) for i, token in tokenizer.control_tokens.items()}
        names = sorted(self._tokens, key=len, reverse=True)  # the longest of a place wins
        self._names = re.compile("|".join(map(re.escape, names)))
        self._matched = re.compile(
            "|".join(
                rf"(?<!\w){re.escape(name)}(?!\w)"
                if self._tokens[name][1].single_word
                else re.escape(name)
                for name in names
            )
        )
        self._longest = len(names[0])
        cuts = [(name[:i], name[i:]) for name in names for i in range(1, len(name))]
        self._heads = {head for head, _ in cuts}
        self._tails = {tail for _, tail in cuts}

    def mark(self, text: str) -> str:
        """`text` such that no special token's name is in it, or comes of what is put around it.

        Raises BadRow for a text that has the mark, and for a name that is too short to break.
        """
        if MARK in text:
            raise BadRow(
                "has a noncharacter", f"{shorten(text)} has U+FDD0, which is no text; remove it"
            )
        while match := self._names.search(text):
            if len(match[0]) == 1:
                raise BadRow(
                    "spells a control token",
                    f"{shorten(text)} spells {match[0]}; reword the text",
                )
            text = self._names.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return self._mark_ends(text)

    def split(self, rendered: str) -> tuple[int | Text, ...]:
        """The ids of the template's control tokens and the texts between them, unmarked."""
        pieces: list[int | Text] = []
        position, strip_left = 0, False
        for match in self._matched.finditer(rendered):
            token_id, token = self._tokens[match[0]]
            text = rendered[position : match.start()]
            text = text.lstrip(WHITESPACE) if strip_left else text
            text = text.rstrip(WHITESPACE) if token.lstrip else text
            if text:
                pieces.append(Text(unmark(text), starts=position == 0))
            pieces.append(token_id)
            position, strip_left = match.end(), token.rstrip
        text = rendered[position:]
        text = text.lstrip(WHITESPACE) if strip_left else text
        if text:
            pieces.append(Text(unmark(text), starts=position == 0))
        return tuple(pieces)

    def _mark_ends(self, text: str) -> str:
        """Break a name that the template's text would complete, outside the spaces it may trim."""
        core = text.strip()
        if not core:
            return text
        left, _, right = text.partition(core)
        lengths = range(1, min(len(core), self._longest) + 1)
        within = len(core) < self._longest and any(core in name for name in self._tokens)
        if within or any(core[:n] in self._tails for n in lengths):
            left += MARK
        if within or any(core[-n:] in self._heads for n in lengths):
            right = MARK + right
        return left + core + right


def unmark(text: str) -> str:
    """A marked or rendered text as it was meant."""
    return text.replace(MARK, "")
