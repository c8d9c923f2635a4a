"""The work of one NRT step: ours against what the authors' release does, counted and not timed.

    .venv/bin/python benchmarks/step_work.py --prompt 300 --trace 400 --answer 416 --traces 8
    .venv/bin/python benchmarks/step_work.py --check

Both train on one group of traces of one length. The unit is a token that runs forward once; a
backward pass is two of them. The release scores the logprobs of the whole batch before the update,
runs the baseline and the prompt once a trace, and trains with gradient checkpointing, so an update
is 4 forward passes. Ours runs a prompt once a group, its completions `t_start z t_end y*`, and one
baseline without a gradient; nothing is scored before, unless a step has several mini-batches: then
c_base is, after another pass over the prompt, which `--several-updates` counts.

Operations are those of models/flops.py, with attention and head: "dense" with every key of a row,
hidden ones included, on both sides; "causal" with the keys that are seen, as fused kernels come
near to. The release's padding, and its logits of prompts, are not counted; ours are once without
padding and once in the rows that the batch has. `--check` compares the formula with XLA's own count
of the loss and its gradient, in one layer of the architecture and one chunk of logprobs, since XLA
counts the body of a scan once.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import NamedTuple, get_args

import jax
import numpy as np
from flax import nnx

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.model import ModelConfig
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.models.decoder import Remat, abstract_decoder
from nrt_jax.models.flops import Rows, forward_flops, training_flops
from nrt_jax.training.batch import group_lengths, nrt_batch
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.frozen_logprobs import FrozenLogprobs
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.packing import Layout, Packer, Plan, Shape
from nrt_jax.types import Example, Group, TokenizedExample, Trace

LLAMA_8B = Architecture(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
"""That of Llama-3.1-8B."""
REMATS: tuple[Remat, ...] = get_args(Remat)
DEFAULT_REMAT = ModelConfig.model_fields["remat"].default
VOCAB_MULTIPLE = ModelConfig.model_fields["vocab_multiple"].default
COLUMNS = ("before", "forward", "recomputed", "backward", "sum")


class Sizes(NamedTuple):
    """Tokens of a group: its prompt, each trace z, the answer y* with its eos; and how many z."""

    prompt: int
    trace: int
    answer: int
    traces: int


class Part(NamedTuple):
    """Tokens that run alike."""

    name: str
    dense: Rows
    causal: Rows
    before: bool = False
    """Whether they also run before the update, to be scored."""
    gradient: bool = True


class Tokens(NamedTuple):
    """Forward-token equivalents."""

    before: int
    forward: int
    recomputed: int
    backward: int


def _part(name: str, copies: int, tokens: int, *, after: int, row: int, **how: bool) -> Part:
    """`copies` of `tokens` whose rows hold `row` keys, `after` of them earlier than all of these;
    everything but a prompt is scored."""
    scored = 0 if name.startswith("prompt") else copies * tokens
    rows = partial(Rows, copies * tokens, scored=scored)
    return Part(name, rows(keys=row), rows(keys=after + (tokens + 1) / 2), **how)


def release_parts(sizes: Sizes) -> list[Part]:
    """What the release runs: whole sequences, for each trace."""
    S, Z, A, K = sizes
    row, empty = S + Z + 1 + A, S + 1 + A
    return [
        _part("prompt", K, S, after=0, row=row, before=True),
        _part("traces", K, Z + 1, after=S, row=row, before=True),
        _part("answers", K, A, after=S + Z + 1, row=row, before=True),
        _part("prompt of baseline", K, S, after=0, row=empty, gradient=False),
        _part("baseline", K, 1 + A, after=S, row=empty, gradient=False),
    ]


def our_parts(sizes: Sizes, several_updates: bool = False) -> list[Part]:
    """What we run, without padding; t_start and t_end count to the trace and the answer."""
    S, Z, A, K = sizes
    row, empty = S + Z + 1 + A, S + 1 + A
    prompt = _part("prompt", 1, S, after=0, row=S, before=several_updates)
    # Its last state is scored for t_start.
    dense, causal = (rows._replace(scored=1) for rows in (prompt.dense, prompt.causal))
    return [
        prompt._replace(dense=dense, causal=causal),
        _part("traces", K, Z + 1, after=S, row=row),
        _part("answers", K, A, after=S + Z + 1, row=row),
        _part("baseline", 1, 1 + A, after=S, row=empty, gradient=False),
    ]


def padded_parts(shape: Shape, several_updates: bool = False) -> list[Part]:
    """What we run in the rows of a micro-batch, hidden keys included."""
    S, W, E, packs = shape.prompt_tokens, shape.row_tokens, shape.baseline_tokens, shape.packs
    completions = packs * shape.rows * W
    prompts = Rows(packs * S, S, packs * shape.groups)
    traces, baselines = Rows(completions, S + W, completions), Rows(packs * E, S + E, packs * E)
    return [
        Part("prompts", prompts, prompts, before=several_updates),
        Part("completions", traces, traces),
        Part("baselines", baselines, baselines, gradient=False),
    ]


def tokens_of(part: Part, remat: Remat) -> Tokens:
    """Forward-token equivalents of a part; `dots` runs no product with a weight again."""
    n = part.dense.tokens
    recomputed = n if part.gradient and remat == "full" else 0
    return Tokens(n if part.before else 0, n, recomputed, 2 * n if part.gradient else 0)


def flops_of(
    part: Part, rows: Rows, remat: Remat, architecture: Architecture, *, ours: bool
) -> float:
    """Operations of a part; the release's head keeps its logits for the backward pass."""
    multiple = VOCAB_MULTIPLE if ours else 1
    forward = forward_flops(architecture, rows, multiple).total
    before = forward if part.before else 0.0
    if not part.gradient:
        return before + forward
    trained = training_flops(architecture, rows, remat, multiple, chunked_head=ours)
    return before + trained.total


