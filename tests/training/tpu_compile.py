"""Compile a training step's programs for a TPU topology, and print what they take as one JSON line.

    python -m tests.training.tpu_compile llama-8b fsdp=4,tensor=2

For a v5p of eight chips; needs libtpu and no TPU. Bytes and FLOPs are those of one chip. XLA counts
the FLOPs of a loop's body once, such as those of the scan over the layers, and so far too few.
"""

import json
import sys
import time
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from nrt_jax.config.mesh import parse_mesh
from nrt_jax.config.train import TrainConfig
from nrt_jax.models.sharding import make_mesh
from nrt_jax.planning.programs import TrainingPrograms, training_programs
from nrt_jax.training.packing import Shape
from tests.engine.tpu_compile import bytes_per_chip, run_config

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
KERNELS = ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv")


def main(shape: str, mesh_axes: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    programs = lowered(shape, make_mesh(parse_mesh(mesh_axes), topology.devices))
    report = {
        "parameter_bytes": bytes_per_chip(programs.params),
        "moment_bytes": bytes_per_chip(programs.state.opt_state),
    }
    report |= {name: compiled(getattr(programs, name)()) for name in ("score", "add", "apply")}
    print(json.dumps(report))


def lowered(shape: str, mesh: Mesh) -> TrainingPrograms:
    """Scoring, the gradient of a micro-batch with its baselines, and the update."""
    several = run_config(shape)
    assert several.model.architecture is not None
    # An update alone in its step runs the baselines with the gradient.
    one = several.model_copy(update={"train": TrainConfig(batch_prompts=64)})
    programs = [
        training_programs(config, several.model.architecture, mesh, SHAPE)
        for config in (one, several)
    ]
    return programs[0]._replace(score=programs[1].score)


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
