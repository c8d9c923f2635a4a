"""Rollouts of a random model: tokens per second, the machine's limit, and a plain sampler beside.

    python benchmarks/rollout.py --out FILE
    python benchmarks/rollout.py --shape llama-1b --dtype bfloat16 --slots 64 --out FILE

Two workloads, both of `--prompts` prompts with 8 traces each: all traces of one length, and lengths
drawn from a log-normal distribution whose cap is 16 times its median. Each is sampled by the engine
with the prompt held once for its traces, by the engine with a copy per trace, and by a plain
compiled while_loop (benchmarks/plain_sampler.py); with --transformers the first one also by
`generate` of transformers, on the GPU where torch has one. Times are of the second run of each; the
first compiles. CPU seconds are the figure to compare on a shared machine.

The limit of a decode step is what reading the weights and the filled part of the caches takes at
the machine's bandwidth, or the products at its matrix peak, whichever is longer; both rates are
measured first.
"""

import argparse
import json
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from machine import Machine, measure_machine
from plain_sampler import PlainSampler
from shapes import LLAMA_1B, PEER

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.requests import Request
from nrt_jax.engine.scheduler import Scheduler
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.sharding import make_mesh

COPIES = 8
SHAPES = {"peer": PEER, "llama-1b": LLAMA_1B}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--shape", choices=SHAPES, default="peer")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--slots", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--median", type=int, default=32, help="of the log-normal lengths, tokens")
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded a dispatch")
    parser.add_argument("--transformers", action="store_true", help="compare with it; needs torch")
    args = parser.parse_args()
    figures = measure(args)
    args.out.write_text(json.dumps(figures, indent=1) + "\n")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Every workload with every sampler, each printed as a line when it is done."""
    architecture, dtype = SHAPES[args.shape], jnp.dtype(args.dtype)
    machine = measure_machine(dtype)
    print(f"machine: {machine.flops / 1e9:.0f} GFLOP/s, {machine.bandwidth / 1e9:.1f} GB/s")
    decoder = Decoder(architecture, nnx.Rngs(0), dtype=dtype)
    definition, state = nnx.split(decoder)
    params = jax.tree.map(lambda w: w.astype(dtype), nnx.to_pure_dict(state))
    rng = np.random.default_rng(0)
    shape = (args.prompts, args.prompt_tokens)
    tokens_PS = rng.integers(0, architecture.vocab_size, shape, np.int32)
    cap = 16 * args.median
    tails = np.exp(rng.normal(np.log(args.median), 1.0, (args.prompts, COPIES)))
    workloads = {
        "uniform": np.full((args.prompts, COPIES), 2 * args.median),
        "heavy-tailed": np.clip(tails, 1, cap).astype(int),
    }
    figures: dict[str, Any] = {"machine": machine._asdict(), "arguments": _arguments(args)}
    for name, lengths_PK in workloads.items():
        longest = int(lengths_PK.max()) if name == "uniform" else cap
        samplers = _samplers(args, definition, architecture, params, tokens_PS, lengths_PK, longest)
        if args.transformers and name == "uniform":
            samplers["transformers"] = _transformers(args, architecture, params, tokens_PS, longest)
        for sampler, run in samplers.items():
            line = _timed(run) | {"tokens": int(lengths_PK.sum())}
            line |= _against_limit(line, machine, architecture, params, lengths_PK, args)
            line["tokens_per_s"] = line["tokens"] / line["wall_s"]
            figures[f"{name}/{sampler}"] = line
            print(f"{name:12s} {sampler:14s}", _readable(line), flush=True)
        _print_ratios(name, figures)
    return figures


def _samplers(
    args: argparse.Namespace,
    definition: nnx.GraphDef,
    architecture: Architecture,
    params: Any,
    tokens_PS: np.ndarray,
    lengths_PK: np.ndarray,
    longest: int,
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What samples the workload, by name; each call gives the figures that it knows."""

    def engine(num_samples: int) -> Engine:
        return Engine(
            definition,
            architecture,
            make_mesh(MeshConfig(), jax.devices()[:1]),
            slots=args.slots,
            max_prompt_tokens=tokens_PS.shape[1],
            max_new_tokens=longest,
            stop_ids=frozenset(),
            dtype=args.dtype,
            num_samples=num_samples,
        )

    shared = [
        Request(tokens, p, COPIES, tuple(lengths.tolist()))
        for p, (tokens, lengths) in enumerate(zip(tokens_PS, lengths_PK, strict=True))
    ]
    apart = [
        request._replace(num_samples=1, stream=request.stream * COPIES + k, max_tokens=int(limit))
        for request in shared
        for k, limit in enumerate(np.atleast_1d(request.max_tokens))
    ]
    plain = PlainSampler(definition, architecture, longest)
    return {
        "shared prompt": partial(_run_engine, engine(COPIES), params, shared, args.steps),
        "copied prompt": partial(_run_engine, engine(1), params, apart, args.steps),
        "while_loop": partial(_run_plain, plain, params, tokens_PS, lengths_PK, args.slots),
    }


