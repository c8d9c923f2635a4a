"""The rows of the log of rollouts: what was sampled in a step, and what the loss made of it.

Letters: P prompts, K traces per prompt, T predicted tokens of a completion, A answer tokens.
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from nrt_jax import distributed
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.evaluation.held_out import end_name
from nrt_jax.models.sharding import replicated
from nrt_jax.objective.rewards import score_rewards
from nrt_jax.training.loss import TraceValues
from nrt_jax.training.rollouts import MiniBatch
from nrt_jax.training.setup import Run
from nrt_jax.types import Group, SuffixLogprobs

if TYPE_CHECKING:
    import pyarrow as pa


def log_rollouts(
    run: Run,
    step: int,
    groups: Sequence[Group],
    batches: Sequence[MiniBatch],
    of_traces: Sequence[Sequence[TraceValues]],
) -> None:
    """Write the traces of a step; `of_traces` is what its updates computed, batch by batch."""
    with run.logger.timer("rollout_log"):
        values = to_host(of_traces, run.policy.model.mesh)
        of_groups = values_of_groups(groups, batches, values, run.config.objective)
        ends = [end_name(run.policy.tokenizer, trace) for g in groups for trace in g.traces]
        run.logger.write_rollouts(rollout_table(step, groups, of_groups, ends))


def to_host(of_traces: Sequence[Sequence[TraceValues]], mesh: Mesh) -> list[list[TraceValues]]:
    """The arrays in the memory of every process, whichever devices hold them."""
    if distributed.process_count() > 1:
        # One program per shape of a micro-batch; the number of these changes from step to step.
        of_traces = [[_everywhere(v, mesh=mesh) for v in of_mini] for of_mini in of_traces]
    return jax.device_get(of_traces)


@partial(jax.jit, static_argnames="mesh")
def _everywhere(values: TraceValues, *, mesh: Mesh) -> TraceValues:
    return jax.lax.with_sharding_constraint(values, replicated(mesh))


class GroupValues(NamedTuple):
    """What is known of a group's traces besides the traces."""

    trained_KT: np.ndarray | None
    """log pi of z under the weights before the update; None where the update left the group out."""
    log_c_KA: np.ndarray
    log_c_base_A: np.ndarray
    reward_K: np.ndarray
    baseline: float
    advantage_K: np.ndarray
    """NaN where the update left the group out."""


def values_of_groups(
    groups: Sequence[Group],
    batches: Sequence[MiniBatch],
    values: Sequence[Sequence[TraceValues]],
    objective: ObjectiveConfig,
) -> list[GroupValues]:
    """The values of each group, those that the update left out by the engine's scores."""
    trained = dict(_trained(groups, batches, values))
    if len(trained) == len(groups):
        return [trained[p] for p in range(len(groups))]
    scores = []
    for group in groups:
        assert group.log_c_KA is not None, "a group is dropped by its scores"
        assert group.log_c_base_A is not None
        scores.append(SuffixLogprobs(group.log_c_KA, group.log_c_base_A))
    rewards = score_rewards(scores, objective)
    dropped = [
        GroupValues(
            trained_KT=None,
            log_c_KA=score.samples_KA,
            log_c_base_A=score.empty_A,
            reward_K=rewards.reward_PK[p],
            baseline=rewards.baseline_P[p],
            advantage_K=np.full(len(score.samples_KA), np.nan, np.float32),
        )
        for p, score in enumerate(scores)
    ]
    return [trained.get(p, dropped[p]) for p in range(len(groups))]


def _trained(
    groups: Sequence[Group],
    batches: Sequence[MiniBatch],
    values: Sequence[Sequence[TraceValues]],
) -> Iterator[tuple[int, GroupValues]]:
    """Index and values of the groups that were part of the loss."""
    size = len(groups) // len(batches)
    for i, (mini, of_mini) in enumerate(zip(batches, values, strict=True)):
        if not mini.kept:
            continue
        for plan, of_micro in zip(mini.plans, of_mini, strict=True):
            for j, pack in enumerate(plan.packs):
                for g, member in enumerate(pack.groups):
                    p = j * plan.shape.groups + g
                    of_group = TraceValues(*(array[p] for array in of_micro))
                    index = i * size + mini.chosen[member]
                    yield index, _of_group(groups[index], of_group)


def _of_group(group: Group, values: TraceValues) -> GroupValues:
    answer = len(group.example.answer_tokens)
    return GroupValues(
        trained_KT=values.logprob_PKT,
        log_c_KA=values.log_c_PKA[:, :answer],
        log_c_base_A=values.log_c_base_PA[:answer],
        reward_K=values.reward_PK,
        baseline=values.baseline_P,
        advantage_K=values.advantage_PK,
    )


def rollout_table(
    step: int, groups: Sequence[Group], values: Sequence[GroupValues], ends: Sequence[str]
) -> "pa.Table":
    """A row per trace, in the order of the batch."""
    import pyarrow as pa

    from nrt_jax.training.rollout_shards import SCHEMA

    traces = [trace for group in groups for trace in group.traces]
    counts = [len(group.traces) for group in groups]
    lengths = [len(trace.tokens) for trace in traces]

    def per_group(column: Sequence[Any]) -> np.ndarray:
        return np.repeat(np.asarray(column), counts)

    trained = [
        None if of_group.trained_KT is None else of_group.trained_KT[k]
        for of_group, count in zip(values, counts, strict=True)
        for k in range(count)
    ]
    columns = {
        "step": np.full(len(traces), step),
        "group": per_group(range(len(groups))),
        "sample": np.concatenate([np.arange(count) for count in counts]),
        "source": per_group([group.example.example.source for group in groups]),
        "row": per_group([group.example.example.index for group in groups]),
        "weights_step": per_group([group.version for group in groups]),
        "tokens": _lists([trace.tokens for trace in traces], np.int32),
        "num_tokens": lengths,
        "finish": ends,
        "end_logprob": pa.array(
            np.asarray([trace.end_logprob for trace in traces], np.float32),
            mask=np.asarray([trace.end_token is None for trace in traces]),
        ),
        "logprobs": _lists([trace.logprobs for trace in traces]),
        "trained_logprobs": _lists(
            [None if x is None else x[:n] for x, n in zip(trained, lengths, strict=True)]
        ),
        "answer_logprobs": _lists([row for of_group in values for row in of_group.log_c_KA]),
        "baseline_logprobs": _lists(
            [v.log_c_base_A for v, count in zip(values, counts, strict=True) for _ in range(count)]
        ),
        "reward": np.concatenate([of_group.reward_K for of_group in values]),
        "baseline": per_group([of_group.baseline for of_group in values]),
        "advantage": np.concatenate([of_group.advantage_K for of_group in values]),
    }
    return pa.table(
        [pa.array(columns[field.name]).cast(field.type) for field in SCHEMA], schema=SCHEMA
    )


def _lists(rows: Sequence[np.ndarray | None], dtype: Any = np.float32) -> "pa.ListArray":
    """A column of lists; None is a null."""
    import pyarrow as pa

    missing = np.asarray([row is None for row in rows])
    arrays = [np.zeros(0, dtype) if row is None else row for row in rows]
    offsets = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    flat = np.concatenate(arrays).astype(dtype, copy=False)
    mask = pa.array(missing) if missing.any() else None
    return pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat), mask=mask)
