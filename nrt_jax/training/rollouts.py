"""Examples to groups of traces, groups to batches, and the metrics of both.

Letters: P prompts, K traces per prompt.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jaxtyping import Bool

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import Generate, generate, generate_and_score
from nrt_jax.engine.make import trace_sampling
from nrt_jax.engine.requests import Request
from nrt_jax.engine.weight_sync import EngineWeights
from nrt_jax.evaluation.held_out import end_name
from nrt_jax.objective.advantages import zero_std
from nrt_jax.objective.rewards import GroupRewards, score_log_rewards
from nrt_jax.training.batch import NrtBatch, group_lengths, nrt_batch
from nrt_jax.training.loss_metrics import host_reward_means
from nrt_jax.training.packing import Packer, Plan
from nrt_jax.training.setup import SAMPLING_STREAM
from nrt_jax.types import Group, SuffixLogprobs, TokenizedExample


@dataclass(frozen=True)
class Sampler:
    """Samples the groups of a step.

    A trace is a function of the run's seed, the step, the prompt, k and the weights alone.
    """

    config: RunConfig
    tokenizer: Tokenizer
    engine: Engine
    generate: Generate = generate

    def sample(
        self, weights: EngineWeights, examples: Sequence[TokenizedExample], step: int
    ) -> list[Group]:
        """K traces of each example, all of them drawn with the same weights.

        These also score y* where the update needs it: after every trace when groups are dropped or
        the reward is theirs, and after the empty trace when the update's weights are newer.
        """
        rollout, key = self.config.rollout, sampling_key(self.config.seed, step)
        requests = [
            self._request(example, stream)
            for example, stream in zip(examples, random_streams(examples), strict=True)
        ]
        run = (self.engine, weights.params)
        if not self._scores:
            traces = self.generate(*run, requests, key, steps=rollout.decode_steps)
            return [Group(e, t, weights.version) for e, t in zip(examples, traces, strict=True)]
        if rollout.driver == "loop":
            traces, logprobs = generate_and_score(*run, requests, key, steps=rollout.decode_steps)
        else:
            # This driver scores nothing: the baselines come beside a token that nobody reads.
            traces = self.generate(*run, requests, key, steps=rollout.decode_steps)
            one_token = [r._replace(num_samples=1, max_tokens=1) for r in requests]
            _, logprobs = generate_and_score(*run, one_token, key, steps=1)
        return [
            Group(
                example=example,
                traces=of_example,
                version=weights.version,
                log_c_KA=score.samples_KA if self._scores_traces else None,
                log_c_base_A=score.empty_A,
            )
            for example, of_example, score in zip(examples, traces, logprobs, strict=True)
        ]

    @property
    def _scores(self) -> bool:
        """Whether y* is scored after the empty traces at least."""
        return self._scores_traces or self.config.rollout.staleness > 0

    @property
    def _scores_traces(self) -> bool:
        """Whether y* is scored after every trace."""
        rollout, objective = self.config.rollout, self.config.objective
        stale_reward = rollout.staleness > 0 and objective.reward_policy == "sampling"
        return rollout.drop_zero_std_groups or stale_reward

    def _request(self, example: TokenizedExample, stream: int) -> Request:
        """Limit the trace so that t_start, z, t_end and y* fit max_response_tokens."""
        rollout, tokenizer = self.config.rollout, self.tokenizer
        longest_trace = rollout.max_response_tokens - len(example.answer_tokens) - 2
        suffix = None
        if self._scores:
            suffix = np.append(np.int32(tokenizer.think_end_id), example.answer_tokens)
        return Request(
            prompt_tokens=example.trace_prompt(tokenizer.think_start_id),
            stream=stream,
            num_samples=rollout.traces_per_prompt,
            max_tokens=min(rollout.max_trace_tokens, longest_trace),
            sampling=trace_sampling(rollout),
            suffix_tokens=suffix,
            score_samples=self._scores_traces,
        )


def random_streams(examples: Sequence[TokenizedExample]) -> list[int]:
    """Name of the noise of each example of a batch: its row, and another for the row's next time.

    Names of next times are negative, so they are no row's.
    """
    times, streams = Counter(), []
    for example in examples:
        row = example.example.index
        if times[row]:
            again = np.random.SeedSequence((row, times[row])).generate_state(1)[0] >> 1
            streams.append(-1 - int(again))
        else:
            streams.append(row)
        times[row] += 1
    return streams


def sampling_key(seed: int, step: int) -> jax.Array:
    """Key of a step's rollouts, from the run's seed and the step alone."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), SAMPLING_STREAM), step)


