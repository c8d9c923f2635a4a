"""Logits to tokens: penalty, temperature, truncation, and the logprob of what was drawn.

Letters: B sequences, V vocabulary, J blocks of C entries that the vocabulary is cut into, X stop
tokens, R most probable tokens that are reported.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

BLOCK = 128
MAX_STOP_IDS = 8


class Sampling(NamedTuple):
    """How the tokens of one request are drawn."""

    temperature: float = 1.0
    """Logits are divided by this; 0 takes the most probable token."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens with at least this probability."""
    top_k: int = 0
    """Keep this many of the most probable tokens; 0 for all."""
    min_p: float = 0.0
    """Keep tokens with at least this share of the highest probability."""
    repetition_penalty: float = 1.0
    """Scores of tokens seen before are divided by this if positive, else multiplied (CTRL)."""
    stop_ids: frozenset[int] = frozenset()
    """Up to 8 tokens that end the sequence, besides those of the engine."""


class SlotSampling(NamedTuple):
    """`Sampling` of every slot, as arrays; a stop token of -1 is none."""

    temperature_B: Float[Array, "B"]
    top_p_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    min_p_B: Float[Array, "B"]
    penalty_B: Float[Array, "B"]
    stop_ids: Int[Array, "B X"]


def sample(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    keys_B: Key[Array, "B"],
    sampling: SlotSampling,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row, and its logprob in nats under the distribution it was drawn from.

    The order is: repetition penalty, temperature, top-k, top-p, min-p, renormalise. Each row has
    its own key and settings, so a row never depends on its neighbours. Temperature 0 is the most
    probable token; its logprob is that of the penalised logits at temperature 1, not truncated.
    """
    greedy_B = sampling.temperature_B == 0
    scores_BV = _temper(_penalise(logits_BV.astype(jnp.float32), seen_BV, sampling), sampling)
    truncates_B = ~greedy_B & (
        (sampling.top_p_B < 1) | (sampling.top_k_B > 0) | (sampling.min_p_B > 0)
    )
    scores_BV = jax.lax.cond(
        jnp.any(truncates_B),
        lambda scores_BV: jnp.where(
            truncates_B[:, None], _truncate(scores_BV, sampling), scores_BV
        ),
        lambda scores_BV: scores_BV,
        scores_BV,
    )
    highest_B = jnp.max(scores_BV, axis=-1)
    weight_BV = jnp.exp(scores_BV - highest_B[:, None])
    token_B, total_B = _draw(weight_BV, keys_B)
    token_B = jax.lax.cond(
        jnp.any(greedy_B),
        lambda: jnp.where(greedy_B, jnp.argmax(scores_BV, axis=-1), token_B).astype(jnp.int32),
        lambda: token_B,
    )
    score_B = jnp.take_along_axis(scores_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, score_B - highest_B - jnp.log(total_B)


def most_probable(
    logits_BV: Float[Array, "B V"], count: int
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
    """The `count` most probable tokens of each row and their logprobs, at temperature 1."""
    top_BR, id_BR = jax.lax.top_k(logits_BV.astype(jnp.float32), count)
    log_sum_B1 = jax.nn.logsumexp(logits_BV.astype(jnp.float32), axis=-1, keepdims=True)
    return id_BR.astype(jnp.int32), top_BR - log_sum_B1


def _penalise(
    logits_BV: Float[Array, "B V"], seen_BV: Bool[Array, "B V"], sampling: SlotSampling
) -> Float[Array, "B V"]:
    penalty_B1 = sampling.penalty_B[:, None]

    def penalise(logits_BV):
        lower_BV = jnp.where(logits_BV > 0, logits_BV / penalty_B1, logits_BV * penalty_B1)
        return jnp.where(seen_BV, lower_BV, logits_BV)

    return jax.lax.cond(jnp.any(penalty_B1 != 1), penalise, lambda logits: logits, logits_BV)


def _temper(logits_BV: Float[Array, "B V"], sampling: SlotSampling) -> Float[Array, "B V"]:
    scale_B = jnp.where(sampling.temperature_B == 0, 1.0, sampling.temperature_B)
    return logits_BV / scale_B[:, None]


def _draw(
    weight_BV: Float[Array, "B V"], keys_B: Key[Array, "B"]
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """An index in proportion to its weight, and the sum of the weights.

    A block of the vocabulary is drawn by the block's weight and then an entry of that block, each
    by inverting the cumulative sum with a uniform number of its own: two numbers a row in the place
    of V, and the second keeps the resolution of float32 for what is rare.
    """
    B, V = weight_BV.shape
    weight_BJC = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_BJ = jnp.sum(weight_BJC, axis=-1)
    block_B = _invert(block_BJ, uniform_B2[:, 0])
    entry_BC = jnp.take_along_axis(weight_BJC, block_B[:, None, None], axis=1)[:, 0]
    token_B = block_B * BLOCK + _invert(entry_BC, uniform_B2[:, 1])
    return token_B.astype(jnp.int32), jnp.sum(block_BJ, axis=-1)


def _invert(weight_BC: Float[Array, "B C"], uniform_B: Float[Array, "B"]) -> Int[Array, "B"]:
    """First index whose cumulative weight exceeds uniform * total; never one of weight 0."""
    # A parallel sum may rise by a rounding where the weight is 0, so these entries are left out.
    cumulative_BC = jnp.where(weight_BC > 0, jnp.cumsum(weight_BC, axis=-1), 0.0)
    total_B = jnp.max(cumulative_BC, axis=-1)
    # The product may round up to the total, which nothing exceeds.
    below_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, jnp.zeros_like(total_B)))
    return jnp.argmax(cumulative_BC > below_B[:, None], axis=-1)


def _truncate(scores_BV: Float[Array, "B V"], sampling: SlotSampling) -> Float[Array, "B V"]:
    """-inf where top-k, then top-p among what is left, then min-p leave a token out.

    probabilities [.5 .3 .2], top_p .7: [.5 .3] are kept. A token stays when the probability of all
    more probable ones is below top_p, so one is always left; ties are broken by token id, as the
    stable sort orders them.
    """
    V = scores_BV.shape[1]
    order_BV = jnp.argsort(-scores_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scores_BV, order_BV, axis=-1)
    top_k_B = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, V)
    keep_BV = jnp.arange(V)[None] < top_k_B[:, None]
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # Top-p 1 keeps what rounding puts past the sum of 1.
    keep_BV &= (before_BV < sampling.top_p_B[:, None]) | (sampling.top_p_B[:, None] >= 1)
    keep_BV &= p_BV >= sampling.min_p_B[:, None] * p_BV[:, :1]
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(keep_BV, rank_BV, axis=-1), scores_BV, -jnp.inf)
