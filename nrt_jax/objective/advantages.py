"""From the rewards of the K traces of a prompt to their advantages (section 3.2.2, Eq. 9 and 10).

Rewards that are given as log R are compared as R / scale, where the scale of a group is its largest
R: the product of 200 probabilities underflows in float32, and its share of the largest does not.

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


class _Compared(NamedTuple):
    """The rewards of a group, divided by its scale."""

    reward_PK: Float[Array, "P K"]
    gain_PK: Float[Array, "P K"]
    """R - R_base."""
    scale_P1: Float[Array, "P 1"]
    rounding_P: Float[Array, " P"]
    """Differences up to this share of the largest reward are rounding."""


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


def _reward(compared: _Compared) -> Float[Array, "P K"]:
    """R."""
    return compared.reward_PK


def _clipped_gain(compared: _Compared) -> Float[Array, "P K"]:
    """R' = max(0, R - R_base) (Eq. 9)."""
    return jnp.maximum(compared.gain_PK, 0)


def _gain_up_to_one(compared: _Compared) -> Float[Array, "P K"]:
    """R - R_base, clipped to [0, 1]."""
    return jnp.clip(compared.gain_PK, 0, 1 / compared.scale_P1)


class _Estimator(NamedTuple):
    shape: Callable[[_Compared], Float[Array, "P K"]]
    """The rewards to compare."""
    compare: Callable[..., Float[Array, "P K"]] | None
    """The advantages, from the shaped rewards and which groups have zero std; None: the shaped
    rewards are the advantages."""
    free_of_scale: bool = False
    """Whether a factor common to the rewards of a group leaves its advantages as they are."""


ESTIMATORS = {
    "grpo": _Estimator(_clipped_gain, _standardised, free_of_scale=True),
    "grpo_unclipped": _Estimator(_reward, _standardised, free_of_scale=True),
    "rloo": _Estimator(_reward, _leave_one_out),
    "clip01": _Estimator(_gain_up_to_one, None),
    "dr_grpo": _Estimator(_clipped_gain, _centred),
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
    logs: bool = False,
) -> Float[Array, "P K"]:
    """Advantage A_k of each trace; `baseline_P` is the reward of the empty trace.

    With `logs` both are given as log R. Float32 (float64 for float64 input). Raises ValueError for
    an unknown estimator.
    """
    how, compared = _estimator(estimator), _compared(reward_PK, baseline_P, logs)
    advantage_PK = how.shape(compared)
    if how.compare is not None:
        advantage_PK = how.compare(advantage_PK, _equal(how, compared))
    return advantage_PK if how.free_of_scale else advantage_PK * compared.scale_P1


def zero_std(
    reward_PK: Float[ArrayLike, "P K"],
    baseline_P: Float[ArrayLike, " P"],
    estimator: str,
    *,
    logs: bool = False,
) -> Bool[Array, " P"]:
    """Which groups have no trace term, since their shaped rewards differ by no more than rounding.

    The range of such a group is at most 1e-6 of its largest value (with `logs`, of 1e-6 times
    |log R|, to which float32 holds R, where that is larger). `clip01` compares with 0 and not
    within the group: there the shaped rewards must be 0. A group with a NaN is not one of them: its
    NaN reaches the loss, where it is noticed, instead of becoming an advantage of 0.
    """
    return _equal(_estimator(estimator), _compared(reward_PK, baseline_P, logs))


def _estimator(name: str) -> _Estimator:
    if name not in ESTIMATORS:
        raise ValueError(f"estimator={name!r} is unknown; choose one of {', '.join(ESTIMATORS)}")
    return ESTIMATORS[name]


def _compared(
    reward_PK: Float[ArrayLike, "P K"], baseline_P: Float[ArrayLike, " P"], logs: bool
) -> _Compared:
    """R and R - R_base over the scale of the group, which is 1 unless they are given as logs."""
    reward_PK = at_least_float32(reward_PK)
    baseline_P1 = at_least_float32(baseline_P)[:, None]
    rounding_P = jnp.full(len(reward_PK), ROUNDING, reward_PK.dtype)
    if not logs:
        one_P1 = jnp.ones_like(baseline_P1)
        return _Compared(reward_PK, reward_PK - baseline_P1, one_P1, rounding_P)
    largest_P1 = reward_PK.max(axis=1, keepdims=True)
    # -inf where every R is 0; a NaN stays in the rewards.
    largest_P1 = jnp.where(jnp.isfinite(largest_P1), largest_P1, 0)
    share_PK = jnp.exp(reward_PK - largest_P1)
    # Infinite far above every trace, where each gain is clipped away.
    baseline_P1 = jnp.exp(baseline_P1 - largest_P1)
    rounding_P *= jnp.maximum(jnp.abs(largest_P1[:, 0]), 1)
    return _Compared(share_PK, share_PK - baseline_P1, jnp.exp(largest_P1), rounding_P)


def _equal(how: _Estimator, compared: _Compared) -> Bool[Array, " P"]:
    """Which groups have shaped rewards that are equal (without a comparison: 0) up to rounding."""
    shaped_PK = how.shape(compared)
    least_P = shaped_PK.min(axis=1) if how.compare is not None else 0
    size_PK = jnp.maximum(jnp.abs(compared.reward_PK), jnp.abs(shaped_PK))
    return shaped_PK.max(axis=1) - least_P <= compared.rounding_P * size_PK.max(axis=1)
