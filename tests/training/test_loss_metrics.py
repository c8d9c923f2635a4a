"""Metrics of a micro-batch and of its rollout, against plain loops over groups and tokens."""

import math
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest

from nrt_jax.data.task_tokenizers import write_quickstart_tokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.training.frozen_logprobs import frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.nrt import _warn_of_zero_signals
from nrt_jax.training.rollouts import _trace_metrics
from nrt_jax.training.update import summarise
from tests.objective import oracle
from tests.training import worlds
from tests.training.plain_loss import Policy
from tests.training.worlds import THINK_END, THINK_START

PROMPTS, TRACES, CAP = 4, 4, 20.0
DEFINITION, PARAMS = worlds.tiny_decoder()
POLICY = Policy(DEFINITION, PARAMS, THINK_START, THINK_END)
REFERENCE = jax.tree.map(lambda w: w * 1.2, PARAMS)
OBJECTIVE = {
    "scheme": "ws_inv_p",
    "weight_cap": CAP,
    "old_logprobs": "recompute",
    "importance_cap": 1.5,
    "trace_covers": "z_and_end",
    "kl_coefficient": 0.3,
}


def by_hand(groups) -> dict[str, Any]:
    """What the names say, one trace at a time."""
    log_ratios, format_nats, capped, equal, kl = [], [], [], [], 0.0
    for group in groups:
        prompt, answer = group.example.prompt_tokens, group.example.answer_tokens
        base = POLICY.logprobs(prompt, [], answer, 1.0)[3]
        capped += [math.exp(-log_c) > CAP for log_c in base]
        rewards = []
        for trace in group.traces:
            start, z, end, y = POLICY.logprobs(prompt, trace.tokens, answer, 1.0)
            log_ratios += [a - b for a, b in zip(z, trace.logprobs.tolist(), strict=True)]
            if trace.end_token == THINK_END:
                log_ratios.append(end - trace.end_logprob)
            format_nats.append(-start - end)
            y = y if len(trace.tokens) else base
            rewards.append(oracle.aggregate("ws_inv_p", y, base, "sum", CAP)[0])
            reference = POLICY._replace(params=REFERENCE)
            of_reference = reference.logprobs(prompt, trace.tokens, answer, 1.0)[1]
            kl += sum(math.exp(b - a) - 1 - (b - a) for a, b in zip(z, of_reference, strict=True))
        baseline = oracle.aggregate("ws_inv_p", base, base, "sum", CAP)[0]
        equal.append(not any(oracle.advantages(rewards, baseline, "grpo")))
    ratios = np.exp(log_ratios)
    return {
        "importance/ratio": ratios.mean(),
        "importance/ratio_max": ratios.max(),
        "importance/truncated_share": np.mean(ratios > 1.5),
        "mismatch/mean": np.abs(log_ratios).mean(),
        "mismatch/max": np.abs(log_ratios).max(),
        "policy/format_nats": np.mean(format_nats),
        "policy/ratio": 1.0,
        "reward/capped_weight_share": np.mean(capped),
        "reward/zero_std_share": np.mean(equal),
        "loss/kl": 0.3 * kl / (8 * PROMPTS * TRACES),
    }


def test_metrics_are_those_of_plain_loops():
    groups = worlds.random_groups(PROMPTS, TRACES)
    batch, settings = worlds.batch_of(groups), worlds.settings(DEFINITION, **OBJECTIVE)
    frozen = frozen_logprobs_fn(settings, several_updates=False, reference=REFERENCE)
    _, metrics = jax.jit(
        lambda params, frozen: nrt_loss(
            params, batch, frozen, sequences=PROMPTS * TRACES, settings=settings
        )
    )(PARAMS, frozen(PARAMS, batch))
    found, expected = summarise(metrics), by_hand(groups)
    assert 0 < expected["reward/capped_weight_share"] < 1
    assert 0 < expected["importance/truncated_share"] < 1
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=5e-4, abs=1e-5), name


def test_what_is_said_of_the_traces(tmp_path):
    write_quickstart_tokenizer(tmp_path)
    tokenizer = Tokenizer.load(tmp_path)
    end = {THINK_END: tokenizer.think_end_id, worlds.EOS: tokenizer.eos_id, None: None}
    groups = [
        replace(group, traces=tuple(replace(t, end_token=end[t.end_token]) for t in group.traces))
        for group in worlds.random_groups(3, 4)
    ]
    lengths = [len(trace.tokens) for group in groups for trace in group.traces]
    rest = [
        len(group.example.prompt_tokens) + 4 * len(group.example.answer_tokens) for group in groups
    ]
    assert _trace_metrics(groups, tokenizer) == {
        "trace/tokens": pytest.approx(sum(lengths) / 12),
        "trace/tokens_max": max(lengths),
        "trace/end_think_end_share": 1 / 2,
        "trace/end_length_share": 1 / 4,
        "trace/end_other_share": 1 / 4,
        "speed/tokens": sum(lengths) + sum(rest),
    }


@pytest.mark.parametrize(
    ("scheme", "share", "warns"),
    [
        ("p", 0.0, False),
        ("p", 0.01, True),
        ("gm", 1.0, True),
        # Tokens that the empty trace is sure of have no weight.
        ("ws_neg_log_p", 0.9, False),
        ("ws_neg_log_p", 1.0, True),
    ],
)
def test_answers_that_the_loss_does_not_train_are_named(scheme, share, warns, caplog):
    assert _warn_of_zero_signals(7, {"reward/zero_signal_share": share}, scheme) == warns
    if warns:
        assert caplog.messages == [
            f"step 7: the token signal of {100 * share:.3g} % of the answer tokens is 0 in "
            f"float32, so the loss does not train them (objective.scheme={scheme}; "
            "reward/zero_signal_share); set objective.token_signal=fixed, or choose another scheme"
        ]
