"""From the rewards of the K traces of a prompt to their advantages (section 3.2.2, Eq. 9 and 10).

Letters: P prompts, K traces per prompt.
"""

from collections.abc import Callable
from typing import NamedTuple, get_args

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float

from nrt_jax.config.objective import Estimator
from nrt_jax.objective.masked import at_least_float32

# Rewards closer than this share of their size differ by float32 rounding, not by merit.
ROUNDING = 1e-6

# --- formulas ------------------------------------------------------------------------------------


def _centred(shaped_PK: Float[Array, "P K"], zero_std_P: Bool[Array, " P"]) -> Float[Array, "P K"]:
    """Minus the mean of the group."""
    return shaped_PK - shaped_PK.mean(axis=1, keepdims=True)


def _leave_one_out(
    shaped_PK: Float[Array, "P K"], zero_std_P: Bool[Array, " P"]
) -> Float[Array, "P K"]:
    """Minus the mean of the other K - 1; 0 for K = 1, where there are none."""
    # R_k - mean of the others = K / (K - 1) * (R_k - mean of all).
    centred_PK, K = _centred(shaped_PK, zero_std_P), shaped_PK.shape[1]
    return centred_PK * (K / (K - 1)) if K > 1 else jnp.zeros_like(centred_PK)


def _standardised(
    shaped_PK: Float[Array, "P K"], zero_std_P: Bool[Array, " P"]
) -> Float[Array, "P K"]:
    """Minus the mean and divided by the standard deviation of the group; 0 in a zero-std group.

    The standard deviation is that of the population (divisor K): the group is all there is to
    normalise, and only this divisor gives the unit variance that the paper states, at any K.
    """
    centred_PK, zero_std_P1 = _centred(shaped_PK, zero_std_P), zero_std_P[:, None]
    # Scaled to a largest value of 1 first: the square of a reward of 1e-30 would underflow.
    scale_P1 = jnp.abs(centred_PK).max(axis=1, keepdims=True)
    scaled_PK = centred_PK / jnp.where(zero_std_P1, 1, scale_P1)
    variance_P1 = jnp.square(scaled_PK).mean(axis=1, keepdims=True)
    std_P1 = jnp.sqrt(jnp.where(zero_std_P1, 1, variance_P1))
    return jnp.where(zero_std_P1, 0, scaled_PK / std_P1)


class _Estimator(NamedTuple):
    shape: Callable[..., Float[Array, "P K"]]
    """The rewards to compare, from the rewards R and their gains R - R_base."""
    compare: Callable[..., Float[Array, "P K"]]
    """The advantages, from the shaped rewards and which groups have zero std."""


ESTIMATORS = {
    "grpo": _Estimator(lambda reward_PK, gain_PK: jnp.maximum(gain_PK, 0), _standardised),
    "grpo_unclipped": _Estimator(lambda reward_PK, gain_PK: reward_PK, _standardised),
    "rloo": _Estimator(lambda reward_PK, gain_PK: reward_PK, _leave_one_out),
    "clip01": _Estimator(
        lambda reward_PK, gain_PK: jnp.clip(gain_PK, 0, 1), lambda shaped_PK, zero_std_P: shaped_PK
    ),
    "dr_grpo": _Estimator(lambda reward_PK, gain_PK: jnp.maximum(gain_PK, 0), _centred),
}
"""Every estimator by its name in `objective.estimator`; `grpo` is that of Eq. 9 and 10."""

_NAMES = set(get_args(Estimator))
assert ESTIMATORS.keys() == _NAMES, (
    f"in one of config's Estimator and {__name__}.ESTIMATORS alone: {ESTIMATORS.keys() ^ _NAMES}"
)

# --- estimators ----------------------------------------------------------------------------------


def advantages(
    reward_PK: Float[ArrayLike, "P K"],
    baseline_P: Float[ArrayLike, " P"],
    *,
    estimator: str,
) -> Float[Array, "P K"]:
    """Advantage A_k of each trace; `baseline_P` is the reward of the empty trace.

    Float32 (float64 for float64 input). Raises ValueError for an unknown estimator.
    """
    shaped_PK = _shaped_reward(reward_PK, baseline_P, estimator)
    zero_std_P = zero_std(reward_PK, baseline_P, estimator)
    return ESTIMATORS[estimator].compare(shaped_PK, zero_std_P)


def zero_std(
    reward_PK: Float[ArrayLike, "P K"], baseline_P: Float[ArrayLike, " P"], estimator: str
) -> Bool[Array, " P"]:
    """Which groups have traces whose shaped rewards differ by no more than rounding.

    The range of such a group is at most 1e-6 of its largest value. A group with a NaN is not one of
    them: its NaN reaches the loss, where it is noticed, instead of becoming an advantage of 0.
    """
    shaped_PK = _shaped_reward(reward_PK, baseline_P, estimator)
    range_P = shaped_PK.max(axis=1) - shaped_PK.min(axis=1)
    size_PK = jnp.maximum(jnp.abs(at_least_float32(reward_PK)), jnp.abs(shaped_PK))
    return range_P <= ROUNDING * size_PK.max(axis=1)


def _shaped_reward(
    reward_PK: Float[ArrayLike, "P K"], baseline_P: Float[ArrayLike, " P"], estimator: str
) -> Float[Array, "P K"]:
    """The rewards as the estimator compares them, clipped at the baseline or not."""
    if estimator not in ESTIMATORS:
        raise ValueError(
            f"estimator={estimator!r} is unknown; choose one of {', '.join(ESTIMATORS)}"
        )
    reward_PK = at_least_float32(reward_PK)
    gain_PK = reward_PK - at_least_float32(baseline_P)[:, None]
    return ESTIMATORS[estimator].shape(reward_PK, gain_PK)