class MiniBatch(NamedTuple):
    """The arrays of one update."""

    micro_batches: list[NrtBatch]
    plans: list[Plan]
    kept: bool
    """False when every group was dropped: the arrays then hold one that has no part in the loss."""
    chosen: list[int]
    """The groups that the plans count, by their index in the mini-batch."""


def make_batches(
    groups: Sequence[Group], packer: Packer, config: RunConfig, tokenizer: Tokenizer
) -> list[MiniBatch]:
    """The groups as arrays; a group with zero std, where these are dropped, takes no row."""
    kept_P = np.ones(len(groups), bool)
    if config.rollout.drop_zero_std_groups:
        objective = config.objective
        logs = SCHEMES[objective.scheme].positive
        kept_P = ~np.asarray(
            _zero_std(*_rewards(groups, objective), objective.estimator, logs=logs)
        )
    size = config.train.mini_batch_prompts
    think = {"think_start": tokenizer.think_start_id, "think_end": tokenizer.think_end_id}
    return [
        mini_batch(groups[start : start + size], kept_P[start : start + size], packer, **think)
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
    # An update needs at least one group for the shapes of its arrays.
    chosen = np.flatnonzero(kept_P).tolist() or [0]
    members = [groups[p] for p in chosen]
    kept, plans = bool(kept_P.any()), packer.plan([group_lengths(group) for group in members])
    how = {"think_start": think_start, "think_end": think_end, "kept": kept}
    return MiniBatch([nrt_batch(members, plan, **how) for plan in plans], plans, kept, chosen)


_zero_std = partial(jax.jit, static_argnames=("estimator", "logs"))(zero_std)


def _rewards(groups: Sequence[Group], objective: ObjectiveConfig) -> GroupRewards:
    """log R of groups under the weights that drew their traces."""
    scores = []
    for group in groups:
        assert group.log_c_KA is not None
        assert group.log_c_base_A is not None
        scores.append(SuffixLogprobs(group.log_c_KA, group.log_c_base_A))
    return score_log_rewards(scores, objective)


def rollout_metrics(sampler: Sampler, groups: Sequence[Group], step: int) -> dict[str, float]:
    """Lengths and ends of the traces, the age of the weights that drew them, the share of dropped
    groups, and the tokens of the answers (once per question).

    Where groups are scored when they are sampled, `reward/` is over all groups by these scores.
    """
    config = sampler.config
    staleness = max(step - 1 - group.version for group in groups)
    assert 0 <= staleness <= config.rollout.staleness, "older weights than the config allows"
    metrics = _trace_metrics(groups, sampler.tokenizer)
    metrics["rollout/staleness"] = float(staleness)
    metrics["data/answer_tokens"] = float(sum(len(g.example.answer_tokens) for g in groups))
    if config.rollout.drop_zero_std_groups:
        rewards = _rewards(groups, config.objective)
        every = np.ones(len(groups), bool)
        means = jax.device_get(host_reward_means(*rewards, every, objective=config.objective))
        metrics |= {name: float(total / count) for name, (total, count) in means.items()}
        metrics["rollout/dropped_share"] = metrics["reward/zero_std_share"]
    return metrics


def _trace_metrics(groups: Sequence[Group], tokenizer: Tokenizer) -> dict[str, float]:
    traces = [trace for group in groups for trace in group.traces]
    lengths = np.asarray([len(trace.tokens) for trace in traces])
    ends = [end_name(tokenizer, trace) for trace in traces]
    think_end = tokenizer.token(tokenizer.think_end_id)
    others = sum(end not in (think_end, "length") for end in ends)
    prompt_tokens = sum(len(group.example.prompt_tokens) for group in groups)
    answer_tokens = sum(len(g.example.answer_tokens) * len(g.traces) for g in groups)
    return {
        "trace/tokens": float(lengths.mean()),
        "trace/tokens_max": float(lengths.max()),
        "trace/end_think_end_share": ends.count(think_end) / len(ends),
        "trace/end_length_share": ends.count("length") / len(ends),
        "trace/end_other_share": others / len(ends),
        "speed/tokens": float(lengths.sum() + prompt_tokens + answer_tokens),
    }
