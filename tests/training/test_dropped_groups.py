"""Groups left out of an update: the loss of the others alone, and no work for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.objective.advantages import zero_std
from nrt_jax.objective.rewards import score_rewards
from nrt_jax.training.batch import group_lengths
from nrt_jax.training.frozen_logprobs import FrozenLogprobs, frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.nrt import _mean_metrics
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.rollouts import mini_batch
from nrt_jax.training.update import summarise
from nrt_jax.types import SuffixLogprobs
from tests.training import worlds

DEFINITION, PARAMS = worlds.tiny_decoder()
PROMPTS, TRACES = 8, 4
KEPT = np.asarray([False, True, False, False, True, True, False, False])
OBJECTIVE = {
    "entropy_coefficient": 0.1,
    "kl_coefficient": 0.2,
    "old_logprobs": "recompute",
    "importance_cap": 2.0,
    "trace_covers": "z_and_end",
}


GROUPS = worlds.random_groups(PROMPTS, TRACES)


def batch():
    return worlds.batch_of(GROUPS)


def loss_and_gradient(batches):
    """Metrics and gradient under the divisor of the whole mini-batch."""
    settings = worlds.settings(DEFINITION, **OBJECTIVE)
    moved = jax.tree.map(lambda w: w * 1.1, PARAMS)
    frozen = frozen_logprobs_fn(settings, several_updates=True, reference=PARAMS)

    def loss_fn(params, inputs):
        return nrt_loss(params, *inputs, sequences=PROMPTS * TRACES, settings=settings)

    return worlds.summed(loss_fn, moved, [(batch, frozen(PARAMS, batch)) for batch in batches])


def assert_close(first, second, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


KEPT_GROUPS = [group for group, kept in zip(GROUPS, KEPT, strict=True) if kept]


@pytest.fixture(scope="module")
def by_hand():
    """The groups that are kept, a pack each, under the same divisor."""
    return loss_and_gradient([worlds.batch_of(KEPT_GROUPS)])


def packed(micro_batch, kept_P):
    think = {"think_start": worlds.THINK_START, "think_end": worlds.THINK_END}
    return mini_batch(GROUPS, kept_P, Packer(Layout(micro_batch)), **think)


@pytest.mark.parametrize("micro_batch", [1, pytest.param(2, marks=pytest.mark.slow), 4])
def test_loss_and_gradient_are_those_of_the_groups_that_are_kept(micro_batch, by_hand):
    mini = packed(micro_batch, KEPT)
    assert mini.kept
    metrics, gradient = loss_and_gradient(mini.micro_batches)
    assert_close(gradient, by_hand[1], 2e-5)
    assert_close(summarise(metrics), summarise(by_hand[0]), 2e-5)


def test_dropped_groups_take_no_positions():
    everyone = packed(1, np.ones(PROMPTS, bool))
    some = packed(1, KEPT)
    positions = [sum(plan.slots for plan in mini.plans) for mini in (everyone, some)]
    assert positions[1] < 0.6 * positions[0]
    kept = sum(int(batch.groups.kept_P.sum()) for batch in some.micro_batches)
    assert kept == KEPT.sum()


def test_without_any_group_loss_and_gradient_are_zero():
    mini = packed(4, np.zeros(PROMPTS, bool))
    assert not mini.kept
    metrics, gradient = loss_and_gradient(mini.micro_batches)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((metrics.sums, gradient)))


def test_garbage_in_a_group_without_part_in_the_loss_reaches_nothing(by_hand):
    whole = batch()
    order_P = np.argsort([-max(group_lengths(g).completions) for g in GROUPS], kind="stable")
    kept_P = KEPT[order_P]
    poisoned = whole.groups._replace(
        kept_P=jnp.asarray(kept_P),
        sampler_logprob_PKT=jnp.where(
            kept_P[:, None, None], whole.groups.sampler_logprob_PKT, jnp.nan
        ),
    )
    assert_close(loss_and_gradient([whole._replace(groups=poisoned)])[1], by_hand[1], 2e-5)


def test_zero_std_comes_from_the_cached_scores():
    """Two traces alike to the bit, and two that are not."""
    alike = SuffixLogprobs(np.full((2, 3), -0.5, np.float32), np.full(3, -1.0, np.float32))
    apart = SuffixLogprobs(
        np.asarray([[-0.1, -0.2], [-0.4, -0.3]], np.float32), np.full(2, -1.0, np.float32)
    )
    settings = worlds.settings(DEFINITION, scheme="am")
    rewards = score_rewards([alike, apart], settings.objective)
    assert zero_std(*rewards, "grpo").tolist() == [True, False]
    np.testing.assert_allclose(rewards.baseline_P, np.exp(-1.0), rtol=1e-6)
    np.testing.assert_allclose(rewards.reward_PK[1], np.exp([[-0.1, -0.2], [-0.4, -0.3]]).mean(1))


def test_one_trace_may_be_dropped_where_it_is_compared_with_the_baseline_alone(tiny_config):
    overrides = ["rollout={traces_per_prompt: 1, drop_zero_std_groups: true}"]
    config = load_config(RunConfig, [tiny_config], [*overrides, "objective.estimator=clip01"])
    assert config.rollout.drop_zero_std_groups
    with pytest.raises(InputError, match="the rewards of one trace have no standard deviation"):
        load_config(RunConfig, [tiny_config], overrides)


@pytest.mark.slow
def test_a_run_that_drops_groups_says_how_many(reference):
    run = reference("rollout.drop_zero_std_groups=true")
    rows = [row for row in run.metrics() if "rollout/dropped_share" in row]
    assert len(rows) == 8
    assert len({row["rollout/dropped_share"] for row in rows}) > 1
    for row in rows:
        # One definition of zero std: that of the metric.
        assert row["rollout/dropped_share"] == pytest.approx(row["reward/zero_std_share"])
        assert row["update/skipped"] == 0


@pytest.mark.slow
def test_before_the_first_update_dropping_changes_no_trace_and_no_reward(reference):
    first, second = (
        run.metrics()[1]
        for run in (reference("method=nrt"), reference("rollout.drop_zero_std_groups=true"))
    )
    assert first["trace/tokens"] == second["trace/tokens"]
    assert second["reward/baseline"] == pytest.approx(first["reward/baseline"], rel=1e-4)


def test_a_mini_batch_without_any_group_does_not_dilute_what_is_told():
    def update(loss, ratio, gap):
        skipped = {"update/skipped": 0, "update/skipped_in_row": 0}
        told = {"loss/total": loss, "policy/ratio": ratio, "mismatch/mean": gap}
        return skipped | told

    updates = [update(0.0, 0.0, 0.0), update(1.0, 1.2, 0.3), update(2.0, 1.4, 0.7)]
    metrics = _mean_metrics(updates, [False, True, True])
    assert metrics["loss/total"] == pytest.approx(1.0)
    assert metrics["policy/ratio"] == pytest.approx(1.3)
    assert metrics["mismatch/mean"] == pytest.approx(0.3)


def test_no_logprobs_are_frozen_unless_the_objective_needs_them():
    settings = worlds.settings(DEFINITION)
    frozen = frozen_logprobs_fn(settings, several_updates=False, reference=None)
    assert frozen(PARAMS, batch()) == FrozenLogprobs()
