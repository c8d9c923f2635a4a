"""From the rewards of the K traces of a prompt to their advantages (section 3.2.2, Eq. 9 and 10).

Letters: P prompts, K traces a prompt.
"""

from typing import get_args

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from nrt_jax.config.objective import Estimator
from nrt_jax.objective.masked import at_least_float32

ESTIMATORS: tuple[str, ...] = get_args(Estimator)
# Rewards closer than this share of their size differ by float32 rounding, not by merit.
SPREAD_TOLERANCE = 1e-6


def advantages(
    reward_PK: Float[ArrayLike, "P K"],
    baseline_P: Float[ArrayLike, " P"],
    *,
    estimator: str,
) -> Float[Array, "P K"]:
    """Advantage A_k of each trace; `baseline_P` is the reward of the empty trace.

    - `grpo`: R' = max(0, R - R_base), then (R' - mean) / std (Eq. 9, 10).
    - `grpo_unclipped`: (R - mean) / std.
    - `rloo`: R_k minus the mean of the other K - 1 rewards; 0 for K = 1, where there are none.
    - `clip01`: R - R_base clipped to [0, 1].
    - `dr_grpo`: R' - mean, without the division.

    std is that of the population (divisor K): the group is all there is to normalise, and only this
    one gives the unit variance that the paper states, at any K. A group without spread (see
    `has_spread`) has advantage 0 under the two that divide; so nothing is added to std.
    Float32 (float64 for float64 input). Raises ValueError for an unknown estimator.
    """
    shaped_PK = _shaped_reward(reward_PK, baseline_P, estimator)
    if estimator == "clip01":
        return shaped_PK
    centred_PK = shaped_PK - shaped_PK.mean(axis=1, keepdims=True)
    if estimator == "dr_grpo":
        return centred_PK
    if estimator == "rloo":
        # R_k - mean of the others = K / (K - 1) * (R_k - mean of all).
        K = centred_PK.shape[1]
        return centred_PK * (K / (K - 1)) if K > 1 else jnp.zeros_like(centred_PK)
    spread_P1 = has_spread(reward_PK, baseline_P, estimator)[:, None]
    # Scaled to a largest value of 1 first: the square of a reward of 1e-30 would underflow.
    scale_P1 = jnp.abs(centred_PK).max(axis=1, keepdims=True)
    scaled_PK = centred_PK / jnp.where(spread_P1, scale_P1, 1)
    variance_P1 = jnp.square(scaled_PK).mean(axis=1, keepdims=True)
    std_P1 = jnp.sqrt(jnp.where(spread_P1, variance_P1, 1))
    return jnp.where(spread_P1, scaled_PK / std_P1, 0)


def has_spread(
    reward_PK: Float[ArrayLike, "P K"], baseline_P: Float[ArrayLike, " P"], estimator: str
) -> Bool[Array, " P"]:
    """Whether the traces of a group differ, after the estimator's clipping, by more than rounding.

    The range of the group must exceed 1e-6 of its largest value. A NaN counts as spread, so that it
    reaches the loss, where it is noticed, and does not turn into an advantage of 0.
    """
    shaped_PK = _shaped_reward(reward_PK, baseline_P, estimator)
    range_P = shaped_PK.max(axis=1) - shaped_PK.min(axis=1)
    size_PK = jnp.maximum(jnp.abs(at_least_float32(reward_PK)), jnp.abs(shaped_PK))
    return ~(range_P <= SPREAD_TOLERANCE * size_PK.max(axis=1))


def _shaped_reward(
    reward_PK: Float[ArrayLike, "P K"], baseline_P: Float[ArrayLike, " P"], estimator: str
) -> Float[Array, "P K"]:
    """The rewards after the estimator's clipping at the baseline, before any comparison."""
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator={estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}"
        )
    reward_PK = at_least_float32(reward_PK)
    gain_PK = reward_PK - at_least_float32(baseline_P)[:, None]
    if estimator in ("grpo", "dr_grpo"):
        return jnp.maximum(gain_PK, 0)
    if estimator == "clip01":
        return jnp.clip(gain_PK, 0, 1)
    return reward_PK
