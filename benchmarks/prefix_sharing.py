"""Training on a group with its prompt run once, against whole sequences that each repeat it.

    .venv/bin/python benchmarks/prefix_sharing.py
    .venv/bin/python benchmarks/prefix_sharing.py --rows 1024x8x256x64 64x8x256x64

Both layouts give the sum of the logprobs of all completions and of the baseline's answer, the
latter without a gradient, and the gradient of that sum; the two sums and gradients must agree.
"Shared" is the layout of training: the prompt and rows that continue it, rounded up as
batches are. "Plain" is one row per sequence, prompt and completion, without any padding. A row of
the table is prompt tokens x traces x trace tokens x answer tokens; operations are those of
models/flops.py, times are CPU seconds, medians over repetitions that take turns.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.models.attention import segment_positions
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.flops import Rows, forward_flops, training_flops
from nrt_jax.models.logprobs import token_logprobs
from nrt_jax.objective.masked import masked_sum
from nrt_jax.training.batch import (
    NrtBatch,
    answer_mask,
    group_lengths,
    nrt_batch,
    target_masks,
)
from nrt_jax.training.forward import NrtSettings, group_logprobs
from nrt_jax.training.packing import Layout, Packer, Plan
from nrt_jax.types import Example, Group, TokenizedExample, Trace

MODEL = Architecture(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
)
TABLE = ("64x8x256x64", "256x8x256x64", "1024x8x64x64", "1024x8x256x64", "1024x4x256x64")
THINK_START, THINK_END = 1, 2
CHUNK_TOKENS = 512
AGREEMENT = 1e-5
"""Of the sum, or of the largest entry of a weight's gradient."""


class Sizes(NamedTuple):
    """Tokens of a group."""

    prompt: int
    traces: int
    trace: int
    answer: int


class Cost(NamedTuple):
    """What value and gradient of one group take."""

    flops: float
    cpu_s: float


class Plain(NamedTuple):
    """Whole sequences: those of the traces, and the baseline's."""

    traces_BT: Int[Array, "K T"]
    """t_start z t_end y* after the prompt."""
    baseline_1T: Int[Array, "1 T"]


def main() -> None:
    """Measure and print a line for each row of the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=_sizes, nargs="+", default=[_sizes(row) for row in TABLE])
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    print("prompt traces trace answer | TFLOP shared   plain  ratio | CPU-s shared   plain  ratio")
    for sizes in args.rows:
        shared, plain, error = measure(MODEL, sizes, args.repeats)
        print(
            f"{sizes.prompt:6} {sizes.traces:6} {sizes.trace:5} {sizes.answer:6} | "
            f"{shared.flops / 1e12:12.4f} {plain.flops / 1e12:7.4f} "
            f"{plain.flops / shared.flops:6.2f} | "
            f"{shared.cpu_s:12.2f} {plain.cpu_s:7.2f} {plain.cpu_s / shared.cpu_s:6.2f}"
            f"   (agree to {error:.0e})",
            flush=True,
        )


def _sizes(text: str) -> Sizes:
    return Sizes(*(int(number) for number in text.split("x")))


def measure(architecture: Architecture, sizes: Sizes, repeats: int) -> tuple[Cost, Cost, float]:
    """Costs of the shared and of the plain layout, and how far apart their results are."""
    definition, state = nnx.split(Decoder(architecture, nnx.Rngs(0)))
    params = nnx.to_pure_dict(state)
    group, plan = one_group(sizes, architecture.vocab_size)
    batch = nrt_batch([group], plan, think_start=THINK_START, think_end=THINK_END)
    settings = NrtSettings(definition, ObjectiveConfig(), THINK_START, THINK_END, 1.0, CHUNK_TOKENS)
    shared = partial(shared_logprob, settings=settings)
    plain = partial(plain_logprob, definition=definition, prompt=sizes.prompt)
    calls = [
        partial(jax.jit(jax.value_and_grad(logprob)), params, jax.device_put(data))
        for logprob, data in ((shared, batch), (plain, plain_layout(group)))
    ]
    error = float(largest_difference(*(call() for call in calls)))
    assert error <= AGREEMENT, f"the layouts differ by {error}"
    shared_s, plain_s = _cpu_seconds(calls, repeats)
    flops = shared_flops(architecture, plan), plain_flops(architecture, sizes)
    return Cost(flops[0], shared_s), Cost(flops[1], plain_s), error


def one_group(sizes: Sizes, vocab_size: int) -> tuple[Group, Plan]:
    """Random tokens of these sizes, and their rows: one for each completion."""
    rng = np.random.default_rng(0)

    def tokens(count: int) -> np.ndarray:
        return rng.integers(THINK_END + 1, vocab_size, count).astype(np.int32)

    traces = tuple(
        Trace(tokens(sizes.trace), np.zeros(sizes.trace, np.float32), None, 0.0)
        for _ in range(sizes.traces)
    )
    example = TokenizedExample(Example(0, "", ""), tokens(sizes.prompt), tokens(sizes.answer))
    group = Group(example, traces)
    (plan,) = Packer(Layout(1, packing=False)).plan([group_lengths(group)])
    return group, plan


def shared_logprob(params: Any, batch: NrtBatch, settings: NrtSettings) -> Float[Array, ""]:
    """The sum by the functions of the loss."""
    decoder = nnx.merge(settings.definition, params)
    scored = group_logprobs(decoder, settings, batch, baselines=True)
    assert scored.log_c_base_PA is not None
    of_completions = masked_sum(scored.logprob_PKT, target_masks(batch.groups).valid_PKT)
    return of_completions + masked_sum(scored.log_c_base_PA, answer_mask(batch.groups))


def plain_layout(group: Group) -> Plain:
    """The group's sequences, with its prompt in each."""
    prompt, answer = group.example.prompt_tokens, group.example.answer_tokens

    def sequence(z: np.ndarray) -> np.ndarray:
        return np.concatenate([prompt, [THINK_START], z, [THINK_END], answer]).astype(np.int32)

    nothing = np.empty(0, np.int32)
    return Plain(
        np.stack([sequence(trace.tokens) for trace in group.traces]), sequence(nothing)[None]
    )


