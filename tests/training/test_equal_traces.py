"""Equal traces have equal rewards, and an empty one that of the baseline, whatever the rounding."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.models.decoder import Decoder
from nrt_jax.training import loss
from nrt_jax.training.batch import NrtBatch, answer_mask, answer_values
from nrt_jax.training.forward import group_logprobs
from nrt_jax.training.frozen_logprobs import FrozenLogprobs, frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.update import summarise
from nrt_jax.types import Group, Trace, reward_sources
from tests.training import worlds

DEFINITION, PARAMS = worlds.tiny_decoder()
# Large enough for rounding to depend on where in a row a completion stands.
LARGER = worlds.ARCHITECTURE.model_copy(
    update={"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "head_dim": 16}
)
HALF, _STATE = nnx.split(Decoder(LARGER, nnx.Rngs(0), dtype=jnp.bfloat16))
HALF_PARAMS = nnx.to_pure_dict(_STATE)


def trace(*tokens: int) -> Trace:
    logprobs = np.full(len(tokens), -2.5, np.float32)
    return Trace(np.asarray(tokens, np.int32), logprobs, worlds.THINK_END, -1.0)


MIXED = (trace(5, 7), trace(), trace(6, 8, 9), trace(), trace(4))


def groups_of(*traces: Trace) -> list[Group]:
    """Eight groups with these traces, in prompts and answers of many lengths."""
    return [replace(group, traces=traces) for group in worlds.random_groups(8, 1, seed=3)]


def test_sources():
    traces = [trace(5, 7), trace(), trace(5, 7), trace(5), trace(), trace(7, 5), trace(5)]
    assert reward_sources(traces) == [1, 0, 1, 4, 0, 6, 4]


def packed(groups: list[Group]) -> NrtBatch:
    """The first micro-batch of the groups, several completions to a row."""
    return worlds.batches_of(groups, Packer(Layout(8)))[0]


def in_half_precision(groups: list[Group], **objective) -> dict[str, float]:
    """Metrics of the groups' loss, packed into rows, under a decoder that computes in bfloat16."""
    settings = worlds.settings(HALF, **objective)
    batch = packed(groups)

    @jax.jit
    def metrics(params, batch):
        return nrt_loss(params, batch, FrozenLogprobs(), sequences=8, settings=settings)[1]

    return {name: float(value) for name, value in summarise(metrics(HALF_PARAMS, batch)).items()}


@cache
def rounding() -> float:
    """Largest difference of log c after the empty trace from log c_base, in bfloat16."""
    batch = packed(groups_of(*MIXED))

    @jax.jit
    def gap(params, batch):
        decoder, settings = nnx.merge(HALF, params), worlds.settings(HALF)
        scored = group_logprobs(decoder, settings, batch, baselines=True)
        assert scored.log_c_base_PA is not None
        log_c_PA = answer_values(scored.logprob_PKT, batch.groups)[:, 1]
        gap_PA = jnp.abs(log_c_PA - scored.log_c_base_PA)
        return jnp.where(answer_mask(batch.groups), gap_PA, 0).max()

    return float(gap(HALF_PARAMS, batch))


@pytest.mark.parametrize(
    ("traces", "estimator"),
    [
        ([trace(5, 7)] * 3, "grpo_unclipped"),
        ([trace()] * 3, "clip01"),
        # The empty trace is the best one, and no other gains anything.
        ([trace(), trace(4, 4, 4), trace()], "grpo"),
    ],
)
def test_rounding_makes_no_trace_term(traces, estimator, monkeypatch):
    """Whatever the logprobs of each trace are off by."""

    def off(decoder, settings, batch, **asked):
        scored = group_logprobs(decoder, settings, batch, **asked)
        noise_K11 = 1e-2 * jnp.arange(1, 4)[:, None]
        empty_PK1 = (batch.groups.trace_length_PK == 0)[:, :, None]
        worse_PK1 = jnp.any(empty_PK1, axis=1, keepdims=True) & ~empty_PK1
        return scored._replace(logprob_PKT=scored.logprob_PKT + noise_K11[None] - 50.0 * worse_PK1)

    monkeypatch.setattr(loss, "group_logprobs", off)
    batch, settings = packed(groups_of(*traces)), worlds.settings(DEFINITION, estimator=estimator)
    _, metrics = jax.jit(
        lambda params: nrt_loss(params, batch, FrozenLogprobs(), sequences=8, settings=settings)
    )(PARAMS)
    found = summarise(metrics)
    assert found["loss/trace"] == 0
    assert found["reward/zero_std_share"] == 1
    if not traces[0].tokens.size:
        assert found["reward/above_baseline_share"] == 0


def test_an_empty_trace_is_never_above_the_baseline_in_bfloat16():
    assert rounding() > 1e-3, "without a remedy rounding would decide"
    metrics = in_half_precision(groups_of(*[trace()] * 5), scheme="ws_neg_log_p")
    assert metrics["reward/above_baseline_share"] == 0
    assert metrics["reward/mean"] == pytest.approx(metrics["reward/baseline"], rel=1e-6)
    # The answer is trained after these traces as after any other.
    assert metrics["loss/token"] > 0


def test_a_moved_policy_leaves_the_empty_trace_at_the_baseline():
    """Its c is c_base, that of the sampling policy, in later mini-batches too."""
    batch = packed(groups_of(trace(), trace()))
    settings = worlds.settings(DEFINITION)
    frozen = frozen_logprobs_fn(settings, several_updates=True, reference=None)(PARAMS, batch)
    moved = jax.tree.map(lambda w: w * 1.3, PARAMS)
    update = jax.jit(lambda p: nrt_loss(p, batch, frozen, sequences=16, settings=settings))
    _, metrics = update(moved)
    means = summarise(metrics)
    assert float(means["reward/mean"]) == pytest.approx(float(means["reward/baseline"]), rel=1e-6)
    assert means["reward/zero_std_share"] == 1


def test_the_gradient_is_the_finite_difference_of_the_loss():
    """With R and S frozen the loss is a function of the weights alone, also after empty traces."""
    groups = [
        replace(g, traces=(trace(), *g.traces, trace())) for g in worlds.random_groups(3, 2, seed=5)
    ]
    batch = worlds.batch_of(groups)
    settings = worlds.settings(
        DEFINITION, reward_policy="sampling", clip_low=1.0, clip_high=1e6, token_ratio="none"
    )
    frozen = frozen_logprobs_fn(settings, several_updates=True, reference=None)(PARAMS, batch)

    @jax.jit
    def total(params):
        return nrt_loss(params, batch, frozen, sequences=12, settings=settings)[0]

    gradient = jax.jit(jax.grad(total))(PARAMS)
    rng = np.random.default_rng(0)
    for _ in range(3):
        direction = jax.tree.map(
            lambda w: jnp.asarray(rng.normal(size=w.shape).astype(np.float32)), PARAMS
        )
        slope = sum(
            float(jnp.vdot(g, d))
            for g, d in zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
        )
        ends = [
            float(total(jax.tree.map(lambda w, d, s=s: w + s * d, PARAMS, direction)))
            for s in (1e-3, -1e-3)
        ]
        assert (ends[0] - ends[1]) / 2e-3 == pytest.approx(slope, rel=2e-2, abs=2e-3)
