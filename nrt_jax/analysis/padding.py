"""How much of a run's rows would be padding, for given lengths of prompts and answers.

The batches of the first steps are packed as training packs them. The traces of NRT do not exist
before they are sampled, so their lengths are assumed.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from nrt_jax.config.run import RunConfig
from nrt_jax.data.epochs import EpochOrder
from nrt_jax.training.packing import Layout, Lengths, Packer, Plan, packing_metrics

RowLengths = Sequence[tuple[int, int]]
"""Tokens of the prompt and of the answer of each training row."""
MINI_BATCHES = 8
"""How many are packed, unless the run has fewer."""
AT_LIMIT, SPREAD, NO_TRACES = "at the limit", "0 to the limit, evenly", "none"
"""Assumed lengths of traces."""


def padding(config: RunConfig, layout: Layout, lengths: RowLengths) -> list[dict[str, Any]]:
    """For each assumption about the traces, and with and without packing: the share of padding, the
    tokens and the micro-batches per update, and the number of shapes.

    Only the lengths of the rows of the first batches are asked for. Data with fewer rows than a
    batch are one batch.
    """
    traces = (NO_TRACES,) if config.method == "sft" else (SPREAD, AT_LIMIT)
    found = []
    for assumed in traces:
        minis = list(_mini_batches(config, lengths, assumed))
        for packing in (True, False):
            packer = Packer(layout._replace(packing=packing))
            of_minis = [packer.plan(mini) for mini in minis]
            found.append(
                {"traces": assumed, "packing": packing, **_figures(of_minis, packer)}
                | {"configured": packing == config.train.packing}
            )
    return found


def _figures(of_minis: Sequence[Sequence[Plan]], packer: Packer) -> dict[str, float]:
    plans = [plan for plans in of_minis for plan in plans]
    metrics = packing_metrics(plans, packer)
    tokens = sum((1 - plan.padding) * plan.slots for plan in plans)
    return {
        "padding": metrics["batch/padding_share"],
        "tokens": tokens / len(of_minis),
        "micro_batches": len(plans) / len(of_minis),
        "shapes": len(packer.shapes),
    }


def _mini_batches(config: RunConfig, lengths: RowLengths, traces: str) -> Iterator[list[Lengths]]:
    """Lengths of the groups of each update."""
    train, data, rows = config.train, config.data, len(lengths)
    batch = min(train.batch_prompts, rows)
    order = EpochOrder(rows, batch, data.seed + config.seed if data.shuffle else None)
    random = np.random.default_rng(0)
    size = min(train.mini_batch_prompts, batch)
    for mini in range(min(MINI_BATCHES, train.steps * (batch // size))):
        step, start = divmod(mini * size, batch)
        yield [
            _lengths(config, *lengths[row], traces, random)
            for row in order.batch(step)[start : start + size]
        ]


def _lengths(
    config: RunConfig, prompt: int, answer: int, traces: str, random: np.random.Generator
) -> Lengths:
    """Of one group, as `group_lengths` and `sft_lengths` count them."""
    if traces == NO_TRACES:
        return Lengths(0, (prompt + answer - 1,), 0)
    rollout = config.rollout
    limit = min(rollout.max_trace_tokens, rollout.max_response_tokens - answer - 2)
    K = rollout.traces_per_prompt
    tokens = [limit] * K if traces == AT_LIMIT else random.integers(0, limit + 1, K).tolist()
    return Lengths(prompt, tuple(length + 1 + answer for length in tokens), 1 + answer)
