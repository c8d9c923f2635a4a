"""Rotary position embedding, with the llama3 frequency scaling.

Letters: B sequences, T tokens, H heads of queries or of keys, d head dim.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from nrt_jax.config.architecture import Architecture, Llama3Scaling


def inverse_frequencies(architecture: Architecture) -> np.ndarray:
    """Angle in radians per position of each pair of a head, float64 [d / 2].

    theta^(-2 i / d) (RoFormer, section 3.2.2), with the scaling of Llama 3.1 if the architecture
    has it.
    """
    exponent = np.arange(0, architecture.head_dim, 2) / architecture.head_dim
    frequencies = architecture.rope_theta**-exponent
    scaling = architecture.rope_scaling
    return frequencies if scaling is None else _llama3(frequencies, scaling)


def _llama3(frequencies: np.ndarray, scaling: Llama3Scaling) -> np.ndarray:
    """Divide the slow frequencies by `factor`, keep the fast ones, and blend those between."""
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rotate(
    x_BTHd: Float[Array, "B T H d"],
    positions_BT: Int[Array, "B T"],
    frequencies: np.ndarray | Float[Array, "half_d"],
) -> Float[Array, "B T H d"]:
    """Turn each pair (i, i + d/2) of every head by position * frequency_i; angles are float32."""
    frequencies_111d = jnp.asarray(frequencies, jnp.float32)[None, None, None]
    angle_BT1d = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies_111d
    cos, sin = jnp.cos(angle_BT1d), jnp.sin(angle_BT1d)
    first, second = jnp.split(x_BTHd.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTHd.dtype)
