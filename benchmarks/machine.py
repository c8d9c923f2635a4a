"""What the machine can do: its matrix peak and its memory bandwidth, measured."""

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike


class Machine(NamedTuple):
    """Best rates seen, of all cores or of one accelerator."""

    flops: float
    """Multiplications and additions a second of a large matrix product."""
    bandwidth: float
    """Bytes a second, read and written, of arrays too large for the caches."""


def measure_machine(dtype: DTypeLike = jnp.float32, *, tiny: bool = False) -> Machine:
    """Time a matrix product of 2,048 (16,384 on an accelerator), and adding 1 to 256 MiB.

    With `tiny` both are too small for their rates to mean anything.
    """
    n = 2048 if jax.default_backend() == "cpu" else 16384
    square = jnp.ones((128, 128) if tiny else (n, n), dtype)
    product = jax.jit(lambda x: x @ x)
    values = jnp.ones(2**10 if tiny else 2**26, jnp.float32)
    add = jax.jit(lambda x: x + 1)
    moved = 2 * values.nbytes
    return Machine(
        2 * len(square) ** 3 / best_seconds(product, square), moved / best_seconds(add, values)
    )


def best_seconds(call: Callable[..., Any], *args: Any, repeats: int = 5) -> float:
    """Shortest wall time of several calls after one that compiles."""
    jax.block_until_ready(call(*args))
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds)
