"""Where the time of an update goes: its parts run by themselves, against the machine's matrix rate.

Letters: those of nrt_jax/training/batch.py; B rows, D model dim.
"""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from nrt_jax.config.architecture import Architecture
from nrt_jax.models.flops import Flops, Rows, forward_flops, training_flops
from nrt_jax.models.rows import TokenRows
from nrt_jax.training.batch import NrtBatch

REPEATS = 3


def update_parts(
    definition: nnx.GraphDef,
    architecture: Architecture,
    params: Any,
    batches: Sequence[NrtBatch],
    chunk_tokens: int,
    update_cpu_s: float,
) -> dict[str, float]:
    """The matrix rate, the update's share of it, and what layers and head take, with their shares.

    Layers and head are run forward and backward by themselves, and so without what overlaps.
    """
    rate = matrix_rate()

    def layers(params: Any, batch: NrtBatch) -> Array:
        decoder = nnx.merge(definition, params)
        rows = batch.completions
        completions = TokenRows(
            rows.inputs_BW, rows.positions_BW, rows.segments_BW, rows.prompts_BW
        )
        _, hidden_BWD = decoder.hidden_of_packs(TokenRows(*batch.prompts), completions)
        return jnp.sum(hidden_BWD)

    def head(params: Any, batch: NrtBatch) -> Array:
        decoder = nnx.merge(definition, params)
        targets_BW = batch.completions.targets_BW
        hidden_BWD = decoder.embedding[...][targets_BW]
        return jnp.sum(decoder.token_logprobs(hidden_BWD, targets_BW, chunk_tokens).logprob_BT)

    flops = update_flops(architecture, batches)
    figures = {
        "matrix_gflops_per_cpu_s": rate / 1e9,
        "update_matrix_share": sum(flops) / rate / update_cpu_s,
    }
    parts = {"layers": (layers, flops.weights + flops.attention), "head": (head, flops.head)}
    for name, (function, operations) in parts.items():
        seconds = sum(cpu_seconds(jax.jit(jax.grad(function)), params, batch) for batch in batches)
        figures[f"{name}_cpu_s"] = seconds
        figures[f"{name}_matrix_share"] = operations / rate / seconds
    return figures


def update_flops(architecture: Architecture, batches: Sequence[NrtBatch]) -> Flops:
    """Matrix operations of an update: prompts and completions with gradients, baselines without."""
    totals = []
    for batch in batches:
        S, W = batch.prompts.tokens_packs_S.shape[-1], batch.completions.inputs_BW.shape[-1]
        E = batch.baselines.inputs_BW.shape[-1]
        prompts = Rows(batch.prompts.tokens_packs_S.size, S, batch.groups.prompt_last_P.size)
        tokens = batch.completions.inputs_BW.size
        completions = Rows(tokens, S + W, tokens)
        baselines = Rows(batch.baselines.inputs_BW.size, S + E, batch.baselines.inputs_BW.size)
        totals += [training_flops(architecture, rows, "none") for rows in (prompts, completions)]
        totals.append(forward_flops(architecture, baselines))
    return Flops(*(sum(parts) for parts in zip(*totals, strict=True)))


def matrix_rate() -> float:
    """Operations a CPU-second of a product of 2,048 x 2,048 matrices in float32."""
    n = 2048
    square = jnp.ones((n, n), jnp.float32)
    return 2 * n**3 / cpu_seconds(jax.jit(jnp.matmul), square, square)


def cpu_seconds(call: Callable[..., Any], *args: Any) -> float:
    """Median of some calls after one that compiles."""
    jax.block_until_ready(call(*args))
    seconds = []
    for _ in range(REPEATS):
        start = time.process_time()
        jax.block_until_ready(call(*args))
        seconds.append(time.process_time() - start)
    return median(seconds)
