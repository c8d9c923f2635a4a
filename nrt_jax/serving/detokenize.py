"""Tokens to text, piece by piece: whole characters only, and nothing after a stop text."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.requests import Event
from nrt_jax.serving.logprobs import REPLACEMENT, TokenLogprob


class Piece(NamedTuple):
    """The part of a sequence's text that became certain since the piece before."""

    text: str
    logprobs: tuple[TokenLogprob, ...]
    """Of all sampled tokens, including the one that ended the sequence."""
    tokens: np.ndarray
    """int32, without the token that ended the sequence."""
    sampled: int
    """Number of sampled tokens, including the one that ended the sequence."""
    finish: Literal["stop", "length"] | None


def join(pieces: Sequence[Piece]) -> Piece:
    """All pieces of a sequence as one."""
    return Piece(
        text="".join(piece.text for piece in pieces),
        logprobs=tuple(each for piece in pieces for each in piece.logprobs),
        tokens=np.concatenate([piece.tokens for piece in pieces] or [np.zeros(0, np.int32)]),
        sampled=sum(piece.sampled for piece in pieces),
        finish=pieces[-1].finish if pieces else None,
    )


class Detokenizer:
    """Decodes tokens one at a time, and holds text back while it ends inside a character.

    The text of a token is the difference between the last tokens decoded with it and without it.
    So the texts join to the text of the whole also for a tokenizer whose tokens change with their
    neighbours, or that trims the first space of a text:

        ids    [▁Zür] [<0xC3>] [<0xBC>] [▁b]
        text   "Zür"   ""       "ü"      " b"
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._ids: list[int] = []
        """The tokens of the last text, then those whose text is held back."""
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
        """The text that is still held back after the last token: an incomplete character."""
        text = self._unread()
        self._read = len(self._ids)
        return text

    def _unread(self) -> str:
        before = self._tokenizer.decode(self._ids[: self._read])
        return self._tokenizer.decode(self._ids)[len(before) :]


class TextWriter:
    """Turns the events of one sequence into pieces, and cuts its text before a stop text.

    It takes tokens one by one, so the pieces do not depend on how events group them.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = (), offset: int = 0):
        self._detokenizer = Detokenizer(tokenizer)
        self._stops = stops
        self._held = ""
        """Decoded text that may be the beginning of a stop text."""
        self._released = offset
        self._logprobs: list[TokenLogprob] = []
        """Of tokens whose text is held back."""

    def write(self, event: Event) -> Piece:
        """The text that an event makes certain; finish is "stop" at a stop text."""
        ended = event.finished == "stop"
        tokens = event.tokens[:-1] if ended else event.tokens
        for i, token in enumerate(tokens.tolist()):
            self._add_logprob(event, i)
            self._held += self._detokenizer.feed(token)
            cut = self._stop_at()
            if cut is not None:
                return self._end(cut, tokens[: i + 1], i + 1, "stop")
        if event.finished is not None:
            self._held += self._detokenizer.flush()
            if ended:
                self._add_logprob(event, len(tokens))
            cut = self._stop_at()
            finish = event.finished if cut is None else "stop"
            cut = len(self._held) if cut is None else cut
            return self._end(cut, tokens, len(event.tokens), finish)
        certain = len(self._held) - self._longest_stop_prefix()
        return self._release(certain, tokens, len(event.tokens))

    def _add_logprob(self, event: Event, i: int) -> None:
        alternatives = zip(event.top_ids[i].tolist(), event.top_logprobs[i].tolist(), strict=True)
        # Without tokens that could not have been drawn.
        top = tuple((other, value) for other, value in alternatives if value > -np.inf)
        token, logprob = int(event.tokens[i]), float(event.logprobs[i])
        offset = self._released + len(self._held)
        self._logprobs.append(TokenLogprob(token, logprob, top, offset))

    def _end(
        self, cut: int, tokens: np.ndarray, sampled: int, finish: Literal["stop", "length"]
    ) -> Piece:
        whole = cut == len(self._held)
        end = self._released + cut
        logprobs = tuple(each for each in self._logprobs if whole or each.offset < end)
        return Piece(self._held[:cut], logprobs, tokens, sampled, finish)

    def _release(self, certain: int, tokens: np.ndarray, sampled: int) -> Piece:
        text, self._held = self._held[:certain], self._held[certain:]
        self._released += certain
        begun = sum(each.offset < self._released for each in self._logprobs)
        logprobs, self._logprobs = self._logprobs[:begun], self._logprobs[begun:]
        return Piece(text, tuple(logprobs), tokens, sampled, None)

    def _stop_at(self) -> int | None:
        """Where the first stop text in the held text begins."""
        found = [self._held.find(stop) for stop in self._stops]
        return min((at for at in found if at >= 0), default=None)

    def _longest_stop_prefix(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
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
