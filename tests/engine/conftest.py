"""Traces that several files compare with."""

import pytest

from nrt_jax.types import Trace
from tests.engine.toy import MIXED, engine, params, sample


@pytest.fixture(scope="module")
def mixed_traces() -> list[tuple[Trace, ...]]:
    return sample(engine(), params(), MIXED)
