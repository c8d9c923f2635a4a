"""Programs of a run compiled ahead of time for a TPU topology, with few layers, scaled to all.

A program of L layers takes a + b L bytes, operations and traffic: two programs of few layers give a
and b, and so those of the whole model. Nothing is run, and no TPU is needed.
"""

import importlib.util
import logging
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.decode_state import bucket
from nrt_jax.errors import InputError
from nrt_jax.models.flops import Flops, Rows, forward_flops, training_flops
from nrt_jax.models.sharding import make_mesh
from nrt_jax.planning.compiled_text import Collective, collectives, matrix_flops
from nrt_jax.planning.memory import largest_positions
from nrt_jax.planning.programs import Lower, engine_programs, training_programs
from nrt_jax.planning.setting import Setting, Sizes
from nrt_jax.planning.traffic import decode_step_traffic, prefill_traffic, update_traffic
from nrt_jax.planning.work import Work
from nrt_jax.topologies import Topology

log = logging.getLogger(__name__)

FEW_LAYERS = (2, 4)
EFFORT = {"exec_time_optimization_effort": -1.0}
"""Half the compile time or less: the same products, but more bytes sent and more temporaries than
by default; docs/plan.md has both."""
DECODE_STEPS = 64
"""Of the compiled dispatch: more than other constants in the condition of its loop, which may end
early, so that the reader of compiled texts finds its passes."""
QUIET = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1"}
"""Nothing is asked of a machine that would tell what TPU this is."""


class Compiled(NamedTuple):
    """What one program takes on one device."""

    temporaries: float
    """Bytes besides its arguments and results."""
    flops: float
    """Of its matrix products; those of Pallas kernels, the attention's, are left out."""
    sent: Mapping[str, float]
    """Bytes over each mesh axis, or over several together, `data+fsdp`."""
    seconds: float
    """That compiling took."""


def described_devices(topology: Topology) -> list[Any]:
    """The devices of a TPU slice that need not be there.

    Raises InputError for GPUs, without libtpu, and for a slice that it does not know.
    """
    if topology.chip.platform != "tpu":
        raise InputError(
            f"--compile: {topology.name} has GPUs, whose programs are compiled on such a machine "
            "only; leave --compile out, and the plan is by formula"
        )
    os.environ |= QUIET
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "--compile: the package libtpu is not installed; pip install 'nrt-jax[tpu]', or leave "
            "--compile out, and the plan is by formula"
        )
    try:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology.name)
    except (ValueError, NotImplementedError, RuntimeError) as error:
        first_line = str(error).splitlines()[0]
        raise InputError(
            f"--compile: libtpu describes no {topology.name}: {first_line}; leave --compile out, "
            "and the plan is by formula"
        ) from None
    return list(described.devices)


def compile_programs(setting: Setting, layers: tuple[int, int] = FEW_LAYERS) -> dict[str, Compiled]:
    """The gradient of the largest micro-batch, and of nrt scoring, prefill and a decode step.

    They are compiled with few layers, and scaled to those of the model.
    """
    devices = described_devices(setting.topology)
    few = [dict(programs_of(setting, devices, count)) for count in layers]
    return {
        name: scaled(few[0][name], few[1][name], layers, setting.architecture.num_hidden_layers)
        for name in few[0]
    }


def expected(setting: Setting, amount: Work) -> dict[str, tuple[float, float]]:
    """Operations in products with weights, and bytes sent, of the same programs by formula."""
    a, config, shape = setting.architecture, setting.config, setting.shape
    devices, multiple = setting.topology.devices, config.model.vocab_multiple
    trained, constant = (
        tokens * setting.mesh["data"] * setting.mesh["fsdp"] * setting.mesh["context"]
        for tokens in largest_positions(setting)
    )
    scored = shape.packs * shape.rows * shape.row_tokens

    def products(flops: Flops) -> float:
        return (flops.weights + flops.head) / devices

    def constant_of(tokens: float) -> float:
        rows = Rows(round(tokens), 0, round(tokens))
        return products(forward_flops(a, rows, multiple)) if tokens else 0.0

    # Several updates share baselines that are scored before them.
    in_gradient = constant if amount.micro_baselines else 0.0
    one = amount._replace(
        updates=1,
        micro_batches=1,
        micro_tokens=trained,
        micro_baselines=in_gradient,
        micro_scored=float(scored),
        scored_tokens=trained + constant,
    )
    rows = Rows(round(trained), 0, scored)
    gradient = products(training_flops(a, rows, config.model.remat, multiple))
    found = {
        "gradient": (
            gradient + constant_of(in_gradient),
            sum(update_traffic(setting, one).values()),
        )
    }
    if config.method == "nrt":
        found |= _expected_of_engine(setting)
    return found


