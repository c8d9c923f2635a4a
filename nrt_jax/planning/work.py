"""The work of one step: tokens, operations, and how many micro-batches and decode steps it takes.

Letters: P prompts, K traces per prompt, S, Z and A mean tokens of prompt, trace and answer.
"""

import math
from typing import NamedTuple

from nrt_jax.config.run import RunConfig
from nrt_jax.models.flops import Flops, Rows, forward_flops, recomputed_flops
from nrt_jax.planning.setting import Setting


class Lengths(NamedTuple):
    """Mean tokens of a row, and padding, which no config names."""

    prompt: int = 300
    trace: int = 400
    answer: int = 416
    padding: float = 0.08
    """Share of the positions of micro-batches that hold no token; docs/training.md measures it."""

    def within(self, config: RunConfig) -> "Lengths":
        """The same, no longer than the limits of a config."""
        prompt = min(self.prompt, config.data.max_prompt_tokens)
        answer = min(self.answer, config.data.max_answer_tokens)
        rollout, trace = config.rollout, 0
        if config.method == "nrt":
            most = min(rollout.max_trace_tokens, rollout.max_response_tokens - answer - 2)
            trace = max(1, min(self.trace, most))
        return self._replace(prompt=prompt, trace=trace, answer=answer)

    def longest_trace(self, config: RunConfig) -> int:
        """Of a step: of n exponentially distributed lengths the longest is about ln n times the
        mean."""
        count = config.train.batch_prompts * config.rollout.traces_per_prompt
        longest = self.trace * max(1.0, math.log(count))
        return round(min(config.rollout.max_trace_tokens, longest))

    def longest_prompt(self, config: RunConfig) -> int:
        """Of a step, likewise."""
        longest = self.prompt * max(1.0, math.log(config.train.batch_prompts))
        return round(min(config.data.max_prompt_tokens, longest))


class Pass(NamedTuple):
    """Rows that run alike, and their operations on all devices, with no padding."""

    rows: Rows
    """Their keys are those that attention computes."""
    seen: Rows
    """The same with the keys that are seen."""
    gradient: bool


class Work(NamedTuple):
    """A step on all devices."""

    tokens: int
    """Of prompts (once), traces and answers (once per trace), as `speed/tokens` counts."""
    updates: int
    micro_batches: int
    """Of one update."""
    micro_tokens: float
    """Positions of one micro-batch that have a gradient, padding included."""
    micro_baselines: float
    """Positions of one micro-batch that have none."""
    micro_scored: float
    """Positions of one micro-batch that the head scores."""
    update: Flops
    """Operations of all updates, recomputed ones included."""
    update_model: float
    """The same without what is computed again, and with the keys that are seen."""
    scoring: Flops
    """Before the updates; 0 where nothing is."""
    scored_tokens: float
    """Positions that scoring runs, padding included."""
    prefill: Flops
    decode: Flops
    decode_steps: float
    slots: int
    """Sequences in a decode step."""


def work(setting: Setting, lengths: Lengths) -> Work:
    """Of one step with groups of these mean lengths."""
    config = setting.config
    lengths = lengths.within(config)
    passes = _passes(setting, lengths)
    padded = 1 / (1 - lengths.padding)
    groups = config.train.batch_prompts
    updates = groups // config.train.mini_batch_prompts
    micro_batches = _micro_batches(setting, lengths)
    trained = sum(p.rows.tokens for p in passes if p.gradient) * groups * padded
    baselines = sum(p.rows.tokens for p in passes if not p.gradient) * groups * padded
    scores = _scoring(setting, passes)
    heads = sum(p.rows.scored for p in passes if p.gradient) * groups * padded
    micro = updates * micro_batches
    # Several updates share baselines that are scored before them.
    again = config.train.mini_batch_prompts < groups and config.method == "nrt"
    kept = [p for p in passes if p.gradient or not again]
    scored_tokens = sum(p.rows.tokens for p in scores) * groups * padded
    prefill, decode, steps, slots = _rollout(setting, lengths)
    S, Z, A, _ = lengths
    K = config.rollout.traces_per_prompt if config.method == "nrt" else 1
    return Work(
        tokens=groups * (S + K * (Z + A)),
        updates=updates,
        micro_batches=micro_batches,
        micro_tokens=trained / micro,
        micro_baselines=0.0 if again else baselines / micro,
        micro_scored=heads / micro,
        update=_sum([_trained(setting, p, padded * groups) for p in kept]),
        update_model=sum(_model(setting, p, groups) for p in kept),
        scoring=_sum([_times(_forward(setting, p.rows), padded * groups) for p in scores]),
        scored_tokens=scored_tokens,
        prefill=prefill,
        decode=decode,
        decode_steps=steps,
        slots=slots,
    )


