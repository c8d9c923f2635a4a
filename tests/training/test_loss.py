"""The loss of a whole batch against a plain recomputation: one sequence at a time, plain floats."""

import dataclasses
import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.training.batch import NrtBatch
from nrt_jax.training.frozen_logprobs import FrozenLogprobs, frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.packing import Layout, Packer
from tests.objective import oracle
from tests.training import worlds
from tests.training.plain_loss import Policy, logits_of, plain_loss
from tests.training.worlds import EOS, THINK_END, THINK_START, VOCAB

PROMPTS, TRACES = 4, 4
DEFINITION, PARAMS = worlds.tiny_decoder()


POLICY = Policy(DEFINITION, PARAMS, THINK_START, THINK_END)


NONE_FROZEN = FrozenLogprobs()


def loss_and_gradient(batch, settings, frozen=NONE_FROZEN, params=PARAMS):
    """Loss terms and gradient, jitted."""
    return over_micro_batches([batch], settings, [frozen], params)


def over_micro_batches(batches, settings, frozen=None, params=PARAMS):
    """The same of the sum over micro-batches."""
    groups = sum(int(batch.groups.kept_P.sum()) for batch in batches)
    sequences = groups * batches[0].groups.trace_length_PK.shape[-1]

    def loss_fn(params, inputs):
        return nrt_loss(params, *inputs, sequences=sequences, settings=settings)

    frozen = frozen or [NONE_FROZEN] * len(batches)
    return worlds.summed(loss_fn, params, list(zip(batches, frozen, strict=True)))


@cache
def plain_loss_and_gradient():
    """Of the batch and the settings that most tests change in one thing."""
    return loss_and_gradient(worlds.random_batch(PROMPTS, TRACES), worlds.settings(DEFINITION))


def assert_close(first, second, tolerance):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


VARIANTS = [
    {"scheme": "logp"},
    {"scheme": "p", "estimator": "rloo", "token_signal": "fixed"},
    {"scheme": "am", "estimator": "clip01", "policy_loss": "cispo"},
    {"scheme": "gm", "estimator": "dr_grpo", "trace_covers": "z_and_end"},
    {"scheme": "ws_inv_p", "weight_cap": 20.0, "format_where": "not_emitted"},
    {"scheme": "ws_neg_log_p", "token_ratio": "trace", "ws_normalisation": "mean"},
    {
        "scheme": "ws_neg_log_p",
        "estimator": "grpo_unclipped",
        "policy_loss": "cispo",
        "trace_covers": "z_and_end",
        "format_where": "not_emitted",
        "token_signal": "fixed",
    },
    {"scheme": "am", "old_logprobs": "recompute", "importance_cap": 1.5},
    {"scheme": "gm", "format_where": "natural_end"},
]


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def test_every_term_equals_the_plain_recomputation(variant):
    groups, batch = worlds.random_groups(PROMPTS, TRACES), worlds.random_batch(PROMPTS, TRACES)
    settings = worlds.settings(DEFINITION, **variant)
    frozen = frozen_logprobs_fn(settings, several_updates=False, reference=None)(PARAMS, batch)
    metrics, _ = loss_and_gradient(batch, settings, frozen)
    expected = plain_loss(POLICY, groups, settings.objective)
    for name, value in expected.items():
        assert metrics.sums[f"loss/{name}"] == pytest.approx(value, rel=2e-4, abs=2e-6), name