def _run_engine(
    engine: Engine, params: Any, requests: Sequence[Request], steps: int
) -> dict[str, Any]:
    scheduler = Scheduler(engine, params, steps=steps)
    for request in requests:
        scheduler.submit(request, jax.random.key(0))
    tokens, cache_bytes = 0, 0
    while scheduler.busy:
        tokens += sum(len(event.tokens) for event in scheduler.step())
        cache_bytes = max(cache_bytes, scheduler.cache_bytes)
    return {
        "decode_steps": scheduler.decode_steps,
        "slots_in_use": tokens / (scheduler.decode_steps * engine.max_concurrent_decodes),
        "cache_bytes": cache_bytes,
        "programs": sum(engine.compiled.values()),
    }


def _run_plain(
    sampler: PlainSampler,
    params: Any,
    tokens_PS: np.ndarray,
    lengths_PK: np.ndarray,
    slots: int,
) -> dict[str, Any]:
    rows_NS, limits_N = np.repeat(tokens_PS, COPIES, axis=0), lengths_PK.ravel()
    steps = 0
    for first in range(0, len(limits_N), slots):
        limit_B = limits_N[first : first + slots]
        rows_BS = rows_NS[first : first + slots]
        out = sampler(params, rows_BS, limit_B.astype(np.int32), jax.random.key(first))
        jax.block_until_ready(out)
        steps += int(limit_B.max())
    return {"decode_steps": steps, "slots_in_use": limits_N.sum() / (steps * slots), "programs": 1}


def _transformers(
    args: argparse.Namespace,
    architecture: Architecture,
    params: Any,
    tokens_PS: np.ndarray,
    new_tokens: int,
) -> Callable[[], dict[str, Any]]:
    from transformers_sampler import TransformersSampler

    sampler = TransformersSampler(architecture, params, args.dtype)
    rows_NS = np.repeat(tokens_PS, COPIES, axis=0)

    def run() -> dict[str, Any]:
        batches = [rows_NS[i : i + args.slots] for i in range(0, len(rows_NS), args.slots)]
        for rows_BS in batches:
            sampler(rows_BS, new_tokens)
        steps = len(batches) * new_tokens
        in_use = len(rows_NS) / (len(batches) * args.slots)
        return {"decode_steps": steps, "slots_in_use": in_use, "programs": 0}

    return run


def _timed(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Figures of the second run, and how much longer the first took."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    wall, cpu = time.perf_counter(), time.process_time()
    figures = run()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return figures | {"wall_s": wall, "cpu_s": cpu, "compile_s": first - wall}


def _against_limit(
    line: dict[str, Any],
    machine: Machine,
    architecture: Architecture,
    params: Any,
    lengths_PK: np.ndarray,
    args: argparse.Namespace,
) -> dict[str, Any]:
    """Time of a step, the least that it could take, and the share of tokens that are padding."""
    a = architecture
    step_s = line["wall_s"] / line["decode_steps"]
    weights = sum(leaf.size for leaf in jax.tree.leaves(params))
    embedding = 0 if a.tie_word_embeddings else a.vocab_size * a.hidden_size
    width = jnp.dtype(args.dtype).itemsize
    # A trace of n tokens has n / 2 of them behind it on average; its prompt is read once.
    behind = (lengths_PK**2).sum() / (2 * lengths_PK.sum()) + args.prompt_tokens / COPIES
    token_bytes = 2 * a.num_hidden_layers * a.num_key_value_heads * a.head_dim * width
    cache_bytes = args.slots * line["slots_in_use"] * behind * token_bytes
    bytes_s = ((weights - embedding) * width + cache_bytes) / machine.bandwidth
    products_s = 2 * (weights - embedding) * args.slots * line["slots_in_use"] / machine.flops
    limit_s = max(bytes_s, products_s)
    return {
        "step_ms": 1e3 * step_s,
        "limit_ms": 1e3 * limit_s,
        "of_limit": limit_s / step_s,
        "limited_by": "bandwidth" if bytes_s > products_s else "matrix products",
        "padding_share": 1 - line["slots_in_use"],
    }


def _readable(line: dict[str, Any]) -> str:
    return (
        f"{line['tokens_per_s']:7.0f} tokens/s  {line['cpu_s']:6.2f} CPU-s  "
        f"step {line['step_ms']:6.2f} ms, {100 * line['of_limit']:3.0f} % of the limit "
        f"({line['limited_by']})  slots in use {100 * line['slots_in_use']:3.0f} %  "
        f"compile {line['compile_s']:5.1f} s, {line['programs']} programs"
        + (f"  caches {line['cache_bytes'] / 2**20:.0f} MiB" if "cache_bytes" in line else "")
    )


def _print_ratios(name: str, figures: dict[str, Any]) -> None:
    ours, plain = figures[f"{name}/shared prompt"], figures[f"{name}/while_loop"]
    print(
        f"{name:12s} engine / while_loop: {ours['tokens_per_s'] / plain['tokens_per_s']:.2f} in "
        f"tokens/s, {plain['cpu_s'] / ours['cpu_s']:.2f} in tokens per CPU-second",
        flush=True,
    )


def _arguments(args: argparse.Namespace) -> dict[str, Any]:
    return {name: str(value) for name, value in vars(args).items()}


if __name__ == "__main__":
    main()
