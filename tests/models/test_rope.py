"""Rotary frequencies and rotation against the formulas in plain Python."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.architecture import Llama3Scaling
from nrt_jax.models.rope import inverse_frequencies, rotate
from tests.models.tiny import architecture


def test_frequencies_are_powers_of_theta():
    frequencies = inverse_frequencies(architecture(head_dim=8, rope_theta=10000.0))
    np.testing.assert_allclose(frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-12)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_by_wavelength(factor):
    """Short waves stay, long ones are stretched by `factor`, those between are blended."""
    scaling = Llama3Scaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    plain = inverse_frequencies(architecture(head_dim=128, rope_theta=500000.0))
    scaled = inverse_frequencies(
        architecture(head_dim=128, rope_theta=500000.0, rope_scaling=scaling)
    )
    kinds = set()
    for before, after in zip(plain, scaled, strict=True):
        wavelength = 2 * math.pi / before
        if wavelength < 8192 / 4:
            kinds.add("short")
            expected = before
        elif wavelength > 8192 / 1:
            kinds.add("long")
            expected = before / factor
        else:
            kinds.add("between")
            smooth = (8192 / wavelength - 1) / (4 - 1)
            expected = (1 - smooth) * before / factor + smooth * before
        assert after == pytest.approx(expected, rel=1e-12)
    assert kinds == {"short", "between", "long"}


def test_rotation_turns_pairs_of_half_a_head_apart():
    """A quarter turn takes (1, 2 | 3, 4) to (-3, 2 cos - 4 sin | 1, 4 cos + 2 sin)."""
    x = jnp.asarray([1.0, 2.0, 3.0, 4.0]).reshape(1, 1, 1, 4)
    turned = rotate(x, jnp.asarray([[1]]), np.asarray([math.pi / 2, 0.5]))
    cos, sin = math.cos(0.5), math.sin(0.5)
    expected = [-3, 2 * cos - 4 * sin, 1, 4 * cos + 2 * sin]
    np.testing.assert_allclose(turned.ravel(), expected, atol=1e-6)


def test_only_the_distance_counts():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 16)), jnp.float32) for _ in range(2))
    frequencies = inverse_frequencies(architecture())

    def score(query: int, key: int) -> float:
        q_turned = rotate(q, jnp.asarray([[query]]), frequencies)
        return float(jnp.vdot(q_turned, rotate(k, jnp.asarray([[key]]), frequencies)))

    assert score(0, 0) == pytest.approx(float(jnp.vdot(q, k)), abs=1e-5)
    assert score(107, 100) == pytest.approx(score(7, 0), abs=1e-4)
    assert abs(score(107, 100) - score(100, 107)) > 0.1


def test_angles_are_float32_also_for_bfloat16_heads():
    """bfloat16 counts to 256 only: at position 1001 its angle would be off by a radian."""
    x = jnp.ones((1, 1, 1, 2), jnp.bfloat16)
    turned = rotate(x, jnp.asarray([[1001]]), np.asarray([1.0]))
    assert turned.dtype == jnp.bfloat16
    expected = [math.cos(1001) - math.sin(1001), math.cos(1001) + math.sin(1001)]
    np.testing.assert_allclose(turned.ravel().astype(jnp.float32), expected, atol=0.01)
