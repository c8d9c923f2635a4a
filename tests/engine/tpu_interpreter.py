"""Pallas' interpreter of TPU kernels, with what the ragged paged attention kernel asks of it.

The interpreter of jax 0.10.2 reads buffers by slices alone; the kernel also reads them in another
shape or dtype, and its masked stores meet a check that takes every dim for the first one.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax._src.state.types import BitcastTransform, ReshapeTransform
from jax.experimental.pallas import tpu as pltpu

_get, _swap = interpreter.get, interpreter.swap
_VIEWS = (ReshapeTransform, BitcastTransform)


@contextmanager
def tpu_interpreter() -> Iterator[None]:
    """Run TPU kernels on the CPU. Programs are cached: trace them in here for the first time."""
    interpreter.get, interpreter.swap = _get_views, _swap_by_reading
    try:
        with pltpu.force_tpu_interpret_mode(), jax.numpy_rank_promotion("allow"):
            yield
    finally:
        interpreter.get, interpreter.swap = _get, _swap


@functools.wraps(_get)
def _get_views(token: Any, *args: Any, **options: Any) -> tuple[Any, np.ndarray]:
    (*buffer, transforms), rest = args[:5], args[5:]
    slices = next((i for i, t in enumerate(transforms) if isinstance(t, _VIEWS)), len(transforms))
    token, x = _get(token, *buffer, transforms[:slices], *rest, **options)
    for transform in transforms[slices:]:
        x = _view(x, transform)
    return token, x


def _view(x: np.ndarray, transform: Any) -> np.ndarray:
    if isinstance(transform, ReshapeTransform):
        return x.reshape(transform.shape)
    if isinstance(transform, BitcastTransform):
        # A word of the TPU holds neighbours of the dim before the last.
        packed = np.dtype(transform.dtype).itemsize // x.dtype.itemsize
        words = x.reshape(*x.shape[:-2], -1, packed, x.shape[-1])
        return np.ascontiguousarray(np.moveaxis(words, -2, -1)).view(transform.dtype)[..., 0]
    indices = jax.tree.map(int, transform).indices
    return x[tuple(i if isinstance(i, int) else _slice(i) for i in indices)]


def _slice(index: Any) -> slice:
    return slice(index.start, index.start + index.size * index.stride, index.stride)


@functools.wraps(_swap)
def _swap_by_reading(token: Any, *args: Any, **options: Any) -> tuple[Any, np.ndarray]:
    *place, value, mask = args
    if mask is not None:
        _, old = _get_views(token, *place, **options)
        value = np.where(np.asarray(mask), np.asarray(value), old)
    return _swap(token, *place, value, None, **options)
