"""The terms of the loss, one value per token or sequence; nothing here sums or normalises.

The caller adds them up with `masked_sum` and divides by counts of the whole batch, so that neither
micro-batches nor devices change the loss. Rewards, advantages, token signals, old and reference
logprobs are constants to the gradient: each function stops it itself. Where masked positions may
hold NaN or infinity, call `masked_fill` on the logprobs first.

Letters: B sequences in one dim or in several, such as [P, K]; T tokens. Logprobs are in nats, in
float32.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from nrt_jax.objective.masked import masked_sum

# exp(20) = 5e8 is far outside any clip range; without a limit one such token makes inf * 0 = NaN.
MAX_LOG_RATIO = 20.0


class PolicyTerms(NamedTuple):
    """The trace term of each token, with what the metrics need."""

    loss_BT: Float[Array, "*B T"]
    ratio_BT: Float[Array, "*B T"]
    """pi / pi_old of the token."""
    clipped_BT: Bool[Array, "*B T"]
    """True where the ratio is outside the clip range on the side that A favours: no gradient."""


def ppo_clip(
    logprob_BT: Float[Array, "*B T"],
    old_logprob_BT: Float[Array, "*B T"],
    advantage_B: Float[Array, "*B"],
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyTerms:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with the token ratio r (PPO Eq. 7, as in GRPO).

    The minimum is r A except beyond the bound that A favours, where it is constant.
    """
    ratio_BT = _ratio(logprob_BT, jax.lax.stop_gradient(old_logprob_BT))
    advantage_B1 = jax.lax.stop_gradient(advantage_B)[..., None]
    clipped_BT = _is_clipped(ratio_BT, advantage_B1, clip_low, clip_high)
    bounded_BT = jax.lax.stop_gradient(jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high))
    loss_BT = -advantage_B1 * jnp.where(clipped_BT, bounded_BT, ratio_BT)
    return PolicyTerms(loss_BT, ratio_BT, clipped_BT)


def cispo(
    logprob_BT: Float[Array, "*B T"],
    old_logprob_BT: Float[Array, "*B T"],
    advantage_B: Float[Array, "*B"],
    *,
    clip_low: float,
    clip_high: float,
) -> PolicyTerms:
    """-A clip(r, 1 - low, 1 + high) log pi, the clipped ratio held constant (MiniMax-M1's CISPO).

    Tokens whose ratio is outside the range on the side that A favours have loss 0.
    """
    ratio_BT = jax.lax.stop_gradient(_ratio(logprob_BT, old_logprob_BT))
    advantage_B1 = jax.lax.stop_gradient(advantage_B)[..., None]
    clipped_BT = _is_clipped(ratio_BT, advantage_B1, clip_low, clip_high)
    weight_BT = jnp.clip(ratio_BT, 1 - clip_low, 1 + clip_high)
    loss_BT = jnp.where(clipped_BT, 0, -advantage_B1 * weight_BT * logprob_BT)
    return PolicyTerms(loss_BT, ratio_BT, clipped_BT)


def token_loss(
    log_c_BT: Float[Array, "*B T"], token_signal_BT: Float[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """-S_i log c_i of each answer token, S_i held constant (Algorithm 1 line 12)."""
    return -jax.lax.stop_gradient(token_signal_BT) * log_c_BT


def format_loss(
    start_logprob_B: Float[Array, "*B"],
    end_logprob_B: Float[Array, "*B"],
    end_emitted_B: Bool[Array, "*B"],
    cut_B: Bool[Array, "*B"],
    *,
    where: str,
) -> Float[Array, "*B"]:
    """Cross-entropy of the think tokens (Eq. 11).

    `where="all"`: t_start and t_end of every trace; `"not_emitted"`: t_end alone, where the model
    did not emit it itself; `"natural_end"`: t_start of every trace, and t_end where the model ended
    the trace, with t_end or another token, and not the limit (`cut_B`). Raises ValueError for any
    other name.
    """
    if where == "all":
        return -start_logprob_B - end_logprob_B
    if where == "not_emitted":
        return jnp.where(end_emitted_B, 0, -end_logprob_B)
    if where == "natural_end":
        return -start_logprob_B - jnp.where(cut_B, 0, end_logprob_B)
    raise ValueError(
        f"format_where={where!r} is unknown; choose one of all, not_emitted, natural_end"
    )


def kl_k3(
    logprob_BT: Float[Array, "*B T"], ref_logprob_BT: Float[Array, "*B T"]
) -> Float[Array, "*B T"]:
    """Schulman's k3 estimate of KL(pi || ref) at tokens drawn from pi: d - 1 - log d, d = ref / pi.

    It is never negative and its value is unbiased. Its gradient is that of GRPO.
    """
    log_d_BT = _log_ratio(jax.lax.stop_gradient(ref_logprob_BT), logprob_BT)
    return jnp.expm1(log_d_BT) - log_d_BT


def truncated_importance(
    old_logprob_BT: Float[Array, "*B T"], sampler_logprob_BT: Float[Array, "*B T"], cap: float
) -> Float[Array, "*B T"]:
    """min(pi_old / pi_sampler, cap) of each token, constant: corrects the sampler's rounding."""
    ratio_BT = _ratio(old_logprob_BT, sampler_logprob_BT)
    return jax.lax.stop_gradient(jnp.minimum(ratio_BT, cap))


def trace_ratio(
    logprob_BT: Float[Array, "*B T"],
    old_logprob_BT: Float[Array, "*B T"],
    mask_BT: Shaped[ArrayLike, "*B T"],
    cap: float,
) -> Float[Array, "*B"]:
    """min(r_k, cap), a constant, r_k = pi(z|x) / pi_old(z|x) of the whole trace (Eq. 23).

    The mask keeps the tokens of the trace; an empty trace has ratio 1.
    """
    log_ratio_B = masked_sum(logprob_BT - old_logprob_BT, mask_BT, axis=-1)
    ratio_B = jnp.exp(jnp.minimum(log_ratio_B, MAX_LOG_RATIO))
    return jax.lax.stop_gradient(jnp.minimum(ratio_B, cap))


def sft_loss(logprob_BT: Float[Array, "*B T"]) -> Float[Array, "*B T"]:
    """-log pi(y*_i | x, y*_<i) of each answer token (section 3, supervised fine-tuning)."""
    return -logprob_BT


def _log_ratio(logprob_BT: Array, old_logprob_BT: Array) -> Array:
    """log(pi / pi_old), bounded above so that its exponential and gradient stay finite."""
    return jnp.minimum(logprob_BT - old_logprob_BT, MAX_LOG_RATIO)


def _ratio(logprob_BT: Array, old_logprob_BT: Array) -> Array:
    """pi / pi_old of each token, at most exp(20)."""
    return jnp.exp(_log_ratio(logprob_BT, old_logprob_BT))


def _is_clipped(
    ratio_BT: Array, advantage_B1: Array, clip_low: float, clip_high: float
) -> Bool[Array, "*B T"]:
    """Where the ratio is outside the clip range on the side that A favours."""
    too_high_BT = (advantage_B1 > 0) & (ratio_BT > 1 + clip_high)
    too_low_BT = (advantage_B1 < 0) & (ratio_BT < 1 - clip_low)
    return too_high_BT | too_low_BT