class Work(NamedTuple):
    """A step of one group."""

    tokens: int
    dense_flops: float
    causal_flops: float


def work(parts: list[Part], remat: Remat, architecture: Architecture, *, ours: bool) -> Work:
    """The sum of the parts."""
    flops = partial(flops_of, remat=remat, architecture=architecture, ours=ours)
    return Work(
        sum(sum(tokens_of(part, remat)) for part in parts),
        sum(flops(part, part.dense) for part in parts),
        sum(flops(part, part.causal) for part in parts),
    )


def table(name: str, parts: list[Part], remat: Remat, a: Architecture, *, ours: bool) -> str:
    """The parts line by line, in forward-token equivalents and 10^12 operations."""
    lines = [f"{name:28}" + "".join(f"{c:>11}" for c in (*COLUMNS, "dense", "causal"))]
    for part in parts:
        tokens = tokens_of(part, remat)
        flops = (
            flops_of(part, rows, remat, a, ours=ours) / 1e12 for rows in (part.dense, part.causal)
        )
        counts = "".join(f"{count:11,}" for count in (*tokens, sum(tokens)))
        lines.append(f"  {part.name:26}{counts}" + "".join(f"{x:11.2f}" for x in flops))
    whole = work(parts, remat, a, ours=ours)
    lines.append(
        f"  {'sum':26}{whole.tokens:55,}"
        f"{whole.dense_flops / 1e12:11.2f}{whole.causal_flops / 1e12:11.2f}"
    )
    return "\n".join(lines)


def one_group(sizes: Sizes) -> tuple[Group, Plan]:
    """Made-up tokens of these sizes, and their rows: one for each completion."""
    prompt, answer = (np.full(n, 3, np.int32) for n in (sizes.prompt, sizes.answer))
    z = np.full(sizes.trace, 3, np.int32)
    trace = Trace(z, np.zeros(sizes.trace, np.float32), None, 0.0)
    example = TokenizedExample(Example(0, "", ""), prompt, answer)
    group = Group(example, (trace,) * sizes.traces)
    (plan,) = Packer(Layout(1, packing=False)).plan([group_lengths(group)])
    return group, plan