@pytest.mark.parametrize("reward_policy", ["current", "sampling"])
def test_a_stale_rollout_is_judged_by_the_weights_that_drew_it(reward_policy):
    """Two sets of weights: the first drew the traces and scored y*, the second is updated."""
    groups = [_scored(_on_policy(group)) for group in worlds.random_groups(PROMPTS, TRACES)]
    batch = worlds.batch_of(groups)
    moved = jax.tree.map(lambda w: w * 1.2, PARAMS)
    settings = worlds.settings(
        DEFINITION,
        reward_policy=reward_policy,
        old_logprobs="recompute",
        importance_cap=1.1,
        token_ratio="trace",
        token_ratio_cap=1.5,
    )
    terms = {}
    for stale in (True, False):
        settings = settings._replace(stale=stale)
        frozen = frozen_logprobs_fn(settings, several_updates=False, reference=None)(moved, batch)
        terms[stale] = loss_and_gradient(batch, settings, frozen, params=moved)[0].sums
    new = POLICY._replace(params=moved)
    expected = plain_loss(new, groups, settings.objective, sampling=POLICY)
    for name, value in expected.items():
        assert terms[True][f"loss/{name}"] == pytest.approx(value, rel=2e-4, abs=2e-6), name
    for name in ("trace", "token"):
        assert abs(terms[False][f"loss/{name}"] - expected[name]) > 1e-3, name


def _scored(group):
    """The group with the logprobs of y* under the weights that drew its traces."""
    prompt, answer = group.example.prompt_tokens, group.example.answer_tokens
    base, *log_c = (
        np.asarray(POLICY.logprobs(prompt, tokens, answer, 1.0)[3], np.float32)
        for tokens in ([], *(trace.tokens for trace in group.traces))
    )
    return dataclasses.replace(group, log_c_KA=np.stack(log_c), log_c_base_A=base)


def test_a_product_that_underflows_ranks_the_traces_all_the_same():
    """Answers of 60 tokens at about -2.8 nats beside those of the other tests."""
    groups = worlds.random_groups(PROMPTS, TRACES)
    rng = np.random.default_rng(0)
    for p in (0, 2):
        answer = np.append(worlds.tokens(rng, 60), EOS).astype(np.int32)
        groups[p] = dataclasses.replace(
            groups[p], example=dataclasses.replace(groups[p].example, answer_tokens=answer)
        )
    settings = worlds.settings(DEFINITION, scheme="p")
    metrics, _ = loss_and_gradient(worlds.batch_of(groups), settings)
    expected = plain_loss(POLICY, groups, settings.objective)
    short = [groups[1], groups[3]]
    without = plain_loss(POLICY, short, settings.objective, sequences=PROMPTS * TRACES)
    assert abs(expected["trace"] - without["trace"]) > 0.01, "the long answers count"
    for name, value in expected.items():
        assert metrics.sums[f"loss/{name}"] == pytest.approx(value, rel=2e-3, abs=2e-6), name
    tokens = sum(len(group.example.answer_tokens) for group in groups)
    total, count = metrics.means["reward/zero_signal_share"]
    assert (total, count) == (2 * 61 * TRACES, tokens * TRACES)
    fixed = worlds.settings(DEFINITION, scheme="p", token_signal="fixed")
    metrics, _ = loss_and_gradient(worlds.batch_of(groups), fixed)
    assert metrics.means["reward/zero_signal_share"][0] == 0


def test_importance_weights_are_on_both_sides_of_one_and_of_the_cap():
    """Else the comparison above would not see the ratio inverted, or the cap missing."""
    ratios = []
    for group in worlds.random_groups(PROMPTS, TRACES):
        prompt, answer = group.example.prompt_tokens, group.example.answer_tokens
        for trace in group.traces:
            z = POLICY.logprobs(prompt, trace.tokens, answer, 1.0)[1]
            ratios += np.exp(z - trace.logprobs.astype(float)).tolist()
    assert min(ratios) < 0.9
    assert any(1.1 < ratio < 1.4 for ratio in ratios)
    assert max(ratios) > 1.6


def test_the_trace_is_scored_at_the_sampling_temperature():
    groups = worlds.random_groups(PROMPTS, TRACES)
    settings = worlds.settings(DEFINITION, temperature=0.7)
    metrics, _ = loss_and_gradient(worlds.random_batch(PROMPTS, TRACES), settings)
    expected = plain_loss(POLICY, groups, settings.objective, temperature=0.7)
    at_one = plain_loss(POLICY, groups, settings.objective, temperature=1.0)
    assert metrics.sums["loss/trace"] == pytest.approx(expected["trace"], rel=2e-4)
    assert metrics.sums["loss/token"] == pytest.approx(expected["token"], rel=2e-4)
    assert abs(expected["trace"] - at_one["trace"]) > 0.01 * abs(at_one["trace"])


