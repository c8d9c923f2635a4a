"""Compile a training step's programs for a TPU topology, and print what they take as one JSON line.

    python -m tests.training.tpu_compile llama-8b fsdp=4,tensor=2

For a v5p of eight chips; needs libtpu and no TPU. Bytes and FLOPs are those of one chip. XLA counts
the FLOPs of a loop's body once, such as those of the scan over the layers, and so far too few.
"""

import json
import sys
import time
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from nrt_jax.checkpoints.train_state import TrainState, abstract_state, state_shardings
from nrt_jax.config.architecture import Architecture, Llama3Scaling
from nrt_jax.config.mesh import parse_mesh
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.optimizer import OptimizerConfig
from nrt_jax.models.attention_backend import choose_backend
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params, batch_sharding, make_mesh, replicated
from nrt_jax.training.batch import NrtBatch, nrt_batch
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.frozen_logprobs import frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Plan, Shape
from nrt_jax.training.update import Total, Update, UpdateRule, zero_total
from tests.engine.tpu_compile import SHAPES, bytes_per_chip
from tests.training import worlds

TRACES = 8
SHAPE = Shape(
    packs=8,
    groups=1,
    prompt_tokens=1024,
    rows=4,
    row_tokens=2048,
    baseline_tokens=256,
    completion_tokens=1024,
    answer_tokens=256,
)
"""Groups of a prompt of 1,000 tokens, an answer of 200 and eight traces of some 700."""
CHUNK_TOKENS = 512
KERNELS = ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")


class Programs(NamedTuple):
    """A training step of an architecture on a mesh, in shapes, and its programs not compiled."""

    params: Any
    state: TrainState
    score: jax.stages.Lowered
    add: jax.stages.Lowered
    apply: jax.stages.Lowered


def main(shape: str, mesh_axes: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    programs = lowered(shape, make_mesh(parse_mesh(mesh_axes), topology.devices))
    report = {
        "parameter_bytes": bytes_per_chip(programs.params),
        "moment_bytes": bytes_per_chip(programs.state.opt_state),
    }
    report |= {name: compiled(getattr(programs, name)) for name in ("score", "add", "apply")}
    print(json.dumps(report))


def lowered(shape: str, mesh: Mesh) -> Programs:
    """Scoring, the gradient of a micro-batch with its baselines, and the update."""
    a = Architecture(**SHAPES[shape], head_dim=128, rope_theta=5e5, rope_scaling=Llama3Scaling())
    decoder = abstract_decoder(
        a,
        dtype=jnp.bfloat16,
        remat="full",
        attention=choose_backend("auto", "tpu", a, jnp.bfloat16, 4096),
        mesh=mesh,
    )
    settings = NrtSettings(
        nnx.graphdef(decoder), ObjectiveConfig(old_logprobs="recompute"), 2, 3, 1.0, CHUNK_TOKENS
    )
    params = abstract_params(mesh, decoder, jnp.float32)
    optimizer = make_optimizer(OptimizerConfig(), updates=100)
    shardings = state_shardings(optimizer, params, mesh)
    state = abstract_state(optimizer, params, shardings)

    def loss_fn(params: Any, batch: Any) -> Any:
        sequences = SHAPE.packs * SHAPE.groups * TRACES
        return nrt_loss(params, *batch, sequences=sequences, settings=settings)

    batch = abstract_batch(mesh)
    scorer = jax.jit(frozen_logprobs_fn(settings, several_updates=True, reference=None))
    scores = jax.tree.map(
        lambda leaf: leaf.update(sharding=batch_sharding(mesh)),
        jax.eval_shape(scorer, params, batch),
    )._replace(log_c_base_PA=None)
    rule = UpdateRule(optimizer, shardings)
    update = Update(loss_fn, rule)
    total = abstract_total(loss_fn, params, (batch, scores), mesh)
    return Programs(
        params,
        state,
        score=scorer.lower(params, batch),
        add=update.add.lower(params, total, (batch, scores)),
        apply=rule.apply.lower(state, total.gradient),
    )


def abstract_batch(mesh: Mesh) -> NrtBatch:
    """A micro-batch of SHAPE, in shapes."""
    groups, sharding = worlds.random_groups(1, TRACES), batch_sharding(mesh)
    batch = nrt_batch(groups, Plan(SHAPE, packs=[]), think_start=2, think_end=3)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def abstract_total(loss_fn: Any, params: Any, batch: Any, mesh: Mesh) -> Total:
    """The sums over no micro-batch, in shapes."""
    total = jax.eval_shape(partial(zero_total, loss_fn), params, batch)
    everywhere = replicated(mesh)
    gradient = jax.tree.map(lambda g, p: g.update(sharding=p.sharding), total.gradient, params)
    metrics = jax.tree.map(lambda metric: metric.update(sharding=everywhere), total.metrics)
    return Total(gradient, metrics)


def compiled(program: jax.stages.Lowered) -> dict[str, Any]:
    """What a program takes."""
    start = time.perf_counter()
    executable = program.compile()
    seconds = time.perf_counter() - start
    memory, costs = executable.memory_analysis(), executable.cost_analysis()
    text = executable.as_text()
    assert memory is not None
    assert costs is not None
    assert text is not None
    return {
        "compile_seconds": round(seconds, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "flops": costs["flops"],
        "kernels": [kernel for kernel in KERNELS if kernel in text],
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
