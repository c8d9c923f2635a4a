"""Log-probabilities of given tokens, computed in chunks so that no array is [B, T, V].

Letters: B sequences, T tokens of a row or, within a chunk, of the chunk, V vocabulary, D model dim.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int


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
    banned_ids: tuple[int, ...] = (),
    banned_BT: Bool[Array, "B T"] | None = None,
) -> TokenLogprobs:
    """log softmax(hidden @ head / temperature) at `targets_BT`, and entropies, in float32.

    Where `banned_BT` is true, the softmax is over all tokens but `banned_ids`.

    Rows are cut into chunks of at most about `chunk_tokens` / B positions. The backward pass
    recomputes the logits of each chunk, so the largest array in both directions is that of one
    chunk's logits. Gradients of both results reach hidden states and head; the temperature is a
    constant. Columns of the head from `vocab_size` on are padding, with probability 0 and no
    gradient.
    """
    B, T, _ = hidden_BTD.shape
    if inverse_temperature_BT is None:
        inverse_temperature_BT = jnp.ones((B, T), jnp.float32)
    fixed = _Fixed(vocab_size, _chunk_count(T, max(1, chunk_tokens // B)), banned_ids)
    scales = _Scales(inverse_temperature_BT, banned_BT if banned_ids else None)
    return _logprobs(fixed, hidden_BTD, head_DV, targets_BT, scales)


class _Fixed(NamedTuple):
    """What a compiled program has as constants."""

    vocab_size: int
    chunks: int
    banned_ids: tuple[int, ...]


class _Scales(NamedTuple):
    """How the logits of each position become those of its softmax."""

    inverse_BT: Float[Array, "B T"]
    banned_BT: Bool[Array, "B T"] | None
    """None where no token is banned."""


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(
    fixed: _Fixed, hidden_BTD: Array, head_DV: Array, targets_BT: Array, scales: _Scales
) -> TokenLogprobs:
    return _forward(fixed, hidden_BTD, head_DV, targets_BT, scales)[0]


def _forward(
    fixed: _Fixed, hidden_BTD: Array, head_DV: Array, targets_BT: Array, scales: _Scales
) -> tuple[TokenLogprobs, Any]:
    """The result, and what the backward pass needs, where no array has a V per token."""
    T = targets_BT.shape[1]
    head = head_DV.astype(hidden_BTD.dtype)

    def score_chunk(_, chunk):
        hidden_BTD, targets_BT, scales = chunk
        logits_BTV = _logits(hidden_BTD, head, scales, fixed)
        largest_BT1 = logits_BTV.max(axis=-1, keepdims=True)
        exp_sum_BT1 = jnp.sum(jnp.exp(logits_BTV - largest_BT1), axis=-1, keepdims=True)
        log_sum_BT1 = largest_BT1 + jnp.log(exp_sum_BT1)
        # Computing the exponentials again is cheaper than storing them for the two sums.
        log_pi_BTV = logits_BTV - log_sum_BT1
        entropy_BT = -jnp.sum(jnp.exp(log_pi_BTV) * log_pi_BTV, axis=-1)
        target_BT1 = jnp.take_along_axis(logits_BTV, targets_BT[..., None], axis=-1)
        logprob_BT = (target_BT1 - log_sum_BT1)[..., 0]
        return None, (logprob_BT, entropy_BT, log_sum_BT1[..., 0])

    cut = _into_chunks((hidden_BTD, targets_BT, scales), fixed.chunks)
    _, scored = jax.lax.scan(score_chunk, None, cut)
    logprob_BT, entropy_BT, log_sum_BT = _from_chunks(scored, T)
    kept = (hidden_BTD, head_DV, targets_BT, scales, log_sum_BT, entropy_BT)
    return TokenLogprobs(logprob_BT, entropy_BT), kept


def _backward(fixed: _Fixed, kept: Any, gradient: TokenLogprobs) -> tuple:
    """Gradients of hidden states and head.

    For scaled logits l, e = 1 at the target and the entropy H = -sum pi log pi:
    d logprob / d l = e - pi, d H / d l = -pi (log pi + H).
    """
    hidden_BTD, head_DV, _, _, _, entropy_BT = kept
    head = head_DV.astype(hidden_BTD.dtype)
    level_BT = gradient.logprob_BT + gradient.entropy_BT * entropy_BT

    def chunk_gradient(head_gradient_DV, chunk):
        hidden_BTD, targets_BT, scales, log_sum_BT, of_logprob_BT, of_entropy_BT, level_BT = chunk
        logits_BTV = _logits(hidden_BTD, head, scales, fixed)
        log_pi_BTV = logits_BTV - log_sum_BT[..., None]
        slope_BTV = level_BT[..., None] + of_entropy_BT[..., None] * log_pi_BTV
        columns_11V = jnp.arange(head.shape[1])[None, None]
        at_target_BTV = jnp.where(
            columns_11V == targets_BT[..., None], of_logprob_BT[..., None], 0.0
        )
        d_BTV = (at_target_BTV - jnp.exp(log_pi_BTV) * slope_BTV) * scales.inverse_BT[..., None]
        possible_BTV = _possible(head.shape[1], scales, fixed)
        if possible_BTV is not None:
            d_BTV = jnp.where(possible_BTV, d_BTV, 0.0)
        d_BTV = d_BTV.astype(head.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        hidden_gradient_BTD = product("bcv,dv->bcd", d_BTV, head).astype(head.dtype)
        return head_gradient_DV + product("bcd,bcv->dv", hidden_BTD, d_BTV), hidden_gradient_BTD

    cut = _into_chunks((*kept[:1], *kept[2:5], *gradient, level_BT), fixed.chunks)
    zeros_DV = jnp.zeros(head_DV.shape, jnp.float32)
    head_gradient_DV, cut_gradient = jax.lax.scan(chunk_gradient, zeros_DV, cut)
    hidden_gradient_BTD = _from_chunks(cut_gradient, hidden_BTD.shape[1])
    return hidden_gradient_BTD, head_gradient_DV.astype(head_DV.dtype), None, None


_logprobs.defvjp(_forward, _backward)


def _logits(hidden_BTD: Array, head_DV: Array, scales: _Scales, fixed: _Fixed) -> Array:
    """Logits over temperature in float32; what is not possible gets probability 0.

    Its logit is half the least float, since -inf would make the entropy NaN. A slice of the logits
    would not divide over a mesh.
    """
    full_precision = hidden_BTD.dtype == jnp.float32
    if full_precision:
        # Scales D numbers per token instead of V.
        hidden_BTD = hidden_BTD * scales.inverse_BT[..., None]
    logits_BTV = jnp.einsum("bcd,dv->bcv", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    if not full_precision:
        logits_BTV *= scales.inverse_BT[..., None]
    possible_BTV = _possible(head_DV.shape[1], scales, fixed)
    lowest = jnp.finfo(jnp.float32).min / 2
    return logits_BTV if possible_BTV is None else jnp.where(possible_BTV, logits_BTV, lowest)


def _possible(V: int, scales: _Scales, fixed: _Fixed) -> Array | None:
    """False for the padding of the vocabulary, and for banned tokens; None if all are possible."""
    columns_11V = np.arange(V)[None, None]
    if scales.banned_BT is None:
        return None if fixed.vocab_size == V else jnp.asarray(columns_11V < fixed.vocab_size)
    banned_11V = jnp.asarray(np.isin(columns_11V, fixed.banned_ids))
    return jnp.asarray(columns_11V < fixed.vocab_size) & ~(scales.banned_BT[..., None] & banned_11V)


def _chunk_count(T: int, limit: int) -> int:
    """The fewest chunks of at most `limit` positions, or up to twice as many if they divide T."""
    least = -(-T // limit)
    return next((n for n in range(least, 2 * least) if T % n == 0), least)


def _into_chunks(tree: Any, chunks: int) -> Any:
    """[B, T, ...] to [chunks, B, chunk tokens, ...] with zeros after T; no token leaves its device.

    Chunk i takes tokens i, i + chunks, ...: a device holds neighbouring tokens, so every chunk
    takes its share of each device's tokens.
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