def test_gradient_is_the_sum_of_terms_of_algorithm_1():
    """-sum_k A_k grad log pi(z_k) - sum_i S_ik grad log c_ik - 0.3 grad log pi(format), by hand."""
    groups = worlds.random_groups(2, TRACES)
    # On policy, so that the ratio is 1 and nothing is clipped.
    groups = [_on_policy(group) for group in groups]
    settings = worlds.settings(DEFINITION)
    batch = worlds.batch_of(groups)
    _, gradient = loss_and_gradient(batch, settings)
    by_hand = jax.grad(lambda p: _surrogate_by_hand(p, groups, settings.objective))(PARAMS)
    assert_close(gradient, by_hand, 2e-4)


def _on_policy(group):
    traces = []
    for trace in group.traces:
        z = POLICY.logprobs(
            group.example.prompt_tokens, trace.tokens, group.example.answer_tokens, 1.0
        )[1]
        traces.append(dataclasses.replace(trace, logprobs=np.asarray(z, np.float32)))
    return dataclasses.replace(group, traces=tuple(traces))


def _surrogate_by_hand(params, groups, config):
    """A function whose gradient is Algorithm 1's: weights are Python numbers, found beforehand."""
    total = 0.0
    for group in groups:
        prompt, answer = group.example.prompt_tokens, group.example.answer_tokens
        base = POLICY.logprobs(prompt, [], answer, 1.0)[3]
        baseline, _ = oracle.aggregate(config.scheme, base, base, "sum", config.weight_cap)
        rewarded = [
            oracle.aggregate(
                config.scheme,
                POLICY.logprobs(prompt, t.tokens, answer, 1.0)[3],
                base,
                "sum",
                config.weight_cap,
            )
            for t in group.traces
        ]
        advantage = oracle.advantages([r for r, _ in rewarded], baseline, "grpo")
        for trace, (_, signal), A in zip(group.traces, rewarded, advantage, strict=True):
            sequence = np.concatenate([prompt, [THINK_START], trace.tokens, [THINK_END], answer])
            sequence = sequence.astype(np.int32)
            log_pi = jax.nn.log_softmax(logits_of(DEFINITION, params, sequence))
            at = log_pi[jnp.arange(len(sequence) - 1), sequence[1:]]
            x, n = len(prompt), len(trace.tokens)
            weights = np.zeros(len(sequence) - 1)
            weights[x - 1] = weights[x + n] = config.format_coefficient
            weights[x : x + n] = A
            weights[x + n + 1 :] = signal
            total -= jnp.sum(at * weights.astype(np.float32))
    return total / (config.length_constant * len(groups) * TRACES)


@pytest.mark.parametrize(
    ("micro_batch", "packing"),
    [
        (1, False),
        (3, True),
        *(
            pytest.param(*sizes, marks=pytest.mark.slow)
            for sizes in [(2, False), (4, False), (1, True), (8, True)]
        ),
    ],
)
def test_micro_batches_and_packing_change_neither_loss_nor_gradient(micro_batch, packing):
    groups, settings = worlds.random_groups(8, TRACES), worlds.settings(DEFINITION)
    whole = loss_and_gradient(worlds.batch_of(groups), settings)
    batches = worlds.batches_of(groups, Packer(Layout(micro_batch, packing=packing)))
    assert packing or len(batches) == 8 // micro_batch
    assert_close(over_micro_batches(batches, settings), whole, 1e-5)


def test_chunk_size_changes_neither_loss_nor_gradient():
    batch = worlds.random_batch(PROMPTS, TRACES)
    chunked = loss_and_gradient(batch, worlds.settings(DEFINITION, chunk=32))
    assert_close(chunked, plain_loss_and_gradient(), 1e-5)