def _expected_of_engine(setting: Setting) -> dict[str, tuple[float, float]]:
    a, config, sizes = setting.architecture, setting.config, setting.rollout_mesh
    shards, multiple = sizes["data"] * sizes["fsdp"], config.model.vocab_multiple
    longest = bucket(config.data.max_prompt_tokens + 1)
    part = min(longest, bucket(config.rollout.prefill_chunk or longest))
    slots = -(-config.rollout.slots // shards)
    prefill, decode = (
        forward_flops(a, Rows(tokens, 0, scored), multiple)
        for tokens, scored in ((part, 1), (slots, slots))
    )
    return {
        "prefill": (
            (prefill.weights + prefill.head) / sizes["tensor"],
            sum(prefill_traffic(setting, part, 1).values()),
        ),
        "decode step": (
            (decode.weights + decode.head) / sizes["tensor"],
            sum(decode_step_traffic(setting, slots).values()),
        ),
    }


def scaled(less: Compiled, more: Compiled, layers: tuple[int, int], wanted: int) -> Compiled:
    """What a program of `wanted` layers takes, from two of other numbers of layers."""
    factor = (wanted - layers[0]) / (layers[1] - layers[0])

    def at(first: int | float, second: int | float) -> float:
        return float(first + factor * (second - first))

    axes = less.sent.keys() | more.sent.keys()
    return Compiled(
        temporaries=at(less.temporaries, more.temporaries),
        flops=at(less.flops, more.flops),
        sent={axis: at(less.sent.get(axis, 0.0), more.sent.get(axis, 0.0)) for axis in axes},
        seconds=less.seconds + more.seconds,
    )


def programs_of(
    setting: Setting, devices: list[Any], layers: int
) -> Iterator[tuple[str, Compiled]]:
    """Every program of the run with so many layers."""
    config = setting.config
    few = setting.architecture.model_copy(update={"num_hidden_layers": layers})
    mesh = make_mesh(MeshConfig(**dict(setting.mesh)), devices)
    training = training_programs(config, few, mesh, setting.shape)
    yield "gradient", read_program("gradient", training.add, mesh, setting.mesh)
    if training.score is not None:
        yield "scoring", read_program("scoring", training.score, mesh, setting.mesh)
    if config.method == "nrt":
        mesh = make_mesh(MeshConfig(**dict(setting.rollout_mesh)), devices)
        rollout = config.rollout.model_copy(update={"decode_steps": DECODE_STEPS})
        engine = engine_programs(config.model_copy(update={"rollout": rollout}), few, mesh)
        yield "prefill", read_program("prefill", engine.prefill, mesh, setting.rollout_mesh)
        decode = read_program("decode step", engine.decode, mesh, setting.rollout_mesh)
        sent = {axis: bytes_ / DECODE_STEPS for axis, bytes_ in decode.sent.items()}
        yield "decode step", decode._replace(flops=decode.flops / DECODE_STEPS, sent=sent)


def read_program(name: str, lower: Lower, mesh: Mesh, sizes: Sizes) -> Compiled:
    """Compile a program, and read off what it takes."""
    start = time.perf_counter()
    program = lower().compile(EFFORT)
    seconds = time.perf_counter() - start
    text, memory = program.as_text(), program.memory_analysis()
    assert text is not None
    assert memory is not None
    log.info("compiled %s in %.0f s", name, seconds)
    sent: dict[str, float] = {}
    for one in collectives(text, mesh.size):
        # A group of one device sends nothing.
        if axes := axes_of(one, sizes):
            sent[axes] = sent.get(axes, 0.0) + one.total_bytes
    return Compiled(float(memory.temp_size_in_bytes), matrix_flops(text), sent, seconds)


def axes_of(collective: Collective, sizes: Sizes) -> str:
    """The mesh axes along which the devices of a collective differ, joined by +."""
    shape = tuple(sizes.values())
    group = collective.group or tuple(range(int(np.prod(shape))))
    places = np.array(np.unravel_index(np.array(group), shape))
    differs = (places != places[:, :1]).any(axis=1)
    return "+".join(axis for axis, one in zip(sizes, differs, strict=True) if one)
