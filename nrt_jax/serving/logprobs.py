"""Logprobs of tokens as the two kinds of completion list them."""

from collections.abc import Sequence
from typing import Any

from nrt_jax.serving.engine_loop import PromptScores
from nrt_jax.serving.text import TokenScore, TokenTexts


def legacy_logprobs(
    texts: TokenTexts, scores: Sequence[TokenScore], top: int
) -> dict[str, list[Any]]:
    """Four lists, an entry a token; `top_logprobs` also has the token itself."""
    tops: list[dict[str, float] | None] = []
    for score in scores:
        if score.logprob is None:
            tops.append(None)
            continue
        entry = {texts[score.token]: _shown(score.logprob)}
        for token, logprob in score.top[:top]:
            entry.setdefault(texts[token], logprob)
        tops.append(entry)
    return {
        "tokens": [texts[score.token] for score in scores],
        "token_logprobs": [
            None if score.logprob is None else _shown(score.logprob) for score in scores
        ],
        "top_logprobs": tops,
        "text_offset": [score.offset for score in scores],
    }


def _shown(logprob: float) -> float:
    """-9999 stands for what JSON cannot say: a token that could not have been drawn."""
    return max(logprob, -9999.0)


def chat_logprobs(texts: TokenTexts, scores: Sequence[TokenScore], top: int) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}, ...]}`."""
    return {
        "content": [
            _chat_entry(texts, score.token, score.logprob or 0.0)
            | {"top_logprobs": [_chat_entry(texts, *pair) for pair in score.top[:top]]}
            for score in scores
        ]
    }


def _chat_entry(texts: TokenTexts, token: int, logprob: float) -> dict[str, Any]:
    return {
        "token": texts[token],
        "logprob": _shown(logprob),
        "bytes": texts.in_bytes(token),
    }


def prompt_scores(
    ids: list[int], offsets: list[int], scored: PromptScores | None
) -> tuple[TokenScore, ...]:
    """Of a prompt's tokens; `scored` is None when there is only one."""
    first = TokenScore(ids[0], None, (), offsets[0])
    if scored is None:
        return (first,)
    rows = zip(
        ids[1:],
        scored.logprobs.tolist(),
        scored.top_ids.tolist(),
        scored.top_logprobs.tolist(),
        offsets[1:],
        strict=True,
    )
    rest = (
        TokenScore(token, logprob, tuple(zip(top, top_logprobs, strict=True)), offset)
        for token, logprob, top, top_logprobs, offset in rows
    )
    return (first, *rest)
