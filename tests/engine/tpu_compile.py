"""Compile an engine's programs for a TPU topology, and print what they take as one JSON line.

    python tests/engine/tpu_compile.py llama-8b data=2,tensor=4

For a v5p of eight chips; needs libtpu and no TPU. Bytes are those of one chip.
"""

import json
import math
import sys
import time
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from nrt_jax.config.mesh import parse_mesh
from nrt_jax.config.run import RunConfig
from nrt_jax.models.sharding import make_mesh
from nrt_jax.planning.programs import EnginePrograms, engine_programs

SHAPES = {
    "small": {
        "vocab_size": 512,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "llama-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}
PROMPT_TOKENS = 1024
NEW_TOKENS = 1024
SLOTS = 64
COPIES = 8
STEPS = 16


def main(shape: str, mesh_axes: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    programs = lowered(shape, make_mesh(parse_mesh(mesh_axes), topology.devices))
    decode = programs.decode()
    report = {
        "form": type(programs.engine._decoding.cache).__name__,
        "kernel": "ragged_paged_attention_kernel" in decode.as_text(),
        "weight_bytes": bytes_per_chip(programs.params),
        "cache_bytes": bytes_per_chip(programs.state.layers),
        "prefill": costs(programs.prefill()),
        "decode": costs(decode),
    }
    print(json.dumps(report))


def run_config(shape: str) -> RunConfig:
    """A run of this shape, in bfloat16 with all of a layer recomputed."""
    architecture = {"head_dim": 128, "rope_theta": 5e5, "rope_scaling": {}} | SHAPES[shape]
    return RunConfig.model_validate(
        {
            "model": {"architecture": architecture, "dtype": "bfloat16", "remat": "full"},
            # An engine's prompt has t_start too.
            "data": {"path": "x", "tokenizer": "x", "max_prompt_tokens": PROMPT_TOKENS - 1},
            "objective": {"old_logprobs": "recompute"},
            "rollout": {
                "traces_per_prompt": COPIES,
                "max_trace_tokens": NEW_TOKENS,
                "max_response_tokens": 8192,
                "slots": SLOTS,
                "decode_steps": STEPS,
                "prefill_chunk": None,
            },
        }
    )


def lowered(shape: str, mesh: Mesh) -> EnginePrograms:
    """The programs of an engine of this shape on a mesh."""
    config = run_config(shape)
    assert config.model.architecture is not None
    return engine_programs(config, config.model.architecture, mesh)


def bytes_per_chip(arrays: Any) -> int:
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * np.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(arrays)
    )


def costs(lowered: jax.stages.Lowered) -> dict[str, float]:
    start = time.perf_counter()
    memory = lowered.compile().memory_analysis()
    return {
        "compile_seconds": round(time.perf_counter() - start, 1),
        "argument_bytes": memory.argument_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
