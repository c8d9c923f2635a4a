"""Reductions over the positions that a mask keeps: the only place where masks meet sums.

A mask keeps the positions where it is nonzero, be it bool, integer or float. Values at masked
positions, NaN and infinity included, reach neither the result nor the gradient of these functions.
A nonlinear function in between needs `masked_fill` on its inputs too: its derivative at NaN is NaN,
whatever the sum does with the position.

    log_ratio = masked_fill(logprob, mask) - masked_fill(old_logprob, mask)
    masked_sum(jnp.exp(log_ratio), mask)
"""

import jax.numpy as jnp
from jaxtyping import Array, ArrayLike, Bool, Float, Shaped

Axis = int | tuple[int, ...] | None


def at_least_float32(x: Shaped[ArrayLike, "*dims"]) -> Float[Array, "*dims"]:
    """`x` as float32, or float64 if it is that already: sums never run in a lower precision."""
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_mask(mask: Shaped[ArrayLike, "*dims"]) -> Bool[Array, "*dims"]:
    """Bool mask, True where `mask` is nonzero."""
    return jnp.asarray(mask) != 0


def masked_fill(
    x: Shaped[ArrayLike, "*#dims"], mask: Shaped[ArrayLike, "*#dims"], value: float = 0.0
) -> Float[Array, "*dims"]:
    """`x` in at least float32 where the mask keeps it, `value` elsewhere; the mask broadcasts."""
    return jnp.where(as_mask(mask), at_least_float32(x), value)


def masked_sum(
    x: Shaped[ArrayLike, "*#dims"], mask: Shaped[ArrayLike, "*#dims"], axis: Axis = None
) -> Float[Array, "..."]:
    """Sum over `axis` (default: all) of the kept positions; the mask broadcasts.

    The sum is 0 where no position is kept.
    """
    return jnp.sum(masked_fill(x, mask), axis=axis)


def masked_count(mask: Shaped[ArrayLike, "*dims"], axis: Axis = None) -> Float[Array, "..."]:
    """Number of kept positions along `axis`, float32."""
    return jnp.sum(as_mask(mask), axis=axis, dtype=jnp.float32)


def masked_mean(
    x: Shaped[ArrayLike, "*dims"], mask: Shaped[ArrayLike, "*dims"], axis: Axis = None
) -> Float[Array, "..."]:
    """Mean over `axis` (default: all) of the kept positions; 0 where none is kept."""
    return masked_sum(x, mask, axis) / jnp.maximum(masked_count(mask, axis), 1)
