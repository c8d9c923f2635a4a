"""Log-probabilities of given tokens without ever holding a [B, T, V] array.

Letters: B sequences, T tokens, C tokens of one chunk, V vocabulary, D model dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenLogprobs(NamedTuple):
    """Per position, in nats: log pi(target), and the entropy of the whole distribution."""

    logprob_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    vocab_size: int,
    chunk_tokens: int,
    inverse_temperature_BT: Float[Array, "B T"] | None = None,
) -> TokenLogprobs:
    """Score `targets_BT` under softmax(hidden @ head / temperature), softmax in float32.

    The time dim is cut into chunks of at most about `chunk_tokens` / B positions; the backward pass
    recomputes each chunk's logits, so the largest array is [B, C, V] in both directions. Gradients
    reach the states and the head, from both scores; the temperature is a constant. Columns of the
    head from `vocab_size` on are padding: they have probability 0 and no gradient.
    """
    B, T, _ = hidden_BTD.shape
    if inverse_temperature_BT is None:
        inverse_temperature_BT = jnp.ones((B, T), jnp.float32)
    chunks = _chunk_count(T, max(1, chunk_tokens // B))
    return _scores(vocab_size, chunks, hidden_BTD, head_DV, targets_BT, inverse_temperature_BT)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _scores(
    vocab_size: int, chunks: int, hidden_BTD: Array, head_DV: Array, targets_BT: Array, inverse_BT
) -> TokenLogprobs:
    return _forward(vocab_size, chunks, hidden_BTD, head_DV, targets_BT, inverse_BT)[0]


def _forward(
    vocab_size: int, chunks: int, hidden_BTD: Array, head_DV: Array, targets_BT: Array, inverse_BT
) -> tuple[TokenLogprobs, Any]:
    """The scores; and what the backward pass needs, of which nothing has a V per token."""
    T = targets_BT.shape[1]
    head = head_DV.astype(hidden_BTD.dtype)

    def score_chunk(_, chunk):
        hidden_BCD, targets_BC, inverse_BC = chunk
        logits_BCV = _logits(hidden_BCD, head, inverse_BC, vocab_size)
        largest_BC1 = logits_BCV.max(axis=-1, keepdims=True)
        exp_sum_BC1 = jnp.sum(jnp.exp(logits_BCV - largest_BC1), axis=-1, keepdims=True)
        log_sum_BC1 = largest_BC1 + jnp.log(exp_sum_BC1)
        # The exponentials are taken anew, which is cheaper than to write them for two sums.
        log_pi_BCV = logits_BCV - log_sum_BC1
        entropy_BC = -jnp.sum(jnp.exp(log_pi_BCV) * log_pi_BCV, axis=-1)
        target_BC1 = jnp.take_along_axis(logits_BCV, targets_BC[..., None], axis=-1)
        logprob_BC = (target_BC1 - log_sum_BC1)[..., 0]
        return None, (logprob_BC, entropy_BC, log_sum_BC1[..., 0])

    cut = _into_chunks((hidden_BTD, targets_BT, inverse_BT), chunks)
    _, scored = jax.lax.scan(score_chunk, None, cut)
    logprob_BT, entropy_BT, log_sum_BT = _from_chunks(scored, T)
    kept = (hidden_BTD, head_DV, targets_BT, inverse_BT, log_sum_BT, entropy_BT)
    return TokenLogprobs(logprob_BT, entropy_BT), kept


def _backward(vocab_size: int, chunks: int, kept: Any, gradient: TokenLogprobs) -> tuple:
    """Gradients of states and head.

    Of the scaled logits l, with e = 1 at the target and the entropy H = -sum pi log pi:
    d logprob / d l = e - pi, d H / d l = -pi (log pi + H).
    """
    hidden_BTD, head_DV, _, _, _, entropy_BT = kept
    head = head_DV.astype(hidden_BTD.dtype)
    level_BT = gradient.logprob_BT + gradient.entropy_BT * entropy_BT

    def chunk_gradient(head_gradient_DV, chunk):
        hidden_BCD, targets_BC, inverse_BC, log_sum_BC, of_logprob_BC, of_entropy_BC, level_BC = (
            chunk
        )
        logits_BCV = _logits(hidden_BCD, head, inverse_BC, vocab_size)
        log_pi_BCV = logits_BCV - log_sum_BC[..., None]
        slope_BCV = level_BC[..., None] + of_entropy_BC[..., None] * log_pi_BCV
        columns_11V = jnp.arange(head.shape[1])[None, None]
        at_target_BCV = jnp.where(
            columns_11V == targets_BC[..., None], of_logprob_BC[..., None], 0.0
        )
        d_BCV = (at_target_BCV - jnp.exp(log_pi_BCV) * slope_BCV) * inverse_BC[..., None]
        if vocab_size != head.shape[1]:
            d_BCV = jnp.where(columns_11V < vocab_size, d_BCV, 0.0)
        d_BCV = d_BCV.astype(head.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        hidden_gradient_BCD = product("bcv,dv->bcd", d_BCV, head).astype(head.dtype)
        return head_gradient_DV + product("bcd,bcv->dv", hidden_BCD, d_BCV), hidden_gradient_BCD

    cut = _into_chunks((*kept[:1], *kept[2:5], *gradient, level_BT), chunks)
    zeros_DV = jnp.zeros(head_DV.shape, jnp.float32)
    head_gradient_DV, cut_gradient = jax.lax.scan(chunk_gradient, zeros_DV, cut)
    hidden_gradient_BTD = _from_chunks(cut_gradient, hidden_BTD.shape[1])
    return hidden_gradient_BTD, head_gradient_DV.astype(head_DV.dtype), None, None


_scores.defvjp(_forward, _backward)


def _logits(hidden_BCD: Array, head_DV: Array, inverse_BC: Array, vocab_size: int) -> Array:
    """Scores over the temperature in float32, those of padding so low that they are 0 as pi.

    Half the least float, since the infinite -inf - log_sum would make the entropy NaN; no slice,
    which would not divide over a mesh.
    """
    full_precision = hidden_BCD.dtype == jnp.float32
    if full_precision:
        # D numbers a token to scale in place of V.
        hidden_BCD = hidden_BCD * inverse_BC[..., None]
    logits_BCV = jnp.einsum("bcd,dv->bcv", hidden_BCD, head_DV, preferred_element_type=jnp.float32)
    if not full_precision:
        logits_BCV *= inverse_BC[..., None]
    V = head_DV.shape[1]
    if vocab_size == V:
        return logits_BCV
    lowest = jnp.finfo(jnp.float32).min / 2
    return jnp.where(jnp.arange(V)[None, None] < vocab_size, logits_BCV, lowest)


def _chunk_count(T: int, limit: int) -> int:
    """The fewest chunks of at most `limit` positions; up to twice as many if those divide T."""
    least = -(-T // limit)
    return next((n for n in range(least, 2 * least) if T % n == 0), least)


def _into_chunks(tree: Any, chunks: int) -> Any:
    """[B, T, ...] to [chunks, B, C, ...] with zeros after T; no token leaves its device.

    Chunk i takes tokens i, i + chunks, ...: neighbouring tokens lie on one device, so neighbours go
    to different chunks.
    """

    def cut(x_BT: Array) -> Array:
        B, T = x_BT.shape[:2]
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % chunks)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, -1, chunks, *x_BT.shape[2:]), 2, 0)

    return jax.tree.map(cut, tree)


def _from_chunks(tree: Any, T: int) -> Any:
    """The inverse of `_into_chunks`."""

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]

    return jax.tree.map(join, tree)
