"""No program of training holds an array of tokens by vocabulary, or moves a weight in every chunk.

Read off the compiled programs, shape by shape. The vocabulary's share of a device is a prime that
no other size has as a factor: an array with that dim, merged with others or not, is one whose
number of elements is a multiple of it. The weights [V, D] are among them, D being small.
"""

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from nrt_jax.checkpoints.train_state import state_shardings
from nrt_jax.config.mesh import parse_mesh
from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params, batch_sharding, make_mesh
from nrt_jax.planning.compiled_text import Collective, collectives
from nrt_jax.training.batch import nrt_batch, sft_batch
from nrt_jax.training.frozen_logprobs import frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Plan, Shape
from nrt_jax.training.sft import sft_loss_of_rows
from nrt_jax.training.update import LossFn, Total, Update, UpdateRule, zero_total
from tests.training import worlds

CHUNK = 32
"""Tokens of a device whose logits may lie there at a time."""
NO_GROUPS = Plan(
    Shape(
        packs=4,
        groups=2,
        prompt_tokens=32,
        rows=4,
        row_tokens=64,
        baseline_tokens=32,
        completion_tokens=16,
        answer_tokens=8,
    ),
    packs=[],
)
"""Its batch is all padding: a program knows the shapes alone."""
ARCHITECTURE = worlds.ARCHITECTURE.model_copy(update={"vocab_size": 1009, "hidden_size": 8})
OBJECTIVE = {
    "reward_policy": "sampling",
    "old_logprobs": "recompute",
    "kl_coefficient": 0.1,
    "entropy_coefficient": 0.1,
}
COMPILER = {"xla_backend_optimization_level": 0}
"""Of the machine code, which nobody runs: it takes most of the time."""
SHAPES = re.compile(r"\b(?:pred|bf16|[fsu]\d+)\[([\d,]+)\]")


