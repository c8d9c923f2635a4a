"""From the probabilities of the reference answer to the reward of a trace (Table 1, Appendix C).

Letters: B sequences, T tokens of the answer; P prompts, K traces per prompt, A answer tokens where
the traces of a prompt are compared. log_c is log pi(y*_i | x, z, y*_<i) in nats, and log_c_base the
same after an empty trace.
"""

from collections.abc import Callable
from typing import get_args

import jax
import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

from nrt_jax.config.objective import WsNormalisation
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective.masked import (
    as_mask,
    at_least_float32,
    masked_count,
    masked_fill,
    masked_mean,
    masked_sum,
)

WS_SCHEMES = tuple(name for name, scheme in SCHEMES.items() if scheme.weighted)
WS_NORMALISATIONS: tuple[str, ...] = get_args(WsNormalisation)
# The largest raw weight even without a cap: sums of 10,000 such weights still fit in float32.
LARGEST_WEIGHT = 1e34

# --- formulas ------------------------------------------------------------------------------------
# log R and S of rows whose masked log c are 0. `aggregate` sets S to 0 at masked positions, and R
# and S to 0 in rows without any token. R itself underflows: 0.64^200 is 0 in float32.

LogRewardAndSignal = tuple[Float[Array, " B"], Float[Array, "B T"]]


def _log_product(log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> LogRewardAndSignal:
    """R = sum_j log c_j, which stands in place of its logarithm, S_i = 1."""
    return masked_sum(log_c_BT, mask_BT, axis=1), jnp.ones_like(log_c_BT)


def _product(log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]) -> LogRewardAndSignal:
    """R = prod_j c_j, S_i = R."""
    log_reward_B = masked_sum(log_c_BT, mask_BT, axis=1)
    return log_reward_B, jnp.exp(log_reward_B)[:, None] * jnp.ones_like(log_c_BT)


