"""Padding, programs and work of packed mini-batches, on lengths of real data or made-up ones.

    .venv/bin/python benchmarks/packing.py --data DIR

DIR holds gsm8k/train.jsonl, flan_cot/*.tsv and tokenizers/mistral_v3_fast; without it, prompts and
answers have log-normal lengths. The lengths of traces are log-normal up to a limit, or all at the
limit, as of a model that never ends a trace. A line is a number of mini-batches: the share of
positions that hold no token, the shapes of micro-batches, each of which is a compiled program, the
micro-batches per mini-batch, and the operations of models/flops.py per token that is not padding,
for an 8B model.
"""

import argparse
import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tokenizers
from step_work import LLAMA_8B, padded_parts, work

from nrt_jax.models.flops import equal_keys
from nrt_jax.training.packing import Layout, Lengths, Packer

MOST_SHAPES = 16
LARGEST_PROMPT, LARGEST_ANSWER = 512, 512
ROWS_PER_FILE = 400


class Sizes(NamedTuple):
    """Prompts of a mini-batch and of a micro-batch, traces per prompt, most tokens of a trace."""

    prompts: int
    micro: int
    traces: int
    limit: int


SIZES = [
    Sizes(prompts, micro, traces, limit)
    for limit in (512, 128)
    for prompts, micro, traces in (
        (8, 2, 4),
        (16, 4, 4),
        (32, 8, 8),
        (64, 8, 8),
        (128, 8, 8),
        (256, 8, 8),
        (64, 32, 8),
    )
]


class Figures(NamedTuple):
    """Of all mini-batches of a line."""

    padding: float
    shapes: int
    micro_batches: float
    giga_operations: float
    """Per token that is not padding."""


def real_lengths(folder: Path) -> dict[str, list[tuple[int, int]]]:
    """Tokens of question and answer with its eos, by data set."""
    path = folder / "tokenizers" / "mistral_v3_fast" / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(path))

    def lengths(pairs: Iterator[tuple[str, str]]) -> list[tuple[int, int]]:
        return [(len(tokenizer.encode(x).ids), len(tokenizer.encode(y).ids) + 1) for x, y in pairs]

    return {"gsm8k": lengths(_gsm8k(folder)), "flan": lengths(_flan(folder))}


def _gsm8k(folder: Path) -> Iterator[tuple[str, str]]:
    lines = (folder / "gsm8k" / "train.jsonl").read_text("utf-8").splitlines()
    for line in lines[: 5 * ROWS_PER_FILE]:
        row = json.loads(line)
        yield row["question"], row["answer"]


def _flan(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted((folder / "flan_cot").glob("*.tsv")):
        with path.open(encoding="utf-8") as file:
            rows = csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE)
            yield from [(question, answer) for question, answer, *_ in rows][:ROWS_PER_FILE]


def made_up_lengths() -> dict[str, list[tuple[int, int]]]:
    """Prompts of some 60 tokens, with answers of some 120 and of some 4."""
    rng = np.random.default_rng(0)

    def draw(median: float, most: int) -> np.ndarray:
        return np.clip(rng.lognormal(np.log(median), 0.5, 2000), 2, most).astype(int)

    prompts = draw(60, LARGEST_PROMPT)
    return {
        f"answers of {median}": list(
            zip(prompts.tolist(), draw(median, LARGEST_ANSWER).tolist(), strict=True)
        )
        for median in (120, 4)
    }


def mini_batches(
    pairs: list[tuple[int, int]], sizes: Sizes, capped: bool, steps: int
) -> Iterator[list[Lengths]]:
    """Groups of random examples, with random lengths of their traces."""
    rng = np.random.default_rng(0)
    for _ in range(steps):
        groups = []
        for i in rng.permutation(len(pairs))[: sizes.prompts]:
            drawn = rng.lognormal(np.log(sizes.limit / 4), 0.8, sizes.traces)
            traces = (
                np.full(sizes.traces, sizes.limit) if capped else np.minimum(drawn, sizes.limit)
            )
            prompt, answer = pairs[i]
            completions = tuple(int(z) + 1 + answer for z in traces)
            groups.append(Lengths(prompt, completions, 1 + answer))
        yield groups


def measure(pairs: list[tuple[int, int]], sizes: Sizes, capped: bool, steps: int) -> Figures:
    """Pack the mini-batches of a run one after the other."""
    longest = sizes.limit + 1 + LARGEST_ANSWER
    layout = Layout(
        sizes.micro,
        equal_keys=equal_keys(LLAMA_8B),
        most_shapes=MOST_SHAPES,
        largest=Lengths(LARGEST_PROMPT, (longest,) * sizes.traces, 1 + LARGEST_ANSWER),
    )
    packer = Packer(layout)
    plans = [p for groups in mini_batches(pairs, sizes, capped, steps) for p in packer.plan(groups)]
    slots = sum(plan.slots for plan in plans)
    tokens = sum((1 - plan.padding) * plan.slots for plan in plans)
    operations = sum(
        work(padded_parts(plan.shape), "full", LLAMA_8B, ours=True).dense_flops for plan in plans
    )
    return Figures(
        1 - tokens / slots, len(packer.shapes), len(plans) / steps, operations / tokens / 1e9
    )


def main() -> None:
    """Print a line per data set, size and kind of trace, and the means."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder of data sets and tokenizers")
    parser.add_argument("--steps", type=int, default=12, help="mini-batches of a line")
    args = parser.parse_args()
    lengths = real_lengths(args.data) if args.data else made_up_lengths()
    figures = []
    print(f"{'data':16}prompts micro traces limit traces padding shapes")
    for name, pairs in lengths.items():
        for sizes in SIZES:
            for capped in (False, True):
                line = measure(pairs, sizes, capped, args.steps)
                figures.append(line)
                row = "".join(f"{n:>{w}}" for n, w in zip(sizes, (8, 6, 7, 6), strict=True))
                print(
                    f"{name:14}{row}  {'limit ' if capped else 'random'} {_told(line)}", flush=True
                )
    print(f"{'mean':49}{_told(Figures(*np.mean(figures, axis=0)))}")


def _told(figures: Figures) -> str:
    return (
        f"{figures.padding:8.1%}{figures.shapes:7.3g}{figures.micro_batches:7.1f} micro-batches,"
        f"{figures.giga_operations:7.2f} x 10^9 per token"
    )


if __name__ == "__main__":
    main()
