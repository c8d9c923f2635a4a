"""Events of a sequence to pieces of text with their logprobs, and nothing after a stop text."""

from collections import deque
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from nrt_jax.data.detokenizer import Detokenizer, Settled
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.requests import Event
from nrt_jax.serving.logprobs import TokenLogprob


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


class Shown(NamedTuple):
    """What of a sequence its text shows, and where the text ends."""

    stops: tuple[str, ...] = ()
    """Texts that end it; it is cut before the first of them."""
    keeps_stop: bool = False
    """Cut after the stop text instead, and show the token that ended the sequence."""
    skips_special: bool = True
    """Special tokens have no text; otherwise they show as their names."""
    min_tokens: int = 0
    """Stop texts are looked for in the text after this many tokens."""


class TextWriter:
    """Turns the events of one sequence into pieces, and cuts its text at a stop text.

    It takes tokens one by one, so the pieces do not depend on how events group them. `prompt` is
    what the sequence continues; `offset` is where its text begins, after an echo of the prompt. An
    echo of token ids leaves the character that they do not complete to the text (`mends`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        shown: Shown = Shown(),  # noqa: B008 (it cannot change)
        offset: int = 0,
        *,
        prompt: Sequence[int] | np.ndarray = (),
        mends: bool = False,
    ):
        hidden = tokenizer.special_ids if shown.skips_special else frozenset()
        self._detokenizer = Detokenizer(tokenizer, prompt, hidden=hidden, mends=mends)
        self._shown = shown
        self._held = ""
        """Settled text that may be the beginning of a stop text."""
        self._released = offset
        self._searched_from = 0
        """Where in the held text a stop text may begin."""
        self._count = 0
        """Tokens written."""
        self._unsettled: deque[TokenLogprob] = deque()
        """Of tokens whose text the detokenizer holds back; their offsets are not known yet."""
        self._logprobs: list[TokenLogprob] = []
        """Of tokens whose text is held back here."""

    def write(self, event: Event) -> Piece:
        """The text that an event makes certain; finish is "stop" at a stop text."""
        ended = event.finished == "stop"
        tokens = event.tokens[:-1] if ended else event.tokens
        for i, token in enumerate(tokens.tolist()):
            self._unsettled.append(_logprob(event, i))
            self._hold(self._detokenizer.settle(token))
            self._count += 1
            cut = self._cut()
            if cut is not None:
                return self._end(cut, tokens[: i + 1], i + 1, "stop")
        if event.finished is not None:
            return self._finish(event, tokens, event.finished)
        certain = len(self._held) - self._longest_stop_prefix()
        return self._release(certain, tokens, len(event.tokens))

    def _finish(
        self, event: Event, tokens: np.ndarray, finished: Literal["stop", "length"]
    ) -> Piece:
        self._hold(self._detokenizer.settle_rest())
        cut = self._cut()
        if cut is None and finished == "stop":
            self._unsettled.append(_logprob(event, len(tokens)))
            if self._shown.keeps_stop:
                self._hold(self._detokenizer.settle(int(event.tokens[-1])))
                self._hold(self._detokenizer.settle_rest())
        finish = finished if cut is None else "stop"
        cut = len(self._held) if cut is None else cut
        return self._end(cut, tokens, len(event.tokens), finish)

    def _hold(self, settled: Settled) -> None:
        begin = self._released + len(self._held)
        for start in settled.starts:
            logprob = self._unsettled.popleft()
            self._logprobs.append(logprob._replace(offset=begin + start))
        self._held += settled.text

    def _end(
        self, cut: int, tokens: np.ndarray, sampled: int, finish: Literal["stop", "length"]
    ) -> Piece:
        begin, end = self._released, self._released + len(self._held)
        # The token that ended the sequence, where it has no text.
        rest = [logprob._replace(offset=end) for logprob in self._unsettled]
        whole, end = cut == len(self._held), begin + cut
        logprobs = [each for each in [*self._logprobs, *rest] if whole or each.offset < end]
        return Piece(self._held[:cut], tuple(logprobs), tokens, sampled, finish)

    def _release(self, certain: int, tokens: np.ndarray, sampled: int) -> Piece:
        text, self._held = self._held[:certain], self._held[certain:]
        self._released += certain
        self._searched_from = max(0, self._searched_from - certain)
        begun = sum(each.offset < self._released for each in self._logprobs)
        logprobs, self._logprobs = self._logprobs[:begun], self._logprobs[begun:]
        return Piece(text, tuple(logprobs), tokens, sampled, None)

    def _cut(self) -> int | None:
        """Where the held text ends because of a stop text, if it has one."""
        if self._count <= self._shown.min_tokens:
            self._searched_from = len(self._held)
        found = [
            (at, at + len(stop))
            for stop in self._shown.stops
            if (at := self._held.find(stop, self._searched_from)) >= 0
        ]
        return min(found)[self._shown.keeps_stop] if found else None

    def _longest_stop_prefix(self) -> int:
        """Length of the longest end of the held text with which a stop text begins."""
        longest = max(map(len, self._shown.stops), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            end = self._held[-length:]
            if any(stop.startswith(end) for stop in self._shown.stops):
                return length
        return 0


def _logprob(event: Event, i: int) -> TokenLogprob:
    """Of the event's i-th token, whose offset is not known yet."""
    alternatives = zip(event.top_ids[i].tolist(), event.top_logprobs[i].tolist(), strict=True)
    # Without tokens that could not have been drawn.
    top = tuple((other, value) for other, value in alternatives if value > -np.inf)
    return TokenLogprob(int(event.tokens[i]), float(event.logprobs[i]), top, offset=0)


def prompt_offsets(
    tokenizer: Tokenizer, ids: Sequence[int], text: str | None = None
) -> tuple[str, list[int]]:
    """A prompt's text, and where each of its tokens begins in it.

    A beginning-of-sequence token in front has no text; other special tokens show as their names.
    The prompt's own `text` is kept where ids do not decode to it, as after a normaliser.
    """
    begins = int(len(ids) > 0 and ids[0] == tokenizer.bos_id)
    detokenizer, decoded, offsets = Detokenizer(tokenizer), "", [0] * begins
    for token in ids[begins:]:
        settled = detokenizer.settle(token)
        offsets += [len(decoded) + start for start in settled.starts]
        decoded += settled.text
    settled = detokenizer.settle_rest()
    offsets += [len(decoded) + start for start in settled.starts]
    decoded += settled.text
    if text is None or text == decoded:
        return decoded, offsets
    spans = tokenizer.backend.encode(text, add_special_tokens=False).offsets
    return text, [0] * begins + [begin for begin, _ in spans]