def counted_by_xla(sizes: Sizes, architecture: Architecture, remat: Remat) -> float:
    """Operations of the NRT loss of one group and its gradient, elementwise ones included.

    Counted before XLA's optimisations, since with one chunk they merge the head's second product
    with its first; the architecture must have one layer.
    """
    assert architecture.num_hidden_layers == 1, "XLA counts the body of a scan once"
    group, plan = one_group(sizes)
    batch = nrt_batch([group], plan, think_start=1, think_end=2)
    decoder = abstract_decoder(architecture, remat=remat, vocab_multiple=VOCAB_MULTIPLE)
    definition, params = nnx.split(decoder)
    settings = NrtSettings(definition, ObjectiveConfig(), 1, 2, 1.0, chunk_tokens=plan.slots)
    loss = partial(nrt_loss, sequences=sizes.traces, settings=settings)
    gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))
    lowered = gradient.lower(nnx.to_pure_dict(params), batch, FrozenLogprobs())
    costs = lowered.cost_analysis()
    assert costs is not None, "XLA counts for every platform"
    return costs["flops"]


def formula(sizes: Sizes, architecture: Architecture, remat: Remat) -> float:
    """The same by models/flops.py, without elementwise work."""
    _, plan = one_group(sizes)
    return work(padded_parts(plan.shape), remat, architecture, ours=True).dense_flops


def main() -> None:
    """Print the tables and their ratios, or the check."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for name, tokens in Sizes(prompt=300, trace=400, answer=416, traces=8)._asdict().items():
        parser.add_argument(f"--{name}", type=int, default=tokens)
    parser.add_argument("--architecture", type=Path, help="Hugging Face directory; else the 8B's")
    parser.add_argument("--several-updates", action="store_true", help="several mini-batches")
    parser.add_argument("--check", action="store_true", help="against XLA's count, in one layer")
    args = parser.parse_args()
    sizes = Sizes(args.prompt, args.trace, args.answer, args.traces)
    architecture = read_architecture(args.architecture) if args.architecture else LLAMA_8B
    if args.check:
        print_check(sizes, architecture.model_copy(update={"num_hidden_layers": 1}))
    else:
        print_step(sizes, architecture, args.several_updates)


def print_step(sizes: Sizes, architecture: Architecture, several_updates: bool) -> None:
    """Both sides line by line, and ours over theirs."""
    print("forward-token equivalents of a group, and its 10^12 operations")
    theirs = release_parts(sizes)
    print(table("the authors' release", theirs, "full", architecture, ours=False))
    parts = our_parts(sizes, several_updates)
    for remat in REMATS:
        print(table(f"ours, remat {_marked(remat)}", parts, remat, architecture, ours=True))
    release = work(theirs, "full", architecture, ours=False)
    rows = padded_parts(one_group(sizes)[1].shape, several_updates)
    print("ours over the release's")
    for remat in REMATS:
        mine = work(parts, remat, architecture, ours=True)
        ratios = [m / t for m, t in zip(mine, release, strict=True)]
        padded = work(rows, remat, architecture, ours=True).dense_flops
        print(
            f"  remat {_marked(remat):16} tokens {ratios[0]:.4f}, operations dense "
            f"{ratios[1]:.4f} (in padded rows {padded / release.dense_flops:.4f}), "
            f"causal {ratios[2]:.4f}"
        )


def print_check(sizes: Sizes, architecture: Architecture) -> None:
    """The formula and XLA's count of each policy."""
    for remat in REMATS:
        xla, ours = (count(sizes, architecture, remat) for count in (counted_by_xla, formula))
        print(
            f"remat {_marked(remat):16} XLA {xla / 1e9:12.2f} GFLOP, formula {ours / 1e9:12.2f}, "
            f"formula / XLA {ours / xla:.4f}"
        )


def _marked(remat: Remat) -> str:
    return f"{remat} (default)" if remat == DEFAULT_REMAT else remat


if __name__ == "__main__":
    main()
