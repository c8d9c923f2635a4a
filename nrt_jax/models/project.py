"""A product with a weight, with a backward pass that copies no activation.

Letters: B sequences, T tokens.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

PRODUCT = "product"
"""Name of the results for checkpoint policies, which cannot look into a custom_vjp."""


def project(
    x: Float[Array, "B T *inner"], weight: Float[Array, "..."], contracted: int = 1
) -> Float[Array, "B T ..."]:
    """Contract the last `contracted` dims of x with the first dims of the weight.

    The gradient of the weight is computed as x^T dy. Autodiff computes (dy^T x)^T, for which XLA on
    CPU transposes dy and runs the elementwise work before it column by column.
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
