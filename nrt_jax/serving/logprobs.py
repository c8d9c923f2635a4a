"""Logprobs as the two kinds of completion list them, and the texts of single tokens."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from nrt_jax.data.detokenizer import BYTE_NAME, REPLACEMENT
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.serving.generation import PromptLogprobs


class TokenLogprob(NamedTuple):
    """One token of a text with its logprob."""

    token: int
    logprob: float | None
    """In nats; None for the first token of a prompt, which has no context."""
    top: tuple[tuple[int, float], ...]
    """The most probable tokens at this position, with their logprobs."""
    offset: int
    """Where the token's text begins, in characters."""
    begins: bool = False
    """Whether it is the first of a text, where some tokenizers trim its space."""


class TokenTexts:
    """The text of single tokens, as it is inside a longer text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        ordinary = set(range(tokenizer.vocab_size)) - tokenizer.special_ids
        # Decode a token after another one: some tokenizers trim the first space of a text.
        visible = (t for t in sorted(ordinary) if tokenizer.decode([t]).strip(" " + REPLACEMENT))
        self._anchor = next(visible)
        self._known: dict[int, tuple[str, list[int] | None]] = {}

    def __getitem__(self, token: int) -> str:
        """The token's text; special tokens by name, parts of a character as `bytes:\\xe2`."""
        return self._find(token)[0]

    def first(self, token: int) -> str:
        """The token's text where it is the first of a text."""
        text = self[token]
        if token in self._tokenizer.special_ids or token >= self._tokenizer.vocab_size:
            return text
        alone = self._tokenizer.decode([token])
        return text if REPLACEMENT in alone else alone

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
            return ""  # a padding row of the embedding
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
    """The bytes that a vocabulary entry stands for; None when its name does not say.

    `<0xE2>` is a byte of a sentencepiece vocabulary. A byte-level vocabulary has one character per
    byte: the byte's own if it is printable, otherwise the next one from U+0100 on.
    """
    if BYTE_NAME.fullmatch(name):
        return bytes([int(name[3:5], 16)])
    if any(character not in _BYTES for character in name):
        return None
    return bytes(_BYTES[character] for character in name)


def _byte_characters() -> dict[str, int]:
    seen = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    unseen = [byte for byte in range(256) if byte not in seen]
    return {chr(b): b for b in seen} | {chr(0x100 + n): b for n, b in enumerate(unseen)}


_BYTES = _byte_characters()


def completion_logprobs(
    texts: TokenTexts, logprobs: Sequence[TokenLogprob], top: int
) -> dict[str, list[Any]]:
    """Four lists with one entry per token; `top_logprobs` includes the token itself."""
    tokens: list[str] = []
    tops: list[dict[str, float] | None] = []
    for each in logprobs:
        text_of = texts.first if each.begins else texts.__getitem__
        tokens.append(text_of(each.token))
        if each.logprob is None:
            tops.append(None)
            continue
        entry = {tokens[-1]: _finite(each.logprob)}
        for token, logprob in each.top[:top]:
            entry.setdefault(text_of(token), logprob)
        tops.append(entry)
    return {
        "tokens": tokens,
        "token_logprobs": [
            None if each.logprob is None else _finite(each.logprob) for each in logprobs
        ],
        "top_logprobs": tops,
        "text_offset": [each.offset for each in logprobs],
    }


def _finite(logprob: float) -> float:
    """-9999 for a token that could not have been drawn: JSON has no infinity."""
    return max(logprob, -9999.0)


def chat_logprobs(texts: TokenTexts, logprobs: Sequence[TokenLogprob], top: int) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}, ...]}`."""
    return {
        "content": [
            _chat_entry(texts, each.token, each.logprob or 0.0)
            | {"top_logprobs": [_chat_entry(texts, *pair) for pair in each.top[:top]]}
            for each in logprobs
        ]
    }


def _chat_entry(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": texts[token],
        "logprob": _finite(logprob),
        "bytes": texts.in_bytes(token),
    }


def prompt_logprobs(
    ids: list[int], offsets: list[int], scored: PromptLogprobs | None, bos_id: int | None
) -> tuple[TokenLogprob, ...]:
    """The entries of a prompt's tokens; `scored` is None for a prompt of one token."""
    unscored = TokenLogprob(ids[0], None, (), offsets[0])
    if scored is None:
        entries = [unscored]
    else:
        rows = zip(
            ids[1:],
            scored.logprobs.tolist(),
            scored.top_ids.tolist(),
            scored.top_logprobs.tolist(),
            offsets[1:],
            strict=True,
        )
        entries = [unscored] + [
            TokenLogprob(token, logprob, tuple(zip(top, top_logprobs, strict=True)), offset)
            for token, logprob, top, top_logprobs, offset in rows
        ]
    first = int(ids[0] == bos_id)
    return tuple(each._replace(begins=i == first) for i, each in enumerate(entries))
