"""Masked positions reach neither a sum nor its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.objective.masked import (
    as_mask,
    at_least_float32,
    masked_count,
    masked_fill,
    masked_mean,
    masked_sum,
)

X = jnp.array([[1.0, 2.0, jnp.nan], [jnp.inf, 3.0, 5.0], [jnp.nan, jnp.nan, -jnp.inf]])
MASK = jnp.array([[True, True, False], [False, True, True], [False, False, False]])


@pytest.mark.parametrize("mask", [MASK, MASK.astype(jnp.float32), MASK.astype(jnp.int32)])
def test_sum_mean_and_count_see_kept_positions_only(mask):
    np.testing.assert_array_equal(masked_sum(X, mask, axis=1), [3, 8, 0])
    np.testing.assert_array_equal(masked_mean(X, mask, axis=1), [1.5, 4, 0])
    np.testing.assert_array_equal(masked_count(mask, axis=1), [2, 2, 0])
    np.testing.assert_array_equal(masked_sum(X, mask, axis=0), [1, 5, 5])
    assert masked_sum(X, mask) == 11
    assert masked_mean(X, mask) == 11 / 4


def test_fractional_mask_keeps_without_weighting():
    np.testing.assert_array_equal(as_mask(jnp.array([0.0, 0.5])), [False, True])
    assert masked_sum(jnp.array([7.0, 2.0]), jnp.array([0.0, 0.5])) == 2


def test_gradient_is_finite_and_zero_where_masked():
    gradient = jax.grad(lambda x: masked_mean(x, MASK, axis=1).sum())(X)
    np.testing.assert_array_equal(gradient, np.where(MASK, 0.5, 0))


def test_fill_before_a_nonlinear_function_keeps_its_gradient_finite():
    gradient = jax.grad(lambda x: masked_sum(jnp.exp(masked_fill(x, MASK)), MASK))(X)
    np.testing.assert_allclose(gradient, np.where(MASK, np.exp(X), 0), rtol=1e-6)
    np.testing.assert_array_equal(masked_fill(X, MASK, 9.0)[2], [9, 9, 9])


def test_sums_run_in_float32_or_better(x64):
    ones = jnp.ones(1000, jnp.bfloat16)
    assert masked_sum(ones, ones).dtype == jnp.float32
    assert masked_sum(ones, ones) == 1000
    assert masked_sum(jnp.ones(3, jnp.float64), jnp.ones(3)).dtype == jnp.float64
    assert at_least_float32(jnp.array([1, 2])).dtype in (jnp.float32, jnp.float64)
