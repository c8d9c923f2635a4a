"""Logits to tokens: penalty, temperature, truncation, and the logprob of what was drawn.

Letters: B sequences, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int, Key

from nrt_jax.models.sharding import constrain

BLOCK = 128
MAX_STOP_IDS = 16


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
    """Logits of tokens seen before are divided by this if positive, else multiplied (CTRL)."""
    stop_ids: frozenset[int] = frozenset()
    """Up to 16 tokens that end the sequence, in addition to those of the engine."""
    ignores_eos: bool = False
    """Only `stop_ids` and the limit end the sequence, not the engine's stop tokens."""
    min_tokens: int = 0
    """No token that would end the sequence is drawn before this many others."""
    obeys_bans: bool = True
    """The engine's `banned_ids` are not drawn: False for an answer where traces ban tokens."""


class SlotSampling(NamedTuple):
    """`Sampling` of every slot as arrays, where a stop token of -1 means none."""

    temperature_B: Float[Array, "B"]
    top_p_B: Float[Array, "B"]
    top_k_B: Int[Array, "B"]
    min_p_B: Float[Array, "B"]
    penalty_B: Float[Array, "B"]
    stop_ids: Int[Array, "B stops"]
    ignores_eos_B: Bool[Array, "B"]
    min_tokens_B: Int[Array, "B"]
    obeys_bans_B: Bool[Array, "B"]


def sampled_vocab(vocab_size: int, mesh: Mesh) -> int:
    """V of the logits that are sampled from: on several tensor shards, whole blocks for each.

    The entries past the vocabulary have a logit of -inf.
    """
    shards = mesh.shape["tensor"]
    return vocab_size if shards == 1 else -(-vocab_size // (BLOCK * shards)) * BLOCK * shards


def fit_vocab(logits: Float[Array, "*B logits"], size: int) -> Float[Array, "*B V"]:
    """The logits with a vocabulary dim of `sampled_vocab`."""
    padding = [(0, 0)] * (logits.ndim - 1) + [(0, size - logits.shape[-1])]
    return jnp.pad(logits, padding, constant_values=-jnp.inf)


def sample(
    logits_BV: Float[Array, "B V"],
    seen_BV: Bool[Array, "B V"],
    keys_B: Key[Array, "B"],
    sampling: SlotSampling,
    mesh: Mesh | None = None,
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token per row, and its logprob in nats under the distribution it was drawn from.

    The order is: repetition penalty, temperature, top-k, top-p, min-p, renormalise. Each row has
    its own key and settings, so rows do not depend on each other. Temperature 0 takes the most
    probable token, with its logprob under the penalised logits at temperature 1, not truncated.

    On a `mesh` whose tensor axis shards V, the shards exchange sums of blocks and one block per
    row; truncation alone sorts whole rows.
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
    token_B, total_B = _draw(weight_BV, keys_B, mesh)
    token_B = jax.lax.cond(
        jnp.any(greedy_B),
        lambda: jnp.where(greedy_B, jnp.argmax(scores_BV, axis=-1), token_B).astype(jnp.int32),
        lambda: token_B,
    )
    score_B = jnp.take_along_axis(scores_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, score_B - highest_B - jnp.log(total_B)


def most_probable(
    logits_BV: Float[Array, "B V"], count: int
) -> tuple[Int[Array, "B top"], Float[Array, "B top"]]:
    """The `count` most probable tokens of each row and their logprobs, at temperature 1."""
    top_logits, top_ids = jax.lax.top_k(logits_BV.astype(jnp.float32), count)
    log_sum_B1 = jax.nn.logsumexp(logits_BV.astype(jnp.float32), axis=-1, keepdims=True)
    return top_ids.astype(jnp.int32), top_logits - log_sum_B1


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
    weight_BV: Float[Array, "B V"], keys_B: Key[Array, "B"], mesh: Mesh | None
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """An index drawn in proportion to its weight, and the sum of the weights.

    First a block of the vocabulary is drawn by its weight, then an entry of the block. Both draws
    invert the cumulative sum at a uniform number of their own: two numbers per row instead of V,
    and the second draw has the full resolution of float32 for rare tokens.
    """
    B, V = weight_BV.shape
    blocks = jnp.pad(weight_BV, ((0, 0), (0, -V % BLOCK))).reshape(B, -1, BLOCK)
    blocks = constrain(blocks, mesh, ("batch", "vocab", None))
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    block_weights = constrain(jnp.sum(blocks, axis=-1), mesh, ("batch", None))
    block_B = _invert(block_weights, uniform_B2[:, 0])
    weights = jnp.take_along_axis(blocks, block_B[:, None, None], axis=1)[:, 0]
    token_B = block_B * BLOCK + _invert(weights, uniform_B2[:, 1])
    return token_B.astype(jnp.int32), jnp.sum(block_weights, axis=-1)


def _invert(weights: Float[Array, "B entries"], uniform_B: Float[Array, "B"]) -> Int[Array, "B"]:
    """First index whose cumulative weight exceeds uniform * total; its weight is never 0."""
    # Rounding may let a parallel sum grow at an entry of weight 0, so these entries are excluded.
    cumulative = jnp.where(weights > 0, jnp.cumsum(weights, axis=-1), 0.0)
    total_B = jnp.max(cumulative, axis=-1)
    # The product may round up to the total, which no entry exceeds.
    below_B = jnp.minimum(uniform_B * total_B, jnp.nextafter(total_B, jnp.zeros_like(total_B)))
    return jnp.argmax(cumulative > below_B[:, None], axis=-1)


def _truncate(scores_BV: Float[Array, "B V"], sampling: SlotSampling) -> Float[Array, "B V"]:
    """-inf for tokens that top-k, then top-p among the rest, then min-p remove.

    probabilities [.5 .3 .2], top_p .7: [.5 .3] are kept. A token is kept when all more probable
    ones together have less than top_p, so at least one is. The stable sort breaks ties by token id.
    """
    V = scores_BV.shape[1]
    order_BV = jnp.argsort(-scores_BV, axis=-1)
    sorted_BV = jnp.take_along_axis(scores_BV, order_BV, axis=-1)
    top_k_B = jnp.where(sampling.top_k_B > 0, sampling.top_k_B, V)
    keep_BV = jnp.arange(V)[None] < top_k_B[:, None]
    p_BV = jax.nn.softmax(jnp.where(keep_BV, sorted_BV, -jnp.inf), axis=-1)
    before_BV = jnp.cumsum(p_BV, axis=-1) - p_BV
    # Top-p 1 keeps tokens that rounding puts past a sum of 1.
    keep_BV &= (before_BV < sampling.top_p_B[:, None]) | (sampling.top_p_B[:, None] >= 1)
    keep_BV &= p_BV >= sampling.min_p_B[:, None] * p_BV[:, :1]
    rank_BV = jnp.argsort(order_BV, axis=-1)
    return jnp.where(jnp.take_along_axis(keep_BV, rank_BV, axis=-1), scores_BV, -jnp.inf)