class World(NamedTuple):
    """A mesh, and the decoder on it."""

    mesh: Mesh
    definition: nnx.GraphDef
    params: Any
    vocabulary: int
    """Of one device, padded."""

    @property
    def shards(self) -> int:
        """Devices that rows are spread over."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]


def make_world(mesh_axes: str, vocab_multiple: int) -> World:
    sizes = parse_mesh(mesh_axes)
    mesh = make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
    decoder = abstract_decoder(ARCHITECTURE, remat="full", vocab_multiple=vocab_multiple, mesh=mesh)
    params = abstract_params(mesh, decoder)
    vocabulary = params["embedding"].shape[0] // sizes.tensor
    assert all(vocabulary % factor for factor in range(2, 32))
    return World(mesh, nnx.graphdef(decoder), params, vocabulary)


def add_program(world: World, loss_fn: LossFn, batch: Any) -> jax.stages.Compiled:
    """What a training step runs a micro-batch."""
    optimizer = make_optimizer(OptimizerConfig(), updates=1)
    shardings = state_shardings(optimizer, world.params, world.mesh)
    metrics = jax.eval_shape(partial(zero_total, loss_fn), world.params, batch).metrics
    total = Total(world.params, metrics)
    add = Update(loss_fn, UpdateRule(optimizer, shardings)).add
    return add.lower(world.params, total, batch).compile(COMPILER)


def on_mesh(world: World, batch: Any) -> Any:
    """Shapes of a batch's arrays, whose first dims are split pack by pack."""
    sharding = batch_sharding(world.mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def packed_batch(world: World) -> Any:
    groups = worlds.random_groups(1, 4)
    return on_mesh(world, nrt_batch(groups, NO_GROUPS, think_start=2, think_end=3))


def scorer_of(world: World, chunk: int) -> Callable[[Any, Any, Any], Any]:
    settings = worlds.settings(world.definition, chunk=chunk, **OBJECTIVE)

    def score(params: Any, reference: Any, batch: Any) -> Any:
        return frozen_logprobs_fn(settings, several_updates=True, reference=reference)(
            params, batch
        )

    return score


def nrt(world: World, chunk: int) -> tuple[jax.stages.Compiled, int]:
    """The program, and the tokens of its rows."""
    batch = packed_batch(world)
    settings = worlds.settings(world.definition, chunk=chunk, **OBJECTIVE)
    scores = jax.eval_shape(scorer_of(world, chunk), world.params, world.params, batch)
    # The baselines run with the others.
    scores = scores._replace(log_c_base_PA=None)

    def loss_fn(params: Any, inputs: Any) -> Any:
        return nrt_loss(params, *inputs, sequences=32, settings=settings)

    program = add_program(world, loss_fn, (batch, on_mesh(world, scores)))
    return program, batch.completions.inputs_BW.size


def scoring(world: World, chunk: int) -> tuple[jax.stages.Compiled, int]:
    batch = packed_batch(world)
    scorer = jax.jit(scorer_of(world, chunk))
    program = scorer.lower(world.params, world.params, batch).compile(COMPILER)
    return program, batch.completions.inputs_BW.size


def sft(world: World, chunk: int) -> tuple[jax.stages.Compiled, int]:
    batch = on_mesh(world, sft_batch([], NO_GROUPS))

    def loss_fn(params: Any, inputs: Any) -> Any:
        return sft_loss_of_rows(params, *inputs, world.definition, chunk)

    program = add_program(world, loss_fn, (batch, np.float32(64)))
    return program, batch.inputs_BW.size


def most_tokens(program: jax.stages.Compiled, vocabulary: int) -> int:
    """Of the arrays with a dim of the vocabulary: the elements of the largest, over that dim."""
    text = program.as_text()
    assert text is not None
    sizes = {math.prod(map(int, dims.split(","))) for dims in SHAPES.findall(text)}
    return max(size // vocabulary for size in sizes if size % vocabulary == 0)


SHARDED = ("data=2,fsdp=2,tensor=2", 1018)


@cache
def in_chunks(make_program: Callable, mesh_axes: str, vocab_multiple: int) -> tuple:
    """The world, its program, and the tokens of that."""
    world = make_world(mesh_axes, vocab_multiple)
    return world, *make_program(world, CHUNK)


@pytest.mark.parametrize("make_program", [nrt, scoring, sft])
@pytest.mark.parametrize(("mesh_axes", "vocab_multiple"), [("data=1", 1), SHARDED])
def test_no_array_has_the_vocabulary_of_more_tokens_than_a_chunk(
    make_program, mesh_axes, vocab_multiple
):
    world, program, tokens = in_chunks(make_program, mesh_axes, vocab_multiple)
    tokens //= world.shards
    assert tokens >= 4 * CHUNK
    together = most_tokens(program, world.vocabulary)
    assert together <= CHUNK
    # The search finds the array where the tokens are not cut into chunks.
    program, _ = make_program(world, 10**6)
    together = most_tokens(program, world.vocabulary)
    assert together >= tokens


def sharded_collectives(make_program: Callable) -> tuple[list[Collective], list[Collective]]:
    """Of a sharded program: those of an array with a dim of the vocabulary, and the others."""
    world, program, _ = in_chunks(make_program, *SHARDED)
    found = collectives(program.as_text(), world.mesh.size)
    of_vocabulary = [
        c for c in found if any(math.prod(dims) % world.vocabulary == 0 for _, dims in c.shapes)
    ]
    return of_vocabulary, [c for c in found if c not in of_vocabulary]


# Forward and backward may share a gathered head.
TRAINED = {"all-gather": 2, "all-to-all": 1, "all-reduce": 2}


@pytest.mark.parametrize(
    ("make_program", "counts"), [(nrt, TRAINED), (scoring, {"all-gather": 4}), (sft, TRAINED)]
)
def test_weights_of_the_vocabulary_move_once_per_pass(make_program, counts):
    """Embedding and head are gathered, twice in scoring, which runs the reference too; the head's
    gradient is exchanged over fsdp and summed over data, and the embedding's is summed."""
    of_vocabulary, _ = sharded_collectives(make_program)
    assert not [c for c in of_vocabulary if c.loops]
    assert Counter(c.kind for c in of_vocabulary) == counts


@pytest.mark.parametrize(
    ("make_program", "weights", "sums"), [(nrt, 14, 9), (scoring, 14, 5), (sft, 14, 8)]
)
def test_collectives_of_a_layer_do_not_grow_in_number(make_program, weights, sums):
    """Seven weights are gathered per pass, of which scoring has two, forward under two policies.

    Baselines, which run apart from other rows, share what is gathered, and have a sum over `tensor`
    of their own.
    """
    _, others = sharded_collectives(make_program)
    layers = ARCHITECTURE.num_hidden_layers
    counts = Counter(c.kind for c in others if c.loops == (layers,))
    assert counts == {"all-gather": weights, "all-reduce": sums}
