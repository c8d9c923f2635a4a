"""The loss by Algorithm 1 in loops over groups, traces and tokens, one sequence at a time."""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.types import Group, TokenizedExample
from tests.objective import oracle


class Policy(NamedTuple):
    """A model with its think tokens."""

    definition: nnx.GraphDef
    params: Any
    think_start: int
    think_end: int

    def logprobs(self, prompt, trace, answer, temperature):
        """log pi of t_start, of each token of z, of t_end, and of each token of y*."""
        sequence = np.concatenate([prompt, [self.think_start], trace, [self.think_end], answer])
        sequence = sequence.astype(np.int32)
        logits = self._logits(sequence)
        plain, tempered = log_softmax(logits), log_softmax(logits / temperature)
        at = [plain[i, sequence[i + 1]] for i in range(len(sequence) - 1)]
        tempered_at = [tempered[i, sequence[i + 1]] for i in range(len(sequence) - 1)]
        x, n = len(prompt), len(trace)
        return at[x - 1], tempered_at[x : x + n], at[x + n], at[x + n + 1 :]

    def answer_logprobs(self, prompt, answer):
        """log pi of each token of y* directly after x."""
        sequence = np.concatenate([prompt, answer]).astype(np.int32)
        plain, x = log_softmax(self._logits(sequence)), len(prompt)
        return [plain[x - 1 + i, token] for i, token in enumerate(answer)]

    def _logits(self, sequence):
        return np.asarray(logits_of(self.definition, self.params, sequence), np.float64)


def logits_of(definition, params, sequence):
    """Logits after each token of a sequence."""
    # Tokens behind the end change nothing before it, and spare a compilation per length.
    padded = np.zeros((1, -(-len(sequence) // 32) * 32), np.int32)
    padded[0, : len(sequence)] = sequence
    return _forward(definition, params, padded)[0, : len(sequence)]


@partial(jax.jit, static_argnums=0)
def _forward(definition, params, tokens):
    return nnx.merge(definition, params)(tokens)


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def plain_loss(
    policy: Policy,
    groups: list[Group],
    config: ObjectiveConfig,
    temperature: float = 1.0,
    sequences: int | None = None,
    sampling: Policy | None = None,
) -> dict[str, float]:
    """The terms of the loss of these groups, in a mini-batch of `sequences` traces (default: all).

    The first mini-batch of a step: recomputed old logprobs are the current ones. `sampling` is the
    policy that drew the traces, where that is another one.
    """
    sampling = sampling or policy
    judge = sampling if config.reward_policy == "sampling" else policy
    terms = {"trace": 0.0, "token": 0.0, "format": 0.0}
    for group in groups:
        prompt, answer = group.example.prompt_tokens, group.example.answer_tokens
        base = sampling.logprobs(prompt, [], answer, temperature)[3]
        how = (config.ws_normalisation, config.weight_cap)
        baseline, _ = oracle.aggregate(config.scheme, base, base, *how)
        scored = [policy.logprobs(prompt, t.tokens, answer, temperature) for t in group.traces]
        judged = [
            judge.logprobs(prompt, t.tokens, answer, temperature)[3] if len(t.tokens) else base
            for t in group.traces
        ]
        rewarded = [oracle.aggregate(config.scheme, log_c, base, *how) for log_c in judged]
        advantage = oracle.advantages([r for r, _ in rewarded], baseline, config.estimator)
        for trace, (start, z, end, y), (_, signal), A in zip(
            group.traces, scored, rewarded, advantage, strict=True
        ):
            emitted = trace.end_token == policy.think_end
            pairs = list(zip(z, trace.logprobs.tolist(), strict=True))
            if config.trace_covers == "z_and_end" and emitted:
                pairs.append((end, trace.end_logprob))
            for new, sampler in pairs:
                terms["trace"] += _trace_loss(new, sampler, A, config)
            ratio = 1.0
            if config.token_ratio == "trace":
                total = sum(z) - float(trace.logprobs.astype(float).sum())
                ratio = min(math.exp(min(total, 20)), config.token_ratio_cap)
            fixed = config.token_signal == "fixed"
            for S, log_c in zip(signal, y, strict=True):
                terms["token"] -= ratio * (1.0 if fixed else S) * log_c
            if config.format_where == "all":
                terms["format"] -= config.format_coefficient * (start + end)
            elif config.format_where == "natural_end":
                ended = trace.end_token is not None
                terms["format"] -= config.format_coefficient * (start + (end if ended else 0))
            elif not emitted:
                terms["format"] -= config.format_coefficient * end
    sequences = sequences or sum(len(group.traces) for group in groups)
    return {name: term / (config.length_constant * sequences) for name, term in terms.items()}


def _trace_loss(new: float, sampler: float, A: float, config: ObjectiveConfig) -> float:
    surrogate = oracle.ppo_clip if config.policy_loss == "ppo_clip" else oracle.cispo
    old, weight = sampler, 1.0
    if config.old_logprobs == "recompute":
        old = new
        if config.importance_cap is not None:
            weight = min(math.exp(old - sampler), config.importance_cap)
    return weight * surrogate(new, old, A, config.clip_low, config.clip_high)


def plain_sft_loss(policy: Policy, examples: list[TokenizedExample]) -> float:
    """Mean cross-entropy over all answer tokens of the examples."""
    logprobs = [
        logprob
        for example in examples
        for logprob in policy.answer_logprobs(example.prompt_tokens, example.answer_tokens)
    ]
    return -sum(logprobs) / len(logprobs)
