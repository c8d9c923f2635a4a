"""Tokens to text, piece by piece: whole characters only, and nothing after a stop text."""

import re
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.requests import Event

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class TokenScore(NamedTuple):
    """One token with its logprob, as the `logprobs` of an answer list it."""

    token: int
    logprob: float | None
    """In nats; None for the first token of a prompt, which nothing precedes."""
    top: tuple[tuple[int, float], ...]
    """The most probable tokens of the place, with their logprobs."""
    offset: int
    """Where its text begins, in characters."""


class Piece(NamedTuple):
    """What one sequence has got since the piece before."""

    text: str
    scores: tuple[TokenScore, ...]
    """Of all tokens drawn, the one that ended the sequence included."""
    tokens: np.ndarray
    """int32, without the token that ended the sequence."""
    sampled: int
    """How many tokens were drawn, the one that ended the sequence included."""
    finish: Literal["stop", "length"] | None


class Detokenizer:
    """Decodes tokens one at a time.

    Text is held back while it ends inside a character. It is found by decoding the last tokens
    with and without the new one, so that a tokenizer whose tokens change with their neighbours,
    or that trims the first space of a text, gives the text of the whole:

        ids    [▁Zür] [<0xC3>] [<0xBC>] [▁b]
        text   "Zür"   ""       "ü"      " b"
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """The tokens of the last text, then those that have given none yet."""
        self._read = 0
        """How many of them have given their text."""

    def feed(self, token: int) -> str:
        """The text that this token completes."""
        self._ids.append(token)
        text = self._unread()
        if not text or text.endswith(REPLACEMENT):
            return ""
        del self._ids[: self._read]
        self._read = len(self._ids)
        return text

    def flush(self) -> str:
        """What is held back when no token follows: a character that was never completed."""
        text = self._unread()
        self._read = len(self._ids)
        return text

    def _unread(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._read])
        return self._tokenizer.decode(self._ids)[len(before) :]


class TextWriter:
    """Turns the events of one sequence into pieces, and cuts its text before a stop text.

    Fed token by token, so that the pieces do not depend on how tokens arrive together.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), offset: int = 0):
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = stops
        self._held = ""
        """Decoded, but perhaps the beginning of a stop text."""
        self._released = offset
        self._scores: list[TokenScore] = []
        """Of tokens whose text is held back."""

    def write(self, event: Event) -> Piece:
        """The text that an event makes certain; its finish is "stop" at a stop text."""
        ended = event.finished == "stop"
        tokens = event.tokens[:-1] if ended else event.tokens
        for i, token in enumerate(tokens.tolist()):
            self._score(event, i)
            self._held += self._detokenizer.feed(token)
            cut = self._stop_at()
            if cut is not None:
                return self._end(cut, tokens[: i + 1], i + 1, "stop")
        if event.finished is not None:
            self._held += self._detokenizer.flush()
            if ended:
                self._score(event, len(tokens))
            cut = self._stop_at()
            finish = event.finished if cut is None else "stop"
            cut = len(self._held) if cut is None else cut
            return self._end(cut, tokens, len(event.tokens), finish)
        certain = len(self._held) - self._may_begin_a_stop()
        return self._release(certain, tokens, len(event.tokens))

    def _score(self, event: Event, i: int) -> None:
        top = tuple(_finite(event.top_ids[i].tolist(), event.top_logprobs[i].tolist()))
        token, logprob = int(event.tokens[i]), float(event.logprobs[i])
        offset = self._released + len(self._held)
        self._scores.append(TokenScore(token, logprob, top, offset))

    def _end(
        self, cut: int, tokens: np.ndarray, sampled: int, finish: Literal["stop", "length"]
    ) -> Piece:
        whole = cut == len(self._held)
        end = self._released + cut
        scores = [score for score in self._scores if whole or score.offset < end]
        return Piece(self._held[:cut], tuple(scores), tokens, sampled, finish)

    def _release(self, certain: int, tokens: np.ndarray, sampled: int) -> Piece:
        text, self._held = self._held[:certain], self._held[certain:]
        self._released += certain
        begun = sum(score.offset < self._released for score in self._scores)
        scores, self._scores = self._scores[:begun], self._scores[begun:]
        return Piece(text, tuple(scores), tokens, sampled, None)

    def _stop_at(self) -> int | None:
        """Where the first stop text in what is held begins."""
        found = [self._held.find(stop) for stop in self._stops]
        return min((at for at in found if at >= 0), default=None)

    def _may_begin_a_stop(self) -> int:
        """Length of the longest end of the held text that a stop text begins with."""
        longest = max(map(len, self._stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._stops):
                return length
        return 0


def prompt_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> tuple[str, list[int]]:
    """A prompt's text, and where each of its tokens begins in it.

    A beginning-of-sequence token in front has no text; other special tokens show as their names.
    """
    detokenizer, text, offsets = Detokenizer(tokenizer), "", []
    for i, token in enumerate(ids):
        offsets.append(len(text))
        if i or token != tokenizer.bos_id:
            text += detokenizer.feed(token)
    return text + detokenizer.flush(), offsets


class TokenTexts:
    """Single tokens, as they stand inside a text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        ordinary = set(range(tokenizer.vocab_size)) - tokenizer.special_ids
        # After another token: some tokenizers trim the first space of a text.
        visible = (t for t in sorted(ordinary) if tokenizer.decode([t]).strip(" " + REPLACEMENT))
        self._anchor = next(visible)
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __getitem__(self, token: int) -> str:
        """The token's text; special tokens by name, parts of a character as `bytes:\\xe2`."""
        return self._find(token)[0]

    def in_bytes(self, token: int) -> list[int] | None:
        """The bytes of the token's text; None for a part of a character that is not known."""
        return self._find(token)[1]

    def _find(self, token: int) -> tuple[str, list[int] | None]:
        if token not in self._known:
            text = self._text(token)
            if REPLACEMENT not in text:
                self._known[token] = text, list(text.encode("utf-8"))
            else:
                self._known[token] = self._part(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        if token in self._tokenizer.special_ids:
            return self._tokenizer.token(token)
        if token >= self._tokenizer.vocab_size:
            return ""  # a row of the embedding that pads it to a round number
        before = self._tokenizer.decode([self._anchor])
        return self._tokenizer.decode([self._anchor, token])[len(before) :]

    def _part(self, token: int) -> tuple[str, list[int] | None]:
        name = self._tokenizer.token(token)
        raw = bytes_of(name)
        if raw is None:
            return name, None
        try:
            return raw.decode("utf-8"), list(raw)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw), list(raw)


def bytes_of(name: str) -> bytes | None:
    """The bytes that an entry of a vocabulary stands for; None when its name does not say.

    `<0xE2>` is a byte of a sentencepiece vocabulary. A byte-level one has a character for every
    byte: the byte's own where that can be seen, and otherwise the next one from U+0100 on.
    """
    if re.fullmatch(r"<0x[0-9A-F]{2}>", name):
        return bytes([int(name[3:5], 16)])
    if any(character not in _BYTES for character in name):
        return None
    return bytes(_BYTES[character] for character in name)


def _byte_characters() -> dict[str, int]:
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(0x100 + n): b for n, b in enumerate(unseen)}


_BYTES = _byte_characters()


def _finite(ids: Iterable[int], logprobs: Iterable[float]) -> Iterable[tuple[int, float]]:
    """Without what cannot be drawn."""
    return ((i, value) for i, value in zip(ids, logprobs, strict=True) if value > -np.inf)
