"""Tokens after a prompt to text, one at a time, as transformers decodes the whole.

The text of a continuation is decode(prompt + tokens) without decode(prompt): some decoders drop the
first space of what they are given, which is no first space after a prompt.
"""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple, SupportsIndex

import numpy as np

from nrt_jax.data.tokenizer import Tokenizer

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
BYTE_NAME = re.compile(r"<0x[0-9A-F]{2}>")
"""A byte in the vocabularies of sentencepiece."""
LONGEST_RUN = 64
"""Byte tokens that are held back until a run of them ends. A script that the vocabulary lacks makes
longer runs; their complete characters are settled, though a later invalid byte could undo them."""
CLEANED = 19
"""Last characters that a later token can change where transformers cleans spaces: the sum over its
ten replacements of the length of what is replaced, less 1."""
CLEANED_CONTEXT = 256
"""Characters of context that are decoded again there."""


class Settled(NamedTuple):
    """Text that no later token changes."""

    text: str
    starts: tuple[int, ...]
    """Where each of its tokens begins in it; a token that goes on with a character begins there."""


class Detokenizer:
    """Decodes the tokens after a prompt, and holds text back while a later token may change it.

        prompt [▁Zur]   tokens  [▁Zür] [<0xC3>] [<0xBC>] [▁b]
                        text    " Zür" ""       ""       "ü b"

    Held back are incomplete characters, runs of sentencepiece's byte tokens (one invalid byte makes
    every byte of a run invalid), and the last characters where transformers cleans spaces.
    `hidden` tokens have no text. With `mends`, the text begins with the character that the prompt
    does not complete; otherwise only if the tokens complete it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] | np.ndarray = (),
        *,
        hidden: frozenset[int] = frozenset(),
        mends: bool = False,
    ):
        self._tokenizer, self._hidden = tokenizer, hidden
        self._cleans = _cleans_spaces(tokenizer)
        decoder = tokenizer.backend.decoder
        self._has_byte_runs = decoder is not None and b"ByteFallback" in decoder.__getstate__()
        self._context = self._end_of([int(token) for token in prompt])
        self._before = self._decode(self._context)
        if mends:
            self._before = self._before.rstrip(REPLACEMENT)
        self._held: list[int] = []
        """Tokens whose text is held back."""
        self._ends: list[str] = []
        """The text from the first of them up to and with each, as it was when the token came."""

    def settle(self, token: SupportsIndex) -> Settled:
        """The text that this token settles."""
        token = int(token)
        self._held.append(token)
        text = self._unread()
        self._ends.append(text)
        settled = self._settled_length(token, text)
        for count in range(len(self._ends), 0, -1):
            end = self._ends[count - 1]
            certain = len(end) <= settled and text.startswith(end)
            if end and certain and not end.endswith(REPLACEMENT):
                return self._release(count)
        return Settled("", ())

    def settle_rest(self) -> Settled:
        """The text that is still held back after the last token."""
        return self._release(len(self._held)) if self._held else Settled("", ())

    def feed(self, token: SupportsIndex) -> str:
        """The text that this token settles."""
        return self.settle(token).text

    def flush(self) -> str:
        """The text that is still held back after the last token."""
        return self.settle_rest().text

    def _decode(self, ids: list[int]) -> str:
        if not self._cleans:
            return self._tokenizer.decode(ids)
        text = self._tokenizer.fast.decode(ids)
        assert isinstance(text, str), "one sequence of ids"
        return text

    def _visible(self, tokens: Iterable[int]) -> list[int]:
        return [token for token in tokens if token not in self._hidden]

    def _unread(self) -> str:
        text = self._decode(self._context + self._visible(self._held))
        return text[_common_length(self._before, text) :]

    def _settled_length(self, token: int, text: str) -> int:
        """How many characters of the held text no later token changes."""
        in_run = self._is_byte(token) and len(self._held) < LONGEST_RUN
        if in_run or token in self._hidden:
            return 0
        return len(text.rstrip(REPLACEMENT)) - CLEANED * self._cleans

    def _release(self, count: int) -> Settled:
        text = self._ends[count - 1]
        starts = [0]
        for before in self._ends[: count - 1]:
            starts.append(len(before) if text.startswith(before) else starts[-1])
        released, self._held = self._held[:count], self._held[count:]
        self._ends = [end[len(text) :] for end in self._ends[count:]]
        if self._cleans:
            self._context = self._last(self._context + self._visible(released))
        else:
            self._context = self._visible(released)
        self._before = self._decode(self._context)
        return Settled(text, tuple(starts))

    def _is_byte(self, token: int) -> bool:
        if not self._has_byte_runs:
            return False
        return BYTE_NAME.fullmatch(self._tokenizer.backend.id_to_token(token) or "") is not None

    def _end_of(self, prompt: list[int]) -> list[int]:
        """The last tokens of a prompt, as many as the text after them depends on.

        They begin with a token that is visible text in whole characters, so that nothing in front
        of it matters.
        """
        if self._cleans:
            return self._last(prompt)
        for first in range(len(prompt) - 1, -1, -1):
            text = self._tokenizer.decode(prompt[first : first + 1])
            if text.strip() and REPLACEMENT not in text and not self._is_byte(prompt[first]):
                return prompt[first:]
        return prompt

    def _last(self, tokens: list[int]) -> list[int]:
        """The last tokens that have CLEANED_CONTEXT characters."""
        count = CLEANED_CONTEXT
        while count < len(tokens) and len(self._decode(tokens[-count:])) < CLEANED_CONTEXT:
            count *= 2
        return tokens[-count:]


def decode_after(
    tokenizer: Tokenizer, prompt: Sequence[int] | np.ndarray, tokens: Sequence[int] | np.ndarray
) -> str:
    """The text of tokens after a prompt."""
    detokenizer = Detokenizer(tokenizer, prompt)
    return "".join(detokenizer.feed(token) for token in tokens) + detokenizer.flush()


def _common_length(first: str, second: str) -> int:
    """How many characters two texts begin with in common."""
    if second.startswith(first):
        return len(first)
    pairs = enumerate(zip(first, second, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(first), len(second)))


def _cleans_spaces(tokenizer: Tokenizer) -> bool:
    """Whether transformers removes spaces before punctuation when it decodes."""
    fast = tokenizer.fast
    forced = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    is_bpe = type(tokenizer.backend.model).__name__ == "BPE"
    return fast.clean_up_tokenization_spaces and (not is_bpe or getattr(fast, forced, False))
