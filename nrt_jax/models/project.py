"""A product with a weight, with a backward pass that copies no activation.

Letters: B sequences, T tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

PRODUCT = "product"
"""Name of every result, for checkpoint policies, which cannot see into a custom_vjp."""


def project(
    x: Float[Array, "B T *inner"], weight: Float[Array, "..."], contracted: int = 1
) -> Float[Array, "B T ..."]:
    """Contract the last dims of x with as many first dims of the weight.

    The gradient of the weight is x^T dy, as autodiff has it (dy^T x)^T: XLA on CPU would transpose
    dy, and compute all the elementwise work that dy comes from in that order, column by column.
    """
    return checkpoint_name(_project(contracted, x, weight), PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(contracted: int, x: Array, weight: Array) -> Array:
    return jnp.tensordot(x, weight, contracted)


def _forward(contracted: int, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return jnp.tensordot(x, weight, contracted), (x, weight)


def _backward(contracted: int, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    outer = tuple(range(2, gradient.ndim))
    outer_of_weight = tuple(range(contracted, weight.ndim))
    of_x = jnp.tensordot(gradient, weight, (outer, outer_of_weight))
    return of_x, jnp.tensordot(x, gradient, ((0, 1), (0, 1)))


_project.defvjp(_forward, _backward)