def _geometric_mean(
    log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> LogRewardAndSignal:
    """R = (prod_j c_j)^(1/T), S_i = R / T."""
    log_reward_B = masked_mean(log_c_BT, mask_BT, axis=1)
    return log_reward_B, jnp.exp(log_reward_B)[:, None] * _equal_weights(log_c_BT, mask_BT)


def _arithmetic_mean(
    log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> LogRewardAndSignal:
    """R = sum_j c_j / T, S_i = c_i / T."""
    return _weighted_sum(_equal_weights(log_c_BT, mask_BT), log_c_BT, mask_BT)


def _weighted_sum(
    weight_BT: Float[Array, "B T"], log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> LogRewardAndSignal:
    """R = sum_j w_j c_j, S_i = w_i c_i."""
    counted_BT = mask_BT & (weight_BT > 0)
    largest_B1 = jnp.max(jnp.where(counted_BT, log_c_BT, -jnp.inf), axis=1, keepdims=True)
    # Of a row where no token counts, or where all of them have c = 0.
    shift_B1 = jax.lax.stop_gradient(jnp.where(jnp.isneginf(largest_B1), 0, largest_B1))
    sum_B = masked_sum(weight_BT * jnp.exp(log_c_BT - shift_B1), counted_BT, axis=1)
    log_sum_B = jnp.where(sum_B == 0, -jnp.inf, jnp.log(jnp.where(sum_B == 0, 1, sum_B)))
    return log_sum_B + shift_B1[:, 0], weight_BT * jnp.exp(log_c_BT)


def _weighted_log_sum(
    weight_BT: Float[Array, "B T"], log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> LogRewardAndSignal:
    """R = sum_j w_j log c_j, which stands in place of its logarithm, S_i = w_i."""
    return masked_sum(weight_BT * log_c_BT, mask_BT, axis=1), weight_BT


def _inverse_probability(surprise_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """w_i = 1 / c_base_i."""
    return jnp.exp(surprise_BT)


def _surprise(surprise_BT: Float[Array, "B T"]) -> Float[Array, "B T"]:
    """w_i = -log c_base_i."""
    return surprise_BT


REWARDS: dict[str, Callable[..., LogRewardAndSignal]] = {
    "logp": _log_product,
    "p": _product,
    "am": _arithmetic_mean,
    "gm": _geometric_mean,
}
"""log R and S of the schemes without weights, from log c and the mask."""

RAW_WEIGHTS: dict[str, Callable[..., Float[Array, "B T"]]] = {
    "ws_inv_p": _inverse_probability,
    "ws_neg_log_p": _surprise,
}
"""Raw weights w of the weighted schemes, from -log c_base."""

SPREAD_REWARDS: dict[str, Callable[..., LogRewardAndSignal]] = {"r3": _weighted_log_sum}
"""log R and S of the schemes that weight by spread, from the weights, log c and the mask."""

_WITHOUT_FUNCTION = [
    name
    for name, scheme in SCHEMES.items()
    if name
    not in (RAW_WEIGHTS if scheme.weighted else SPREAD_REWARDS if scheme.spread else REWARDS)
]
assert not _WITHOUT_FUNCTION, (
    "no function in REWARDS, in RAW_WEIGHTS if weighted or in SPREAD_REWARDS if by spread, for: "
    + ", ".join(_WITHOUT_FUNCTION)
)

# --- schemes -------------------------------------------------------------------------------------


def aggregate(
    scheme: str,
    log_c_BT: Float[ArrayLike, "B T"],
    log_c_base_BT: Float[ArrayLike, "B T"],
    mask_BT: Shaped[ArrayLike, "B T"],
    *,
    ws_normalisation: str = "sum",
    weight_cap: float | None = None,
    spread_BT: Float[ArrayLike, "B T"] | None = None,
) -> LogRewardAndSignal:
    """log R, with R = f(c_1..c_T), and token signal S_i = (df/dc_i) c_i of each row (Table 1).

    Where the scheme's R may be negative (`Scheme.positive`), R itself stands in place of log R:
    `rewards_of` takes either. The mask keeps the tokens of the answer; T of the formulas is their
    number. A row without any has reward and signals 0. Computed in float32 (float64 for float64
    input). R may be differentiated: dR/d log c_i is S_i, with the weights of the weighted schemes
    as constants. Only the weighted schemes use log_c_base, and only those that weight by spread use
    `spread_BT` (`spread_over_traces`), which they need. Raises ValueError for an unknown scheme or
    normalisation.
    """
    _check_scheme(scheme)
    mask_BT = as_mask(mask_BT)
    log_c_BT = masked_fill(log_c_BT, mask_BT)
    if SCHEMES[scheme].weighted:
        weight_BT, _ = ws_weights(
            scheme,
            log_c_base_BT,
            mask_BT,
            ws_normalisation=ws_normalisation,
            weight_cap=weight_cap,
        )
        log_reward_B, signal_BT = _weighted_sum(weight_BT, log_c_BT, mask_BT)
    elif SCHEMES[scheme].spread:
        assert spread_BT is not None, f"{scheme} needs the spread over the traces"
        weight_BT = spread_weights(spread_BT, mask_BT)
        log_reward_B, signal_BT = SPREAD_REWARDS[scheme](weight_BT, log_c_BT, mask_BT)
    else:
        log_reward_B, signal_BT = REWARDS[scheme](log_c_BT, mask_BT)
    of_nothing = -jnp.inf if SCHEMES[scheme].positive else 0.0
    log_reward_B = masked_fill(log_reward_B, mask_BT.any(axis=1), of_nothing)
    return log_reward_B, masked_fill(signal_BT, mask_BT)


def rewards_of(scheme: str, log_reward: Float[ArrayLike, "*dims"]) -> Float[Array, "*dims"]:
    """R from what `aggregate` gives in place of its logarithm."""
    _check_scheme(scheme)
    return jnp.exp(log_reward) if SCHEMES[scheme].positive else jnp.asarray(log_reward)


def _check_scheme(scheme: str) -> None:
    if scheme not in SCHEMES:
        raise ValueError(f"scheme={scheme!r} is unknown; choose one of {', '.join(SCHEMES)}")


def ws_weights(
    scheme: str,
    log_c_base_BT: Float[ArrayLike, "B T"],
    mask_BT: Shaped[ArrayLike, "B T"],
    *,
    ws_normalisation: str = "sum",
    weight_cap: float | None = None,
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """Weights w_i of the weighted sum (Table 2), and where the cap reduced the raw weight.

    Raw weights are at most `weight_cap`, and are then left as they are (`sum`), divided by the T of
    the row (`mean`) or made to sum to 1 (`normalised`; all 0 where every raw weight is 0). Weights
    are 0 at masked positions and pass no gradient. Without a cap raw weights stop at 1e34, so that
    a c_base of 0 gives a finite weight. Raises ValueError for unknown names.
    """
    if scheme not in WS_SCHEMES:
        raise ValueError(f"scheme={scheme!r} has no weights; choose one of {', '.join(WS_SCHEMES)}")
    mask_BT = as_mask(mask_BT)
    surprise_BT = -masked_fill(jax.lax.stop_gradient(at_least_float32(log_c_base_BT)), mask_BT)
    # Rounding can leave log c_base just above 0; a negative weight would punish a certain token.
    raw_BT = RAW_WEIGHTS[scheme](jnp.maximum(surprise_BT, 0))
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


def spread_over_traces(
    log_c_PKA: Float[ArrayLike, "P K A"], mask_PA: Shaped[ArrayLike, "P A"]
) -> Float[Array, "P A"]:
    """sigma_j, the standard deviation of log c_j over the K traces of a prompt, in nats."""
    return masked_fill(log_c_PKA, as_mask(mask_PA)[:, None]).std(axis=1)


def spread_weights(
    spread_BT: Float[ArrayLike, "B T"], mask_BT: Shaped[ArrayLike, "B T"]
) -> Float[Array, "B T"]:
    """w_j = sigma_j / sum_i sigma_i: the weights of R3 (arXiv 2506.13351, Section 4.1.3).

    The reward there is sum_j w(sigma_j) (log c_j - log c_j,masked) with a w that grows with sigma_j
    and is not given, and c_masked after a masked trace. Ours are the proportional w with sum 1 and
    the empty trace as the masked one, so that R - R_base is that reward. All weights are 0 where no
    token varies, as with one trace. They pass no gradient.
    """
    mask_BT = as_mask(mask_BT)
    sigma_BT = masked_fill(jax.lax.stop_gradient(at_least_float32(spread_BT)), mask_BT)
    sigma_BT = jnp.minimum(sigma_BT, LARGEST_WEIGHT)
    total_B1 = sigma_BT.sum(axis=1, keepdims=True)
    return sigma_BT / jnp.where(total_B1 > 0, total_B1, 1)


def _equal_weights(
    log_c_BT: Float[Array, "B T"], mask_BT: Bool[Array, "B T"]
) -> Float[Array, "B T"]:
    """1 / T at every position, in the dtype of log c."""
    return jnp.ones_like(log_c_BT) / _token_count_B1(mask_BT)


def _token_count_B1(mask_BT: Bool[Array, "B T"]) -> Float[Array, "B 1"]:
    """T of each row, at least 1 so that it may divide."""
    return jnp.maximum(masked_count(mask_BT, axis=1), 1)[:, None]
