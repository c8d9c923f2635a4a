"""Masks worked by hand; attention against loops in NumPy; a shared prefix against copies of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.models.attention import (
    KVPrefix,
    attend,
    own_mask,
    prefix_mask,
    segment_positions,
)
from tests.models.tiny import close

B, P, T, S, H, G, D = 6, 2, 3, 7, 2, 2, 16


def test_own_mask_by_hand():
    positions = jnp.asarray([[0, 1, 2, 0, 1, 0]])
    mask = own_mask(positions, jnp.asarray([[1, 1, 1, 2, 2, 0]]), window=2)
    expected = [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0, 0],
        [0, 0, 0, 1, 1, 0],
        [0, 0, 0, 0, 0, 0],
    ]
    np.testing.assert_array_equal(mask[0], expected)


def test_own_mask_with_left_padding_and_no_window():
    mask = own_mask(jnp.asarray([[0, 0, 1]]), jnp.asarray([[0, 1, 1]]), window=None)
    np.testing.assert_array_equal(mask[0], [[0, 0, 0], [0, 1, 0], [0, 1, 1]])


def test_positions_count_from_zero_in_each_segment():
    segments = jnp.asarray([[0, 0, 1, 1, 1], [1, 1, 2, 3, 3], [1, 1, 1, 0, 0]])
    expected = [[0, 1, 0, 1, 2], [0, 1, 0, 0, 1], [0, 1, 2, 0, 1]]
    np.testing.assert_array_equal(segment_positions(segments), expected)


def test_prefix_mask_by_hand():
    """Two branches at positions 3 and 4 after a prompt at 0, 1, 2 whose slot 0 is padding."""
    segments = jnp.asarray([[0, 1, 1, 1]])
    prefix = KVPrefix(*jnp.zeros((2, 1, 4, 1, 2)), jnp.asarray([[0, 0, 1, 2]]), segments)
    positions, continued = jnp.asarray([[3, 4], [3, 4]]), jnp.ones((2, 2), int)
    everything = [0, 1, 1, 1]
    np.testing.assert_array_equal(
        prefix_mask(positions, continued, *prefix[2:], None)[0], [everything] * 4
    )
    windowed = prefix_mask(positions, continued, *prefix[2:], 3)[0]
    np.testing.assert_array_equal(windowed, [[0, 0, 1, 1], [0, 0, 0, 1]] * 2)


def test_prefix_mask_of_packed_prompts_by_hand():
    """Prompts 1 (two tokens) and 2 (one) in a row, continued by the rows [1 2] and [2 padding]."""
    positions, segments = jnp.asarray([[0, 1, 0, 0]]), jnp.asarray([[1, 1, 2, 0]])
    prefix = KVPrefix(*jnp.zeros((2, 1, 4, 1, 2)), positions, segments)
    continued = jnp.asarray([[1, 2], [2, 0]])
    expected = [[1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]
    mask = prefix_mask(jnp.asarray([[2, 1], [1, 0]]), continued, *prefix[2:], None)
    np.testing.assert_array_equal(mask[0], expected)
    # Each prompt's positions count from 0: windows are measured within it.
    mask = prefix_mask(jnp.asarray([[2, 1], [1, 0]]), continued, *prefix[2:], 2)
    np.testing.assert_array_equal(mask[0], [[0, 1, 0, 0], *expected[1:]])


def draw(*shape: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def example_prefix() -> KVPrefix:
    positions = jnp.tile(jnp.arange(S), (P, 1))
    segments = jnp.asarray([[0] * 2 + [1] * 5, [1] * 4 + [2] * 3])
    return KVPrefix(draw(P, S, H, D, seed=3), draw(P, S, H, D, seed=4), positions, segments)


def example() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    q, k, v = (
        draw(B, T, H, G, D, seed=0),
        draw(B, T, H, D, seed=1),
        draw(B, T, H, D, seed=2),
    )
    return q, k, v, jnp.tile(S + jnp.arange(T), (B, 1))


def reference(q, k, v, mask) -> np.ndarray:
    """softmax(q k / sqrt(d)) v, one query at a time, over the keys that the mask lets it see."""
    q, k, v, mask = (np.asarray(x) for x in (q, k, v, mask))
    result = np.zeros(q.shape)
    for b, t, h, g in np.ndindex(q.shape[:4]):
        seen = mask[b, t]
        weights = np.exp(k[b, seen, h] @ q[b, t, h, g] / np.sqrt(q.shape[-1]))
        result[b, t, h, g] = weights @ v[b, seen, h] / weights.sum()
    return result


def test_attend_against_loops():
    q, k, v, positions = example()
    mask = own_mask(positions, jnp.ones((B, T), int).at[0, 1].set(2), None)
    close(attend(q, k, v, mask), reference(q, k, v, mask))


@pytest.mark.parametrize("window", [None, 4])
def test_shared_prefix_equals_copies(window):
    q, k, v, positions = example()
    prefix, R = example_prefix(), B // P
    mask = own_mask(positions, jnp.ones((B, T), int), window)
    before = prefix_mask(positions, jnp.ones_like(positions).at[-1].set(2), *prefix[2:], window)
    actual = attend(q, k, v, mask, prefix, before)

    copied_k = jnp.concatenate([jnp.repeat(prefix.k, R, axis=0), k], axis=1)
    copied_v = jnp.concatenate([jnp.repeat(prefix.v, R, axis=0), v], axis=1)
    full = jnp.concatenate([before.reshape(B, T, S), mask], axis=2)
    close(actual, reference(q, copied_k, copied_v, full))


def test_prefix_is_not_copied_to_its_sequences():
    q, k, v, positions = example()
    prefix = example_prefix()
    ones = jnp.ones_like(positions)
    mask, before = own_mask(positions, ones, None), prefix_mask(positions, ones, *prefix[2:], None)
    jaxpr = jax.make_jaxpr(lambda *x: attend(*x, mask, prefix, before))(q, k, v)
    sizes = [np.prod(o.aval.shape) for equation in jaxpr.eqns for o in equation.outvars]
    assert max(sizes) < B * S * H * D


def test_a_query_that_sees_nothing_has_finite_output_and_gradient():
    q, k, v, positions = example()
    mask = own_mask(positions, jnp.zeros((B, T), int), None)
    value, gradient = jax.jit(jax.value_and_grad(lambda q: attend(q, k, v, mask).sum()))(q)
    assert jnp.isfinite(value)
    assert jnp.isfinite(gradient).all()
