"""Log-probabilities of given tokens without ever holding a [B, T, V] array.

Letters: B sequences, T tokens, C tokens of one chunk, V vocabulary, D model dim.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class TokenScores(NamedTuple):
    """Per position, in nats: log pi(target), and the entropy of the whole distribution."""

    log_prob_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]


def token_scores(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    vocab_size: int,
    chunk_tokens: int,
    inverse_temperature_BT: Float[Array, "B T"] | None = None,
) -> TokenScores:
    """Score `targets_BT` under softmax(hidden @ head / temperature), softmax in float32.

    The time dim is cut into chunks of about `chunk_tokens` / B positions; the backward pass
    recomputes each chunk's logits, so the largest array is [B, C, V] in both directions. Columns of
    the head from `vocab_size` on are padding: they have probability 0 and no gradient.
    """
    B, T, _ = hidden_BTD.shape
    C = min(T, max(1, chunk_tokens // B))
    if inverse_temperature_BT is None:
        inverse_temperature_BT = jnp.ones((B, T), jnp.float32)
    head_DV = head_DV.astype(hidden_BTD.dtype)

    @jax.checkpoint
    def score_chunk(hidden_BCD, targets_BC, inverse_temperature_BC):
        logits_BCV = jnp.einsum(
            "btd,dv->btv", hidden_BCD, head_DV, preferred_element_type=jnp.float32
        )
        logits_BCV *= inverse_temperature_BC[..., None]
        log_pi_BCV = jax.nn.log_softmax(_without_padding(logits_BCV, vocab_size), axis=-1)
        log_prob_BC = jnp.take_along_axis(log_pi_BCV, targets_BC[..., None], axis=-1)[..., 0]
        return TokenScores(log_prob_BC, -jnp.sum(jnp.exp(log_pi_BCV) * log_pi_BCV, axis=-1))

    if C == T:
        return score_chunk(hidden_BTD, targets_BT, inverse_temperature_BT)
    padding = -T % C
    chunks = jax.tree.map(
        lambda x: _into_chunks(jnp.pad(x, ((0, 0), (0, padding)) + ((0, 0),) * (x.ndim - 2)), C),
        (hidden_BTD, targets_BT, inverse_temperature_BT),
    )
    _, scores = jax.lax.scan(lambda _, chunk: (None, score_chunk(*chunk)), None, chunks)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(B, -1)[:, :T], scores)


def _without_padding(logits_BCV: Float[Array, "B C V"], vocab_size: int) -> Array:
    """Scores so low that they are 0 among the probabilities; a slice would not divide over a mesh.

    Half the least float, since the infinite -inf - log_sum would make the entropy NaN.
    """
    V = logits_BCV.shape[-1]
    if vocab_size == V:
        return logits_BCV
    lowest = jnp.finfo(logits_BCV.dtype).min / 2
    return jnp.where(jnp.arange(V)[None, None] < vocab_size, logits_BCV, lowest)


def _into_chunks(x_BT: Array, C: int) -> Array:
    """[B, n * C, ...] to [n, B, C, ...]."""
    B, T = x_BT.shape[:2]
    return x_BT.reshape(B, T // C, C, *x_BT.shape[2:]).swapaxes(0, 1)
