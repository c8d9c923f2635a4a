"""Log-probs of tokens as the two kinds of completion list them."""

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
        if score.log_prob is None:
            tops.append(None)
            continue
        entry = {texts[score.token]: _shown(score.log_prob)}
        for token, log_prob in score.top[:top]:
            entry.setdefault(texts[token], log_prob)
        tops.append(entry)
    return {
        "tokens": [texts[score.token] for score in scores],
        "token_logprobs": [
            None if score.log_prob is None else _shown(score.log_prob) for score in scores
        ],
        "top_logprobs": tops,
        "text_offset": [score.offset for score in scores],
    }


def _shown(log_prob: float) -> float:
    """-9999 stands for what JSON cannot say: a token that could not have been drawn."""
    return max(log_prob, -9999.0)


def chat_logprobs(texts: TokenTexts, scores: Sequence[TokenScore], top: int) -> dict[str, Any]:
    """`{"content": [{token, logprob, bytes, top_logprobs}, ...]}`."""
    return {
        "content": [
            _chat_entry(texts, score.token, score.log_prob or 0.0)
            | {"top_logprobs": [_chat_entry(texts, *pair) for pair in score.top[:top]]}
            for score in scores
        ]
    }


def _chat_entry(texts: TokenTexts, token: int, log_prob: float) -> dict[str, Any]:
    return {
        "token": texts[token],
        "logprob": _shown(log_prob),
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
        scored.log_probs.tolist(),
        scored.top_ids.tolist(),
        scored.top_log_probs.tolist(),
        offsets[1:],
        strict=True,
    )
    rest = (
        TokenScore(token, log_prob, tuple(zip(top, top_log_probs, strict=True)), offset)
        for token, log_prob, top, top_log_probs, offset in rows
    )
    return (first, *rest)
