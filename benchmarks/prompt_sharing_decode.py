"""Decoding with each prompt's keys and values stored once, against a copy for every trace.

    python benchmarks/prompt_sharing_decode.py

An engine of the comparison model's shape decodes 8 traces of each prompt: once with
`num_samples=8`, where the traces of a prompt share its prompt slot, and once with `num_samples=1`,
where each trace has a prompt slot. Bytes are those of the keys and values of all slots, the traces'
own included; times are CPU seconds per decode step, the least of several dispatches of 16 steps.
"""

import argparse
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from shapes import PEER, start_traces

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.decode_state import DecodeState
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.sampling import Sampling
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.sharding import make_mesh

COPIES = 8
STEPS = 16


class Cost(NamedTuple):
    """What decoding all slots takes."""

    cache_bytes: int
    step_cpu_s: float


def main() -> None:
    """Measure and print a line for each prompt length."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[256, 1024])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=128)
    args = parser.parse_args()
    for prompt_tokens in args.prompt_tokens:
        shared, copied = measure(PEER, prompt_tokens, args.prompts, args.new_tokens)
        print(readable(prompt_tokens, shared, copied), flush=True)


def measure(
    architecture: Architecture, prompt_tokens: int, prompts: int, new_tokens: int
) -> tuple[Cost, Cost]:
    """Costs with a prompt slot for each prompt, and with one for each of its 8 traces."""
    definition, state = nnx.split(Decoder(architecture, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    rng = np.random.default_rng(0)
    shape = (prompts, prompt_tokens)
    tokens_PS = rng.integers(0, architecture.vocab_size, shape, np.int32)

    def cost(num_samples: int) -> Cost:
        engine = Engine(
            definition,
            architecture,
            make_mesh(MeshConfig(), jax.devices()[:1]),
            slots=prompts * COPIES,
            max_prompt_tokens=prompt_tokens,
            max_new_tokens=new_tokens,
            stop_ids=frozenset(),
            num_samples=num_samples,
        )
        state = start_traces(engine, params, tokens_PS, COPIES, Sampling())
        return _decode_cost(engine, params, state, new_tokens)

    return cost(COPIES), cost(1)


def _decode_cost(engine: Engine, params: Any, state: DecodeState, new_tokens: int) -> Cost:
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(state.layers))
    seconds = []
    for _ in range(new_tokens // STEPS):
        start = time.process_time()
        state, sampled = engine.generate(params, state, STEPS)
        jax.block_until_ready(sampled)
        seconds.append((time.process_time() - start) / STEPS)
    return Cost(cache_bytes, min(seconds[1:]))  # The first compiles.


def readable(prompt_tokens: int, shared: Cost, copied: Cost) -> str:
    """One line, with the ratios."""
    return (
        f"prompts of {prompt_tokens:5d} tokens, {COPIES} traces each: "
        f"{shared.cache_bytes / 2**20:7.1f} MiB against {copied.cache_bytes / 2**20:7.1f} MiB "
        f"({copied.cache_bytes / shared.cache_bytes:.2f} times), "
        f"{1e3 * shared.step_cpu_s:6.2f} CPU-ms a step against {1e3 * copied.step_cpu_s:6.2f} "
        f"({copied.step_cpu_s / shared.step_cpu_s:.2f} times)"
    )


if __name__ == "__main__":
    main()
