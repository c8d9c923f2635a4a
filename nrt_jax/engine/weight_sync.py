"""The engine's weights after an update: the same arrays where they agree, else one transfer."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax


class EngineWeights(NamedTuple):
    """Weights for an engine; all samples of a step are drawn with one of these."""

    params: Any
    version: int
    """Step whose update made them; 0 before the first update."""
    metrics: Mapping[str, float]
    """`weights/seconds` of the transfer and `weights/bytes` written by it, where replicas of a
    weight count once."""


class WeightTransfer:
    """Transfers training weights to the dtypes and shardings of `target`.

    Where these already agree, the result is the same arrays. On the same devices it is one jitted
    program; for other devices the weights are cast where they are and then copied. With
    `outlives_update` the result shares no array with the training's, which an update consumes.
    """

    def __init__(self, target: Any, *, outlives_update: bool = False):
        self._target, self._outlives_update = target, outlives_update
        self._shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
        self._reshard_and_cast = jax.jit(self._cast, out_shardings=self._shardings)
        self._cast_in_place = jax.jit(self._cast)

    def __call__(self, params: Any, version: int) -> EngineWeights:
        """The weights of one version, ready to be used."""
        start = time.perf_counter()
        moved = self._moved(params)
        jax.block_until_ready(moved)
        size = 0 if moved is params else sum(leaf.nbytes for leaf in jax.tree.leaves(moved))
        seconds = time.perf_counter() - start
        metrics = {"weights/seconds": seconds, "weights/bytes": float(size)}
        return EngineWeights(moved, version, metrics)

    def _moved(self, params: Any) -> Any:
        if not self._same_devices(params):
            cast = params if self._agree(params, "dtype") else self._cast_in_place(params)
            return jax.device_put(cast, self._shardings)
        agree = self._agree(params, "dtype") and self._agree(params, "sharding")
        # The result of jit with out_shardings never shares a buffer with an argument.
        return params if agree and not self._outlives_update else self._reshard_and_cast(params)

    def _cast(self, params: Any) -> Any:
        return jax.tree.map(lambda x, leaf: x.astype(leaf.dtype), params, self._target)

    def _agree(self, params: Any, attribute: str) -> bool:
        agree = jax.tree.map(
            lambda x, leaf: getattr(x, attribute) == getattr(leaf, attribute), params, self._target
        )
        return all(jax.tree.leaves(agree))

    def _same_devices(self, params: Any) -> bool:
        mine, theirs = (jax.tree.leaves(tree)[0].sharding for tree in (self._target, params))
        return mine.device_set == theirs.device_set
