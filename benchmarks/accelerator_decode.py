"""Part c of accelerator.py: decoding with a 1B-shaped model, against the memory's bandwidth."""

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks.machine import Machine
from benchmarks.shapes import LLAMA_1B, start_traces
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.sharding import make_mesh

SAMPLES = 8
STEPS = 16
"""Tokens per slot of a dispatch."""
GOAL = 0.6
"""Share of the bandwidth."""


class Sizes(NamedTuple):
    """The model, and what is decoded."""

    architecture: Architecture
    slots: tuple[int, ...]
    prompt_tokens: int
    new_tokens: int


FULL = Sizes(LLAMA_1B, (64, 256), prompt_tokens=512, new_tokens=256)
TINY = Sizes(
    Architecture(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        tie_word_embeddings=True,
    ),
    (8, 16),
    prompt_tokens=32,
    new_tokens=48,
)


def measure(sizes: Sizes, machine: Machine) -> dict[str, Any]:
    """A row for each number of slots, with XLA's attention and with the platform's kernel."""
    definition, state = nnx.split(Decoder(sizes.architecture, nnx.Rngs(0), dtype=jnp.bfloat16))
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), nnx.to_pure_dict(state))
    rows = []
    for slots in sizes.slots:
        for attention in ("xla", "pallas"):
            row: dict[str, Any] = {"slots": slots, "attention": attention}
            try:
                engine = _engine(sizes, definition, slots, attention)
            except InputError as error:
                rows.append(row | {"why": str(error)})
                continue
            rows.append(row | _of_engine(sizes, engine, params, machine))
    return {"rows": rows, "goal_share_of_bandwidth": GOAL}


def _engine(sizes: Sizes, definition: Any, slots: int, attention: Any) -> Engine:
    return Engine(
        definition,
        sizes.architecture,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        slots=slots,
        max_prompt_tokens=sizes.prompt_tokens,
        max_new_tokens=sizes.new_tokens,
        stop_ids=frozenset(),
        dtype=jnp.bfloat16,
        attention=attention,
        num_samples=SAMPLES,
    )


def _of_engine(sizes: Sizes, engine: Engine, params: Any, machine: Machine) -> dict[str, Any]:
    """Seconds per step, averaged over all dispatches but the first, which compiles."""
    a, slots = sizes.architecture, engine.max_concurrent_decodes
    prompts = slots // SAMPLES
    rng = np.random.default_rng(0)
    tokens_PS = rng.integers(0, a.vocab_size, (prompts, sizes.prompt_tokens), np.int32)
    state = start_traces(engine, params, tokens_PS, SAMPLES, Sampling())
    state, sampled = engine.generate(params, state, STEPS)
    jax.block_until_ready(sampled)
    dispatches = sizes.new_tokens // STEPS - 1
    start = time.perf_counter()
    for _ in range(dispatches):
        state, sampled = engine.generate(params, state, STEPS)
    jax.block_until_ready(sampled)
    step_s = (time.perf_counter() - start) / (dispatches * STEPS)
    own = STEPS + dispatches * STEPS / 2
    token_bytes = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * 2
    cached = (prompts * sizes.prompt_tokens + slots * own) * token_bytes
    read = sum(w.nbytes for w in jax.tree.leaves(params)) + cached
    return {
        "step_ms": 1e3 * step_s,
        "tokens_per_s": slots / step_s,
        "bytes_per_step": read,
        "share_of_bandwidth": read / step_s / machine.bandwidth,
    }
