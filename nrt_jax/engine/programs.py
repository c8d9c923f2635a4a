"""Compiled programs: one for each combination of shapes, and changes of a state's shape."""

import threading
from collections import Counter
from collections.abc import Callable, Hashable
from functools import wraps
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from nrt_jax.engine.decode import Decoding
from nrt_jax.engine.decode_state import (
    DecodeState,
    SlotMoves,
    move_slots,
    resize_slot_map,
    state_shardings,
)
from nrt_jax.engine.kv_cache import Sizes, shards_of
from nrt_jax.models.sharding import place, replicated

_LAUNCH = threading.Lock()


def launched_in_order(program: Callable, mesh: Mesh) -> Callable:
    """The program, launched by one thread at a time if its mesh has several devices.

    A launch puts a program into the queue of each device. Were two threads to launch at once, one
    device could get program 1 first and another device program 2. The collectives of both would
    then wait forever, since a collective ends when every device has reached it. The lock is held
    for the launch, not until the results are there, and for the compilation at the first call.
    """
    if mesh.size == 1:
        return program

    @wraps(program)
    def launch(*args: Any) -> Any:
        with _LAUNCH:
            return program(*args)

    return launch


def with_decoder(definition: nnx.GraphDef, function: Callable, **fixed: Any) -> Callable:
    """`function(decoder, ...)` as a function of the decoder's weights, with the same name."""

    def with_params(params: Any, *args: Any) -> Any:
        return function(nnx.merge(definition, params), *args, **fixed)

    # By which compilations are counted.
    with_params.__name__ = function.__name__
    return with_params


class Programs:
    """Compiles each program once for every combination of shapes, and counts them.

    Several threads may call the programs of one mesh, even of several engines. Engines that share
    an object share the programs for equal settings and shapes.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh
        self._programs: dict[tuple, Callable] = {}
        self.compiled: Counter[str] = Counter()
        """Programs by kind."""
        self._engines: dict[Any, int] = {}
        self._constants: dict[Hashable, Any] = {}

    def engine_number(self, settings: Hashable) -> int:
        """A number for the settings that an engine's programs are compiled for, short as a key."""
        return self._engines.setdefault(settings, len(self._engines))

    def get(self, kind: str, *shapes: Any, make: Callable[[], Callable]) -> Callable:
        """The program of this kind for these shapes; `make` is called where there is none."""
        if (kind, *shapes) not in self._programs:
            self._programs[kind, *shapes] = launched_in_order(make(), self._mesh)
            self.compiled[kind] += 1
        return self._programs[kind, *shapes]

    def constant(self, name: Hashable, make: Callable[[], Any]) -> Any:
        """Host arrays that many dispatches take, copied to all devices once."""
        if name not in self._constants:
            self._constants[name] = place(make(), replicated(self._mesh))
        return self._constants[name]


def init_program(mesh: Mesh, empty: Callable[[], DecodeState]) -> Callable[[], DecodeState]:
    """Makes an empty state on the devices."""
    return jax.jit(empty, out_shardings=state_shardings(mesh, jax.eval_shape(empty)))


def insert_program(
    decoding: Decoding, insert: Callable, state: DecodeState, prompts: list[Any]
) -> Callable:
    """Starts sequences in a state without its layers, of whose caches `prompts` are the prompts'.

    It consumes both.
    """

    def insert_samples(*args: Any) -> Any:
        return insert(*args, decoding=decoding)

    shardings = jax.tree.map(lambda x: x.sharding, (state, prompts))
    return jax.jit(insert_samples, donate_argnums=(1, 2), out_shardings=shardings)


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


def resize_program(mesh: Mesh, cache: Any, state: DecodeState, sizes: Sizes) -> Callable:
    """Gives the caches other sizes."""
    shards = shards_of(mesh)
    return layer_by_layer(
        mesh,
        state,
        lambda layer: cache.resize(layer, sizes),
        lambda rest: rest._replace(slot_map=resize_slot_map(rest.slot_map, sizes, shards)),
    )


def move_program(mesh: Mesh, cache: Any, state: DecodeState, moves: SlotMoves) -> Callable:
    """Moves the sequences to other slots."""
    shards = shards_of(mesh)
    return layer_by_layer(
        mesh,
        state,
        lambda layer, moves: cache.move_slots(
            layer, moves.from_B.reshape(shards, -1), moves.from_P.reshape(shards, -1)
        ),
        lambda rest, moves: move_slots(rest, moves, shards),
        moves,
    )


def _delete(arrays: Any, *, kept: Any) -> None:
    """Free the memory of `arrays`, except where a program returned an argument unchanged."""
    kept_ids = {id(leaf) for leaf in jax.tree.leaves(kept)}
    for leaf in jax.tree.leaves(arrays):
        if id(leaf) not in kept_ids:
            leaf.delete()
