"""Split a rendered prompt into the template's control tokens and the texts between them.

A special token's name in the content of a turn stays text: a noncharacter is put into it before the
template is rendered, so that the names left in the result are the template's.

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
# White_Space of Unicode, which tokens with lstrip or rstrip take in; Python's isspace is another.
WHITESPACE = "\t\n\x0b\x0c\r \x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(
    map(chr, range(0x2000, 0x200B))
)


class Text(NamedTuple):
    """A piece of a prompt without control tokens."""

    text: str
    starts: bool
    """Whether the sequence starts with it, but for a token that is put in front of any text."""


class ControlSplit:
    """Marks contents and splits rendered prompts, for the special tokens of one tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        added = tokenizer.backend.get_added_tokens_decoder().items()
        self._tokens = {token.content: (i, token) for i, token in added if token.special}
        names = sorted(self._tokens, key=len, reverse=True)  # at one place the longest matches
        self._names = re.compile("|".join(map(re.escape, names)))
        patterns = {name: re.escape(name) for name in names}
        self._matched = re.compile(
            "|".join(
                rf"(?<!\w){pattern}(?!\w)" if self._tokens[name][1].single_word else pattern
                for name, pattern in patterns.items()
            )
        )
        self._longest = len(names[0])
        cuts = [(name[:i], name[i:]) for name in names for i in range(1, len(name))]
        self._heads = {head for head, _ in cuts}
        self._tails = {tail for _, tail in cuts}

    def mark(self, text: str) -> str:
        """`text` with marks, so that no special token's name is in it or arises at its ends.

        Raises BadRow for a text that has the mark, and for a name that is too short to break.
        """
        if MARK in text:
            raise BadRow(
                "has a noncharacter", f"{shorten(text)} has U+FDD0, which is no text; remove it"
            )
        while match := self._names.search(text):
            if len(match[0]) == 1:
                raise BadRow(
                    "spells a control token", f"{shorten(text)} spells {match[0]}; reword the text"
                )
            text = self._names.sub(lambda found: found[0][0] + MARK + found[0][1:], text)
        return self._mark_ends(text)

    def split(self, rendered: str) -> tuple[int | Text, ...]:
        """The ids of the template's control tokens and the texts between them, unmarked."""
        pieces: list[int | Text] = []
        position, strip_left = 0, False

        def add_text(end: int, strip_right: bool) -> None:
            text = rendered[position:end]
            text = text.lstrip(WHITESPACE) if strip_left else text
            text = text.rstrip(WHITESPACE) if strip_right else text
            if text:
                pieces.append(Text(unmark(text), starts=position == 0))

        for match in self._matched.finditer(rendered):
            token_id, token = self._tokens[match[0]]
            add_text(match.start(), token.lstrip)
            pieces.append(token_id)
            position, strip_left = match.end(), token.rstrip
        add_text(len(rendered), strip_right=False)
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
    """A marked or rendered text without its marks."""
    return text.replace(MARK, "")
