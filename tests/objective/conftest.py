"""Fixtures of the objective's tests."""

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture
def x64() -> Iterator[None]:
    """Float64 for the length of a test: finite differences and exact sums need it."""
    with jax.enable_x64(True):
        yield