def plain_logprob(
    params: Any, sequences: Plain, definition: nnx.GraphDef, prompt: int
) -> Float[Array, ""]:
    """The same sum by passes over whole sequences, logprobs of the completions' targets alone."""
    decoder = nnx.merge(definition, params)
    constant = nnx.merge(definition, jax.lax.stop_gradient(params))
    of_traces = _logprob_from(decoder, sequences.traces_BT, prompt + 1)
    return of_traces + _logprob_from(constant, sequences.baseline_1T, prompt + 2)


def _logprob_from(decoder: Decoder, tokens_BT: Int[Array, "B T"], first: int) -> Float[Array, ""]:
    """Sum of the logprobs of the tokens from place `first` on."""
    inputs_BT = tokens_BT[:, :-1]
    segments_BT = jnp.ones_like(inputs_BT)
    hidden_BTD, _ = decoder.hidden(inputs_BT, segment_positions(segments_BT), segments_BT)
    scores = token_logprobs(
        hidden_BTD[:, first - 1 :],
        decoder.head_DV(),
        tokens_BT[:, first:],
        vocab_size=decoder.architecture.vocab_size,
        chunk_tokens=CHUNK_TOKENS,
    )
    return scores.logprob_BT.sum()


def shared_flops(architecture: Architecture, plan: Plan) -> float:
    """Operations of the shared layout, padding included."""
    shape = plan.shape
    S, W, E = shape.prompt_tokens, shape.row_tokens, shape.baseline_tokens
    completions = shape.rows * W
    return (
        training_flops(architecture, Rows(S, S), "none").total
        + training_flops(architecture, Rows(completions, S + W, completions), "none").total
        + forward_flops(architecture, Rows(E, S + E, E)).total
    )


def plain_flops(architecture: Architecture, sizes: Sizes) -> float:
    """Operations of the plain layout."""
    completion, empty = 1 + sizes.trace + sizes.answer, 1 + sizes.answer
    row, baseline = sizes.prompt + completion, sizes.prompt + empty
    rows = Rows(sizes.traces * row, row, sizes.traces * completion)
    baselines = Rows(baseline, baseline, sizes.answer)
    return (
        training_flops(architecture, rows, "none").total
        + forward_flops(architecture, baselines).total
    )


@jax.jit
def largest_difference(shared: Any, plain: Any) -> Float[Array, ""]:
    """Of values and gradients: the largest |a - b| of each array over its largest |b|."""
    differences = [
        jnp.abs(a - b).max() / jnp.abs(b).max()
        for a, b in zip(jax.tree.leaves(shared), jax.tree.leaves(plain), strict=True)
    ]
    return jnp.stack(differences).max()


def _cpu_seconds(calls: list[Callable[[], Any]], repeats: int) -> list[float]:
    """Median of each call, in turns, so that what else the machine does meets all of them."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, seconds, strict=True):
            start = time.process_time()
            jax.block_until_ready(call())
            own.append(time.process_time() - start)
    return [median(own) for own in seconds]


if __name__ == "__main__":
    main()
