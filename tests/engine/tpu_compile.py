"""Compile an engine's programs for a TPU topology, and print what they take as one JSON line.

    python tests/engine/tpu_compile.py llama-8b data=2,tensor=4

For a v5p of eight chips; needs libtpu and no TPU. Bytes are those of one chip.
"""

import json
import math
import sys
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh

from nrt_jax.config.architecture import Architecture, Llama3Scaling
from nrt_jax.config.mesh import parse_mesh
from nrt_jax.engine.decode_state import state_shardings
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params, make_mesh

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


class Programs(NamedTuple):
    """An engine, its weights and its state in shapes, and its programs not compiled."""

    engine: Engine
    params: Any
    state: Any
    prefill: jax.stages.Lowered
    """Of a prompt in each shard."""
    decode: jax.stages.Lowered
    """Of STEPS steps."""


def main(shape: str, mesh_axes: str) -> None:
    topology = topologies.get_topology_desc(platform="tpu", topology_name="v5p:2x2x2")
    programs = lowered(shape, make_mesh(parse_mesh(mesh_axes), topology.devices))
    report = {
        "form": type(programs.engine._decoding.cache).__name__,
        "kernel": "ragged_paged_attention_kernel" in programs.decode.as_text(),
        "weight_bytes": bytes_per_chip(programs.params),
        "cache_bytes": bytes_per_chip(programs.state.layers),
        "prefill": costs(programs.prefill),
        "decode": costs(programs.decode),
    }
    print(json.dumps(report))


def lowered(shape: str, mesh: Mesh) -> Programs:
    """The programs of an engine of this shape on a mesh."""
    a = Architecture(**SHAPES[shape], head_dim=128, rope_theta=5e5, rope_scaling=Llama3Scaling())
    decoder = abstract_decoder(a, dtype=jnp.bfloat16)
    params = abstract_params(mesh, decoder, jnp.bfloat16)
    engine = Engine(
        nnx.split(decoder)[0],
        a,
        mesh,
        slots=SLOTS,
        max_prompt_tokens=PROMPT_TOKENS,
        max_new_tokens=NEW_TOKENS,
        stop_ids=frozenset({0}),
        dtype=jnp.bfloat16,
        num_samples=COPIES,
    )
    # There are no devices to copy them to.
    engine.programs.constant = lambda name, make: make()
    state = abstract_state(engine, mesh)
    tokens_RS = jax.ShapeDtypeStruct((engine.shards, PROMPT_TOKENS), jnp.int32)
    length_R = jax.ShapeDtypeStruct((engine.shards,), jnp.int32)
    prefill = jax.jit(lambda params, *prompts: engine.prefill_rows(params, None, *prompts)).lower(
        params, tokens_RS, length_R
    )
    decode = jax.jit(engine.generate, static_argnums=(2, 3), donate_argnums=1).lower(
        params, state, STEPS, COPIES
    )
    return Programs(engine, params, state, prefill, decode)


def abstract_state(engine: Engine, mesh: Mesh) -> Any:
    """A state with room for the longest of all, in shapes."""
    sizes = Sizes(SLOTS // COPIES, PROMPT_TOKENS, NEW_TOKENS)
    shapes = jax.eval_shape(lambda: engine.init_decode_state(sizes))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        state_shardings(mesh, shapes),
    )


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
