"""Examples to groups of traces, groups to a batch, and what is told about them.

Letters: P prompts, K traces a prompt.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from nrt_jax.engine.engine import DecoderEngine
from nrt_jax.engine.generate import generate, generate_and_score
from nrt_jax.engine.make import trace_engine
from nrt_jax.engine.sampling import Sampling
from nrt_jax.engine.scheduler import Request
from nrt_jax.engine.weight_sync import EngineWeights
from nrt_jax.evaluation.held_out import end_name
from nrt_jax.objective.advantages import zero_std
from nrt_jax.objective.rewards import score_rewards
from nrt_jax.training.batch import TrainBatch, group_lengths, nrt_batch
from nrt_jax.training.loss_metrics import reward_means
from nrt_jax.training.packing import Packer, Plan
from nrt_jax.training.setup import Run
from nrt_jax.types import Group, TokenizedExample


def rollout_engine(run: Run) -> DecoderEngine:
    """The engine that evaluation samples traces with, so that its programs are compiled once."""
    if run.answerer is not None and run.answerer.trace_engine is not None:
        return run.answerer.trace_engine
    return trace_engine(run.config, run.engine_model, run.tokenizer)


def sample_groups(
    run: Run,
    engine: DecoderEngine,
    weights: EngineWeights,
    examples: Sequence[TokenizedExample],
    step: int,
) -> list[Group]:
    """K traces of every example for one step, all of them drawn with the same weights."""
    rollout, key = run.config.rollout, run.sampling_key(step)
    requests = [_request(run, example) for example in examples]
    if not rollout.drop_zero_std_groups:
        traces = generate(engine, weights.params, requests, key, steps=rollout.decode_steps)
        return [Group(e, t, weights.version) for e, t in zip(examples, traces, strict=True)]
    traces, scores = generate_and_score(
        engine, weights.params, requests, key, steps=rollout.decode_steps
    )
    judged = score_rewards(scores, run.config.objective)
    return [
        Group(example, group, weights.version, reward_K, float(baseline))
        for example, group, reward_K, baseline in zip(examples, traces, *judged, strict=True)
    ]


def _request(run: Run, example: TokenizedExample) -> Request:
    """A long answer leaves room for itself: t_start, z, t_end and y* fit the response."""
    rollout, tokenizer = run.config.rollout, run.tokenizer
    room = rollout.max_response_tokens - len(example.answer_tokens) - 2
    suffix = None
    if rollout.drop_zero_std_groups:
        suffix = np.concatenate([[tokenizer.think_end_id], example.answer_tokens]).astype(np.int32)
    return Request(
        np.append(example.prompt_tokens, tokenizer.think_start_id).astype(np.int32),
        example.example.index,
        rollout.traces_per_prompt,
        min(rollout.max_trace_tokens, room),
        Sampling(
            temperature=rollout.temperature,
            top_p=rollout.top_p,
            top_k=rollout.top_k,
            min_p=rollout.min_p,
            repetition_penalty=rollout.repetition_penalty,
        ),
        suffix,
    )


class MiniBatch(NamedTuple):
    """The arrays of one update."""

    micro_batches: list[TrainBatch]
    plans: list[Plan]
    kept: bool
    """Whether the loss is of any group."""


def make_batches(run: Run, groups: Sequence[Group]) -> list[MiniBatch]:
    """The groups as arrays; those with zero std, where they are dropped, take no place."""
    kept_P = np.ones(len(groups), bool)
    if run.config.rollout.drop_zero_std_groups:
        kept_P = ~np.asarray(zero_std(*_rewards(groups), run.config.objective.estimator))
    size = run.config.train.mini_batch_prompts
    think = {"think_start": run.tokenizer.think_start_id, "think_end": run.tokenizer.think_end_id}
    return [
        mini_batch(groups[start : start + size], kept_P[start : start + size], run.packer, **think)
        for start in range(0, len(groups), size)
    ]


def mini_batch(
    groups: Sequence[Group],
    kept_P: Bool[np.ndarray, "P"],
    packer: Packer,
    *,
    think_start: int,
    think_end: int,
) -> MiniBatch:
    """Arrays of the groups that are kept; where none is, of one that has no part in the loss."""
    # An update of no groups would have no shape.
    chosen = [group for group, kept in zip(groups, kept_P, strict=True) if kept] or groups[:1]
    kept, plans = bool(kept_P.any()), packer.plan([group_lengths(group) for group in chosen])
    how = {"think_start": think_start, "think_end": think_end, "kept": kept}
    return MiniBatch([nrt_batch(chosen, plan, **how) for plan in plans], plans, kept)


def _rewards(
    groups: Sequence[Group],
) -> tuple[Float[np.ndarray, "P K"], Float[np.ndarray, " P"]]:
    return (
        np.stack([np.asarray(group.rewards, np.float32) for group in groups]),
        np.asarray([group.baseline for group in groups], np.float32),
    )


def rollout_metrics(
    run: Run, engine: DecoderEngine, groups: Sequence[Group], step: int
) -> dict[str, float]:
    """Length and endings of the traces, the age of the weights that drew them, what was dropped,
    and how many programs the engine compiled so far.

    Where groups were scored when they were sampled, `reward/` is of all of them by these scores.
    """
    staleness = max(step - 1 - group.version for group in groups)
    assert 0 <= staleness <= run.config.rollout.staleness, "older weights than the config allows"
    metrics = _trace_metrics(run, groups) | dict(run.engine_weights().metrics)
    metrics["rollout/staleness"] = float(staleness)
    metrics["speed/programs"] = float(sum(engine.compiled.values()))
    if run.config.rollout.drop_zero_std_groups:
        means = reward_means(*_rewards(groups), np.ones(len(groups), bool), run.config.objective)
        metrics |= {name: float(total / count) for name, (total, count) in means.items()}
        metrics["rollout/dropped_share"] = metrics["reward/no_spread_share"]
    return metrics


def _trace_metrics(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    traces = [trace for group in groups for trace in group.traces]
    lengths = np.asarray([len(trace.tokens) for trace in traces])
    names = [end_name(run.tokenizer, trace) for trace in traces]
    think_end = run.tokenizer.token(run.tokenizer.think_end_id)
    other = sum(name not in (think_end, "length") for name in names)
    prompt_tokens = sum(len(group.example.prompt_tokens) for group in groups)
    answer_tokens = sum(len(group.example.answer_tokens) for group in groups)
    per_group = run.config.rollout.traces_per_prompt
    return {
        "trace/tokens": float(lengths.mean()),
        "trace/tokens_max": float(lengths.max()),
        "trace/end_think_end_share": names.count(think_end) / len(names),
        "trace/end_length_share": names.count("length") / len(names),
        "trace/end_other_share": other / len(names),
        "speed/tokens": float(lengths.sum() + prompt_tokens + per_group * answer_tokens),
    }
