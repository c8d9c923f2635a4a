"""Products with a weight and the lookup of embeddings, with backward passes of their own.

Weights are cast to the dtype of the computation here, and their gradients are float32 sums over
the tokens of all devices.

Letters: B sequences, T tokens, V vocabulary, D model dim.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from nrt_jax.models.sharding import LOGICAL_TO_MESH, constrain

PRODUCT = "product"
"""Name of the results for checkpoint policies, which cannot look into a custom_vjp."""


class _Fixed(NamedTuple):
    """What a compiled program has as constants."""

    contracted: int
    mesh: Mesh | None
    axes: tuple[str, ...]
    """Logical axes of the weight."""

    def gathered(self, weight: Array) -> Array:
        """The weight with all of the model dim on every device."""
        axes = [None if LOGICAL_TO_MESH[axis] == "fsdp" else axis for axis in self.axes]
        return constrain(weight, self.mesh, axes)

    def sharded(self, gradient: Array) -> Array:
        """The weight's gradient in the shards of the weight."""
        return constrain(gradient, self.mesh, self.axes)


def project(
    x: Float[Array, "B T *inner"], weight: nnx.Param, contracted: int = 1, mesh: Mesh | None = None
) -> Float[Array, "B T ..."]:
    """Contract the last `contracted` dims of x with the first dims of the weight, in x's dtype.

    On a mesh the weight is gathered over `fsdp` before the product: XLA would else send pieces of
    it around a ring, and more of them than there are. The gradient of the weight is computed as
    x^T dy. Autodiff computes (dy^T x)^T, for which XLA on CPU transposes dy and runs the
    elementwise work before it column by column.
    """
    fixed = _Fixed(contracted, mesh, tuple(weight.logical_axes))
    return checkpoint_name(_project(fixed, x, weight[...]), PRODUCT)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _project(fixed: _Fixed, x: Array, weight: Array) -> Array:
    return jnp.tensordot(x, fixed.gathered(weight.astype(x.dtype)), fixed.contracted)


def _forward(fixed: _Fixed, x: Array, weight: Array) -> tuple[Array, tuple[Array, Array]]:
    return _project(fixed, x, weight), (x, weight)


def _backward(fixed: _Fixed, kept: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, weight = kept
    outer = tuple(range(2, gradient.ndim))
    outer_of_weight = tuple(range(fixed.contracted, weight.ndim))
    of_x = jnp.tensordot(gradient, fixed.gathered(weight.astype(x.dtype)), (outer, outer_of_weight))
    tokens = ((0, 1), (0, 1))
    of_weight = jnp.tensordot(x, gradient, tokens, preferred_element_type=jnp.float32)
    return of_x, fixed.sharded(of_weight).astype(weight.dtype)


_project.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def embed(
    table_VD: Float[Array, "V D"], tokens_BT: Int[Array, "B T"], dtype: DTypeLike
) -> Float[Array, "B T D"]:
    """Rows of the table, cast before the lookup, so that what travels has the smaller dtype."""
    return table_VD.astype(dtype)[tokens_BT]


def _embed_forward(table_VD: Array, tokens_BT: Array, dtype: DTypeLike) -> tuple[Array, tuple]:
    return embed(table_VD, tokens_BT, dtype), (table_VD, tokens_BT)


def _embed_backward(dtype: DTypeLike, kept: tuple, gradient_BTD: Array) -> tuple[Array, None]:
    del dtype
    table_VD, tokens_BT = kept
    zeros_VD = jnp.zeros(table_VD.shape, jnp.float32)
    sum_VD = zeros_VD.at[tokens_BT].add(gradient_BTD.astype(jnp.float32))
    return sum_VD.astype(table_VD.dtype), None


embed.defvjp(_embed_forward, _embed_backward)