def test_padding_changes_neither_loss_nor_gradient():
    batch, settings = worlds.random_batch(PROMPTS, TRACES), worlds.settings(DEFINITION)
    wider = NrtBatch(
        worlds.wider(batch.prompts, 3, "segments_packs_S"),
        worlds.wider(batch.completions, 5, "segments_BW"),
        worlds.wider(batch.baselines, 2, "segments_BW"),
        batch.groups._replace(
            sampler_logprob_PKT=jnp.pad(
                batch.groups.sampler_logprob_PKT,
                ((0, 0), (0, 0), (0, 5)),
                constant_values=np.nan,
            ),
            # Rows are wider, so completions start elsewhere in the rows of their pack.
            completion_start_PK=batch.groups.completion_start_PK
            + 5 * (batch.groups.completion_start_PK // batch.completions.inputs_BW.shape[1]),
            answer_PA=jnp.pad(batch.groups.answer_PA, ((0, 0), (0, 2)), constant_values=7),
        ),
    )
    assert_close(loss_and_gradient(wider, settings), plain_loss_and_gradient(), 1e-5)


@pytest.mark.parametrize("remat", ["full", "offload", pytest.param("dots", marks=pytest.mark.slow)])
def test_remat_changes_neither_loss_nor_gradient(remat):
    definition, _ = worlds.tiny_decoder(remat=remat)
    recomputed = loss_and_gradient(
        worlds.random_batch(PROMPTS, TRACES), worlds.settings(definition)
    )
    assert_close(recomputed, plain_loss_and_gradient(), 1e-5)


def test_a_frozen_baseline_equals_the_one_of_the_same_pass():
    batch, settings = worlds.random_batch(PROMPTS, TRACES), worlds.settings(DEFINITION)
    frozen_logprobs = frozen_logprobs_fn(settings, several_updates=True, reference=None)
    frozen = frozen_logprobs(PARAMS, batch)
    assert frozen.log_c_base_PA is not None
    assert frozen.old_PKT is None
    assert_close(loss_and_gradient(batch, settings, frozen), plain_loss_and_gradient(), 1e-5)


def test_nothing_is_frozen_where_one_pass_serves():
    settings = worlds.settings(DEFINITION)
    frozen_logprobs = frozen_logprobs_fn(settings, several_updates=False, reference=None)
    assert frozen_logprobs(PARAMS, worlds.random_batch()) == FrozenLogprobs()


def test_rewards_follow_the_policy_that_is_asked_for():
    """The weights moved since the rollout: `current` uses the new ones, `sampling` the old ones."""
    batch = worlds.random_batch(PROMPTS, TRACES)
    moved = jax.tree.map(lambda w: w * 1.3, PARAMS)
    rewards = {}
    for policy in ("current", "sampling"):
        settings = worlds.settings(DEFINITION, reward_policy=policy)
        frozen = frozen_logprobs_fn(settings, several_updates=True, reference=None)(PARAMS, batch)
        rewards[policy] = loss_and_gradient(batch, settings, frozen, params=moved)[0]
    unmoved = plain_loss_and_gradient()[0]
    mean = {name: float(m.means["reward/mean"][0]) for name, m in rewards.items()}
    assert mean["sampling"] == pytest.approx(float(unmoved.means["reward/mean"][0]), rel=1e-5)
    assert abs(mean["current"] - mean["sampling"]) > 1e-2
    for metrics in rewards.values():
        assert_close(metrics.means["reward/baseline"], unmoved.means["reward/baseline"], 1e-5)


def test_recomputed_old_logprobs_make_the_first_ratio_one():
    batch = worlds.random_batch(PROMPTS, TRACES)
    settings = worlds.settings(DEFINITION, old_logprobs="recompute")
    frozen = frozen_logprobs_fn(settings, several_updates=False, reference=None)(PARAMS, batch)
    metrics, _ = loss_and_gradient(batch, settings, frozen)
    total, count = metrics.means["policy/ratio"]
    assert total / count == pytest.approx(1, abs=1e-5)
    assert metrics.means["policy/clip_share"][0] == 0
    assert metrics.maxima["mismatch/max"] > 0.1


def test_importance_cap_weighs_trace_tokens_by_trainer_over_sampler():
    batch = worlds.random_batch(PROMPTS, TRACES)
    plain = worlds.settings(DEFINITION, old_logprobs="recompute")
    frozen = frozen_logprobs_fn(plain, several_updates=False, reference=None)(PARAMS, batch)
    capped = worlds.settings(DEFINITION, old_logprobs="recompute", importance_cap=0.01)
    tiny = loss_and_gradient(batch, capped, frozen)[0].sums["loss/trace"]
    full = loss_and_gradient(batch, plain, frozen)[0].sums["loss/trace"]
    # Every ratio of this batch is above the cap, so the whole term is scaled by it.
    assert float(tiny) == pytest.approx(0.01 * float(full), rel=1e-3)


def test_kl_term_is_zero_at_the_reference_and_pulls_back_towards_it():
    batch = worlds.random_batch(PROMPTS, TRACES)
    settings = worlds.settings(DEFINITION, kl_coefficient=0.5)
    frozen_logprobs = frozen_logprobs_fn(settings, several_updates=False, reference=PARAMS)
    metrics, _ = loss_and_gradient(batch, settings, frozen_logprobs(PARAMS, batch))
    assert float(metrics.sums["loss/kl"]) == pytest.approx(0, abs=1e-6)
    moved = jax.tree.map(lambda w: w * 1.2, PARAMS)
    metrics, _ = loss_and_gradient(batch, settings, frozen_logprobs(moved, batch), params=moved)
    assert metrics.sums["loss/kl"] > 1e-3


def test_entropy_bonus_is_minus_the_entropy_of_the_trace_tokens():
    batch = worlds.random_batch(PROMPTS, TRACES)
    settings = worlds.settings(DEFINITION, entropy_coefficient=0.1)
    metrics, _ = loss_and_gradient(batch, settings)
    total, tokens = metrics.means["policy/entropy"]
    share = settings.objective.length_constant * PROMPTS * TRACES
    assert float(metrics.sums["loss/entropy"]) == pytest.approx(-0.1 * float(total) / share)
    assert 0 < total / tokens < math.log(VOCAB)


def test_metrics_count_what_they_say():
    groups = worlds.random_groups(PROMPTS, TRACES)
    settings = worlds.settings(DEFINITION)
    metrics, _ = plain_loss_and_gradient()
    rewards, baselines, above = [], [], 0
    for group in groups:
        prompt, answer = group.example.prompt_tokens, group.example.answer_tokens
        base = POLICY.logprobs(prompt, [], answer, 1.0)[3]
        cap = settings.objective.weight_cap
        baselines.append(oracle.aggregate("ws_neg_log_p", base, base, "sum", cap)[0])
        for trace in group.traces:
            y = POLICY.logprobs(prompt, trace.tokens, answer, 1.0)[3]
            rewards.append(oracle.aggregate("ws_neg_log_p", y, base, "sum", cap)[0])
            above += rewards[-1] > baselines[-1]
    total, count = metrics.means["reward/mean"]
    assert total / count == pytest.approx(np.mean(rewards), rel=1e-4)
    total, count = metrics.means["reward/baseline"]
    assert total / count == pytest.approx(np.mean(baselines), rel=1e-4)
    total, count = metrics.means["reward/above_baseline_share"]
    assert (total, count) == (above, PROMPTS * TRACES)
    total, count = metrics.means["reward/log_mean"]
    assert total / count == pytest.approx(np.mean(np.log(rewards)), rel=1e-4)
    total, count = metrics.means["reward/zero_signal_share"]
    answers = sum(len(group.example.answer_tokens) for group in groups)
    assert (total, count) == (0, answers * TRACES)


def test_eos_is_part_of_the_answer():
    batch = worlds.random_batch(1, 1)
    assert int(batch.groups.answer_PA[0, batch.groups.answer_length_P[0] - 1]) == EOS