# --- training ------------------------------------------------------------------------------------


def _passes(setting: Setting, lengths: Lengths) -> list[Pass]:
    """Of one group: its prompt, its completions, its baseline; of SFT its row."""
    S, Z, A, _ = lengths
    if setting.config.method == "sft":
        row = S + A - 1
        return [_pass(setting, Rows(row, (row + 1) / 2, row), row, gradient=True)]
    K = setting.config.rollout.traces_per_prompt
    T, E = Z + 1 + A, 1 + A
    return [
        # Its last state is scored for t_start.
        _pass(setting, Rows(S, (S + 1) / 2, 1), S, gradient=True),
        _pass(setting, Rows(K * T, S + (T + 1) / 2, K * T), S + T, gradient=True),
        _pass(setting, Rows(E, S + (E + 1) / 2, E), S + E, gradient=False),
    ]


def _pass(setting: Setting, seen: Rows, keys: int, *, gradient: bool) -> Pass:
    """XLA's and cuDNN's attention compute all keys of a row, splash those that are seen."""
    computed = seen if setting.attention == "splash" else seen._replace(keys=keys)
    return Pass(computed, seen, gradient)


def _scoring(setting: Setting, passes: list[Pass]) -> list[Pass]:
    """What runs before the updates; a KL term runs everything under the reference too."""
    config = setting.config
    objective, train = config.objective, config.train
    if config.method == "sft":
        return []
    prompt, completions, baseline = passes
    stale = config.rollout.staleness > 0
    wants_c = objective.reward_policy == "sampling" and not stale
    several = train.mini_batch_prompts < train.batch_prompts
    wants_base = wants_c or (several and not stale)
    every = [prompt, completions, *([baseline] if wants_base else [])]
    found = []
    if wants_c or objective.old_logprobs == "recompute":
        found = every
    elif wants_base:
        found = [prompt, baseline]
    return found + ([prompt, completions] if objective.kl_coefficient else [])


def _micro_batches(setting: Setting, lengths: Lengths) -> int:
    """Of one update: packs of several groups take no more memory than one of the largest."""
    S, Z, A, _ = lengths
    config, shape = setting.config, setting.shape
    K = config.rollout.traces_per_prompt if config.method == "nrt" else 1
    group = S + K * (Z + 1 + A) + 1 + A if config.method == "nrt" else S + A - 1
    groups = config.train.mini_batch_prompts
    if not config.train.packing:
        return groups // config.train.micro_batch_prompts
    room = shape.packs * shape.pack_tokens * (1 - lengths.padding)
    return max(1, math.ceil(groups * group / room))


def _forward(setting: Setting, rows: Rows) -> Flops:
    return forward_flops(setting.architecture, rows, setting.config.model.vocab_multiple)


def _trained(setting: Setting, one: Pass, times: int | float) -> Flops:
    """Forward, and backward with what is computed again, for a pass with a gradient."""
    forward = _forward(setting, one.rows)
    if not one.gradient:
        return _times(forward, times)
    again = recomputed_flops(setting.architecture, one.rows, setting.config.model.remat)
    again = again._replace(head=forward.head)
    return _times(Flops(*(3 * f + r for f, r in zip(forward, again, strict=True))), times)


def _model(setting: Setting, one: Pass, times: int | float) -> float:
    return (3 if one.gradient else 1) * _forward(setting, one.seen).total * times


def _times(flops: Flops, factor: int | float) -> Flops:
    return Flops(*(factor * part for part in flops))


def _sum(parts: list[Flops]) -> Flops:
    return Flops(*(sum(part) for part in zip(*parts, strict=True))) if parts else Flops(0, 0, 0)


# --- rollouts ------------------------------------------------------------------------------------


def _rollout(setting: Setting, lengths: Lengths) -> tuple[Flops, Flops, float, int]:
    """Operations of prefill and decoding, decode steps, and sequences of a step.

    The longest traces decode on when the others have ended.
    """
    config = setting.config
    if config.method == "sft":
        return Flops(0, 0, 0), Flops(0, 0, 0), 0.0, 0
    S, Z, *_ = lengths
    P, K = config.train.batch_prompts, config.rollout.traces_per_prompt
    slots = min(config.rollout.slots, P * K)
    prefill = _times(_forward(setting, Rows(S + 1, (S + 2) / 2, 1)), P)
    keys = S + Z / 2
    decode = _times(_forward(setting, Rows(1, keys, 1)), P * K * Z)
    tail = lengths.longest_trace(config) - Z
    return prefill, decode, P * K * Z / slots + tail, slots
