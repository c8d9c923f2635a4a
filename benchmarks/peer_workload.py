"""One step of RL on a small random Llama, for a comparison with other systems on the same assets.

    .venv/bin/python benchmarks/peer_workload.py --assets DIR --out FILE

DIR holds model.safetensors, config.json, tokenizer.json and prompts.json (8 texts of 63 words). A
step samples 8 traces of 128 tokens for each prompt of 64 tokens at temperature 1, and then makes
one update with AdamW on those 64 x 192 = 12,288 tokens, in float32. The update is the whole NRT
step: beside the trace term it runs the baseline and an answer that is the end-of-sequence token
alone, so each sequence has 3 tokens more (t_start, t_end, eos); the prompt is run once for its
traces. Times are medians over the steps after the first, and CPU seconds are the figure to compare
on a shared machine.

The update is also set against the machine: `matrix_gflops_per_cpu_s` is the rate of a large matrix
product in this run, `update_matrix_share` what the update's matrix products would take at that rate
over what the update takes. Its layers, its head and the optimizer are run by themselves too; the
rest is the loss, the baseline and the sum of the gradients.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
import optax
import tokenizers
from flax import nnx
from update_parts import cpu_seconds, update_parts

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.import_format import read_params
from nrt_jax.checkpoints.train_state import init_state, state_shardings
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.model import ModelConfig
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.flops import equal_keys
from nrt_jax.models.sharding import abstract_params, make_mesh
from nrt_jax.training.batch import group_lengths, nrt_batch
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.frozen_logprobs import FrozenLogprobs
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.update import Update, UpdateRule
from nrt_jax.types import Example, Group, TokenizedExample, Trace

TRACES, NEW_TOKENS, EOS = 8, 128, 2
CHUNK_TOKENS = ModelConfig.model_fields["logprob_chunk_tokens"].default
# Entries of the assets' vocabulary that no prompt has, in the place of think tokens.
THINK_START, THINK_END = 0, 3


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="One RL step on the assets of other systems.")
    parser.add_argument("--assets", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=4, help="the first compiles and is not timed")
    parser.add_argument("--micro-prompts", type=int, default=2, help="prompts of a micro-batch")
    args = parser.parse_args()
    figures = measure(args.assets, args.steps, args.micro_prompts)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures, indent=1))


def measure(assets: Path, steps: int, micro_prompts: int) -> dict[str, float]:
    """The figures of a run of `steps` steps."""
    backend = tokenizers.Tokenizer.from_file(str(assets / "tokenizer.json"))
    texts = json.loads((assets / "prompts.json").read_text())
    examples = [
        TokenizedExample(Example(i, text, ""), _prompt(backend, text), np.array([EOS], np.int32))
        for i, text in enumerate(texts)
    ]
    architecture = read_architecture(assets)
    mesh = make_mesh(MeshConfig())
    decoder = abstract_decoder(architecture)
    definition, _ = nnx.split(decoder)
    params = read_params(assets, abstract_params(mesh, decoder))
    optimizer = optax.adamw(1e-5)
    shardings = state_shardings(optimizer, params, mesh)
    state = init_state(optimizer, params, shardings)
    engine = Engine(
        definition,
        architecture,
        mesh,
        slots=len(texts) * TRACES,
        max_prompt_tokens=max(len(example.prompt_tokens) for example in examples),
        max_new_tokens=NEW_TOKENS,
        stop_ids=frozenset(),
        num_samples=TRACES,
    )
    settings = NrtSettings(definition, ObjectiveConfig(), THINK_START, THINK_END, 1.0, CHUNK_TOKENS)
    update = Update(
        lambda params, batch: nrt_loss(
            params, *batch, sequences=len(texts) * TRACES, settings=settings
        ),
        UpdateRule(optimizer, shardings),
    )
    packer = Packer(Layout(micro_prompts, equal_keys=equal_keys(architecture)))
    rollouts, updates, tokens = [], [], 0
    for step in range(steps):
        traces, seconds = _timed(partial(_sample, engine, state.params, examples, step))
        rollouts.append(seconds)
        groups = [Group(e, t) for e, t in zip(examples, traces, strict=True)]
        tokens = sum(len(trace.tokens) for group in groups for trace in group.traces)
        plans = packer.plan([group_lengths(group) for group in groups])
        think = {"think_start": THINK_START, "think_end": THINK_END}
        batches = [(nrt_batch(groups, plan, **think), FrozenLogprobs()) for plan in plans]
        (state, _), seconds = _timed(partial(update, state, jax.device_put(batches)))
        updates.append(seconds)
    figures = {
        "rollout_cpu_s": median(cpu for _, cpu in rollouts[1:]),
        "rollout_wall_s": median(wall for wall, _ in rollouts[1:]),
        "update_cpu_s": median(cpu for _, cpu in updates[1:]),
        "update_wall_s": median(wall for wall, _ in updates[1:]),
        "compile_s": rollouts[0][0] + updates[0][0] - rollouts[-1][0] - updates[-1][0],
        "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024**2,
        "tokens": tokens,
    }
    batches = [jax.device_put(batch) for batch, _ in batches]
    figures |= update_parts(
        definition, architecture, state.params, batches, CHUNK_TOKENS, figures["update_cpu_s"]
    )
    figures["optimizer_cpu_s"] = cpu_seconds(
        jax.jit(optimizer.update), state.params, state.opt_state, state.params
    )
    return figures


def _prompt(backend: tokenizers.Tokenizer, text: str) -> np.ndarray:
    words = backend.encode(text, add_special_tokens=False).ids
    return np.array([backend.token_to_id("<bos>"), *words], np.int32)


def _sample(
    engine: Engine, params: Any, examples: list[TokenizedExample], step: int
) -> list[tuple[Trace, ...]]:
    requests = [
        Request(example.prompt_tokens, example.example.index, TRACES, NEW_TOKENS)
        for example in examples
    ]
    return generate(engine, params, requests, jax.random.key(step))


def _timed(call: Callable[[], Any]) -> tuple[Any, tuple[float, float]]:
    """The result, and the wall and CPU seconds until it is there."""
    wall, cpu = time.perf_counter(), time.process_time()
    result = jax.block_until_ready(call())
    return result, (time.perf_counter() - wall, time.process_time() - cpu)


if __name__ == "__main__":
    main()
