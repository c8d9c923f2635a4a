"""From the probabilities of the reference answer to the reward of a trace (Table 1, Appendix C).

Letters: B sequences, T tokens of the answer. log_c is log pi(y*_i | x, z, y*_<i) in nats, and
log_c_base the same after an empty trace.
"""

from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from nrt_jax.config.objective import Scheme, WsNormalisation
from nrt_jax.objective.masked import (
    as_mask,
    at_least_float32,
    masked_count,
    masked_fill,
    masked_mean,
    masked_sum,
)

SCHEMES: tuple[str, ...] = get_args(Scheme)
WS_SCHEMES = ("ws_inv_p", "ws_neg_log_p")
WS_NORMALISATIONS: tuple[str, ...] = get_args(WsNormalisation)
# The largest raw weight even without a cap: sums of 10,000 such weights still fit in float32.
LARGEST_WEIGHT = 1e34


def aggregate(
    scheme: str,
    log_c_BT: Float[ArrayLike, "B T"],
    log_c_base_BT: Float[ArrayLike, "B T"],
    mask_BT: Shaped[ArrayLike, "B T"],
    *,
    ws_normalisation: str = "mean",
    weight_cap: float | None = None,
) -> tuple[Float[Array, " B"], Float[Array, "B T"]]:
    """Reward R = f(c_1..c_T) and token signal S_i = (df/dc_i) c_i of each row (Table 1).

    The mask keeps the tokens of the answer; T of the formulas is their number. A row without any
    has reward and signals 0. Computed in float32 (float64 for float64 input). R may be
    differentiated: dR/d log c_i is S_i; the weights of the ws schemes are constants. log_c_base
    matters to the ws schemes alone. Raises ValueError for an unknown scheme or normalisation.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")
    mask_BT = as_mask(mask_BT)
    log_c_BT = masked_fill(log_c_BT, mask_BT)
    if scheme in WS_SCHEMES:
        weight_BT, _ = ws_weights(
            scheme,
            log_c_base_BT,
            mask_BT,
            ws_normalisation=ws_normalisation,
            weight_cap=weight_cap,
        )
        reward_B, signal_BT = _weighted_sum(weight_BT, log_c_BT, mask_BT)
    else:
        reward_B, signal_BT = _unweighted(scheme, log_c_BT, mask_BT)
    return masked_fill(reward_B, mask_BT.any(axis=1)), masked_fill(signal_BT, mask_BT)


def ws_weights(
    scheme: str,
    log_c_base_BT: Float[ArrayLike, "B T"],
    mask_BT: Shaped[ArrayLike, "B T"],
    *,
    ws_normalisation: str = "mean",
    weight_cap: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Weights w_i of the weighted sum (Table 2), and where the cap cut the raw weight.

    Raw weights are 1 / c_base (`ws_inv_p`) or -log c_base (`ws_neg_log_p`), at most `weight_cap`,
    then divided by the T of the row (`mean`), left alone (`sum`) or made to sum to 1 (`normalised`;
    all 0 where every raw weight is). 0 at masked positions; no gradient passes. Without a cap raw
    weights stop at 1e34, so that a c_base of 0 stays finite. Raises ValueError for unknown names.
    """
    if scheme not in WS_SCHEMES:
        raise ValueError(f"scheme={scheme!r} has no weights; choose one of {', '.join(WS_SCHEMES)}")
    mask_BT = as_mask(mask_BT)
    surprise_BT = -masked_fill(jax.lax.stop_gradient(at_least_float32(log_c_base_BT)), mask_BT)
    # Rounding can leave log c_base just above 0; a weight below 0 would punish a sure token.
    surprise_BT = jnp.maximum(surprise_BT, 0)
    raw_BT = jnp.exp(surprise_BT) if scheme == "ws_inv_p" else surprise_BT
    largest = LARGEST_WEIGHT if weight_cap is None else min(weight_cap, LARGEST_WEIGHT)
    capped_BT = mask_BT & (raw_BT > largest)
    weight_BT = masked_fill(jnp.minimum(raw_BT, largest), mask_BT)
    if ws_normalisation == "mean":
        weight_BT = weight_BT / _token_count_B1(mask_BT)
    elif ws_normalisation == "normalised":
        total_B1 = weight_BT.sum(axis=1, keepdims=True)
        weight_BT = weight_BT / jnp.where(total_B1 > 0, total_B1, 1)
    elif ws_normalisation != "sum":
        raise ValueError(
            f"ws_normalisation={ws_normalisation!r} is unknown; "
            f"choose one of {', '.join(WS_NORMALISATIONS)}"
        )
    return weight_BT, capped_BT


def _unweighted(
    scheme: str, log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, "B T"]]:
    """R and S of the schemes that need no baseline; the caller masks rows and positions."""
    ones_BT = jnp.ones_like(log_c_BT)
    if scheme == "logp":
        return masked_sum(log_c_BT, mask_BT, axis=1), ones_BT
    if scheme == "p":
        reward_B = jnp.exp(masked_sum(log_c_BT, mask_BT, axis=1))
        return reward_B, reward_B[:, None] * ones_BT
    share_BT = ones_BT / _token_count_B1(mask_BT)
    if scheme == "gm":
        reward_B = jnp.exp(masked_mean(log_c_BT, mask_BT, axis=1))
        return reward_B, reward_B[:, None] * share_BT
    assert scheme == "am"
    return _weighted_sum(share_BT, log_c_BT, mask_BT)


def _weighted_sum(
    weight_BT: Float[Array, "B T"], log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> tuple[Float[Array, " B"], Float[Array, "B T"]]:
    """sum_j w_j c_j, and its terms, which are the signals."""
    signal_BT = weight_BT * jnp.exp(log_c_BT)
    return masked_sum(signal_BT, mask_BT, axis=1), signal_BT


def _token_count_B1(mask_BT: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
    """T of each row, at least 1 so that it may divide."""
    return jnp.maximum(masked_count(mask_BT, axis=1), 1)[:, None]
