"""Logits to tokens: temperature, top-p, and the log-prob of what was drawn.

Letters: B sequences, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key


def sample(
    logits_BV: Float[Array, "B V"],
    keys_B: Key[Array, "B"],
    temperature_B: Float[Array, "B"],
    top_p_B: Float[Array, "B"],
) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
    """One token a row, and its log-prob in nats under the distribution it was drawn from.

    Each row has its own key, temperature and top-p, so a row never depends on its neighbours.
    Temperature 0 is the most probable token; its log-prob is that of the logits as they are.
    """
    greedy_B = temperature_B == 0
    scale_B = jnp.where(greedy_B, 1.0, temperature_B)
    top_p_B = jnp.where(greedy_B, 1.0, top_p_B)
    log_pi_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32) / scale_B[:, None], axis=-1)
    log_pi_BV = jax.lax.cond(
        jnp.any(top_p_B < 1), _keep_nucleus, lambda log_pi, _: log_pi, log_pi_BV, top_p_B
    )
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, log_pi_BV.shape[1:]))(keys_B)
    noisy_BV = log_pi_BV + jnp.where(greedy_B[:, None], 0.0, noise_BV)
    token_B = jnp.argmax(noisy_BV, axis=-1)
    log_prob_B = jnp.take_along_axis(log_pi_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B.astype(jnp.int32), log_prob_B


def _keep_nucleus(
    log_pi_BV: Float[Array, "B V"], top_p_B: Float[Array, "B"]
) -> Float[Array, "B V"]:
    """Renormalise over the most probable tokens whose probabilities first sum to top_p or more.

    probabilities [.5 .3 .2], top_p .7: [.5 .3] are kept and become [.625 .375]. A token stays when
    the probability of all more probable ones is below top_p, so one is always left; ties are
    broken by token id, as the stable sort orders them. Top-p 1 leaves a row as it is.
    """
    order_BV = jnp.argsort(-log_pi_BV, axis=-1)
    sorted_BV = jnp.exp(jnp.take_along_axis(log_pi_BV, order_BV, axis=-1))
    before_BV = jnp.cumsum(sorted_BV, axis=-1) - sorted_BV
    keep_sorted_BV = before_BV < top_p_B[:, None]
    rank_BV = jnp.argsort(order_BV, axis=-1)
    keep_BV = jnp.take_along_axis(keep_sorted_BV, rank_BV, axis=-1)
    nucleus_BV = jax.nn.log_softmax(jnp.where(keep_BV, log_pi_BV, -jnp.inf), axis=-1)
    return jnp.where(top_p_B[:, None] < 1, nucleus_BV, log_pi_BV)
