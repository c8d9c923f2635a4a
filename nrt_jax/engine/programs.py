"""Compiled programs: one for each combination of shapes, and changes of a state's shape."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import Mesh

from nrt_jax.engine.decode_state import DecodeState, state_shardings


class Programs:
    """Compiles each program once for every combination of shapes, and counts them."""

    def __init__(self) -> None:
        self._programs: dict[tuple, Callable] = {}
        self.compiled: Counter[str] = Counter()
        """Programs by kind."""

    def get(self, kind: str, *shapes: Any, make: Callable[[], Callable]) -> Callable:
        """The program of this kind for these shapes; `make` is called where there is none."""
        if (kind, *shapes) not in self._programs:
            self._programs[kind, *shapes] = make()
            self.compiled[kind] += 1
        return self._programs[kind, *shapes]


def layer_by_layer(
    mesh: Mesh,
    state: DecodeState,
    change_layer: Callable[..., Any],
    change_rest: Callable[..., DecodeState],
    *args: Any,
) -> Callable[..., DecodeState]:
    """A program that changes the shapes of a state and consumes it.

    It runs `change_layer(layer, *args)` for one layer after the other, so that at most one layer's
    cache is in memory twice, and `change_rest(state, *args)` for everything else. `state` and
    `args` give the shapes.
    """
    rest = jax.eval_shape(change_rest, state._replace(layers=()), *args)
    layer = jax.eval_shape(change_layer, state.layers[0], *args)
    shardings = state_shardings(mesh, rest._replace(layers=(layer,)))
    layer_program = jax.jit(change_layer, out_shardings=shardings.layers[0])
    rest_program = jax.jit(change_rest, out_shardings=shardings._replace(layers=()))

    def run(state: DecodeState, *args: Any) -> DecodeState:
        layers = []
        for old in state.layers:
            layers.append(layer_program(old, *args))
            _delete(old, kept=layers[-1])
        return rest_program(state._replace(layers=()), *args)._replace(layers=tuple(layers))

    return run


def _delete(arrays: Any, *, kept: Any) -> None:
    """Free the memory of `arrays`, except where a program returned an argument unchanged."""
    kept_ids = {id(leaf) for leaf in jax.tree.leaves(kept)}
    for leaf in jax.tree.leaves(arrays):
        if id(leaf) not in kept_ids:
            leaf.delete()
