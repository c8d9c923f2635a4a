"""Groups left out of an update: the loss of the others alone, and no work for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.objective.advantages import has_spread
from nrt_jax.rollout.scheduler import SuffixScores
from nrt_jax.training.batch import kept_first
from nrt_jax.training.forward import SamplingScores
from nrt_jax.training.nrt import _step_metrics, any_kept
from nrt_jax.training.nrt_loss import nrt_loss
from nrt_jax.training.rewards import judge
from nrt_jax.training.scoring import make_scorer
from nrt_jax.training.step import Metrics, accumulate, micro_batches, summarise
from tests.training import worlds

DEFINITION, PARAMS = worlds.tiny_decoder()
PROMPTS, TRACES = 8, 4
KEPT = np.asarray([False, True, False, False, True, True, False, False])
OBJECTIVE = {
    "entropy_coefficient": 0.1,
    "kl_coefficient": 0.2,
    "old_log_probs": "recompute",
    "importance_cap": 2.0,
    "trace_covers": "z_and_end",
}


def batch():
    return worlds.random_batch(PROMPTS, TRACES)


def reordered(batch, kept_P, micro_count):
    """As training sorts a mini-batch."""
    order_P = kept_first(kept_P, mini_batch=PROMPTS, micro_count=micro_count)
    return jax.tree.map(lambda x: x[order_P], batch._replace(kept_P=jnp.asarray(kept_P)))


def loss_and_gradient(batch, micro_count, *, objective=OBJECTIVE, dropping=True):
    """Metrics and gradient under the divisor of the whole mini-batch."""
    settings = worlds.settings(DEFINITION, **objective)
    moved = jax.tree.map(lambda w: w * 1.1, PARAMS)
    wanted = any_kept if dropping else None
    score = make_scorer(
        settings, micro_count, several_updates=True, reference=PARAMS, wanted=wanted
    )

    def loss_fn(params, inputs):
        return nrt_loss(params, *inputs, sequences=PROMPTS * TRACES, settings=settings)

    wanted_pair = (lambda inputs: any_kept(inputs[0])) if dropping else None
    step = jax.jit(lambda p, b: accumulate(loss_fn, p, b, micro_count, wanted_pair))
    gradient, metrics = step(moved, (batch, score(PARAMS, batch)))
    return metrics, gradient


def assert_close(first, second, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        scale = max(float(np.abs(b).max()), 1e-3)
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * scale)


@pytest.fixture(scope="module")
def by_hand():
    """The groups that are kept and nothing else, under the same divisor."""
    kept = jax.tree.map(lambda x: x[KEPT], batch())
    return loss_and_gradient(kept, 1, dropping=False)


@pytest.mark.parametrize("micro_batch", [1, 2, 4])
def test_loss_and_gradient_are_those_of_the_groups_that_are_kept(micro_batch, by_hand):
    micro_count = PROMPTS // micro_batch
    sorted_batch = reordered(batch(), KEPT, micro_count)
    metrics, gradient = loss_and_gradient(sorted_batch, micro_count)
    assert_close(gradient, by_hand[1], 2e-5)
    assert_close(summarise(metrics), summarise(by_hand[0]), 2e-5)


def runs_of(kept_P, micro_count) -> tuple[int, np.ndarray]:
    """How often a loss was run over the micro-batches, and its gradient, the sum of prompt 0."""
    runs = []

    def loss_fn(params, batch):
        jax.debug.callback(lambda: runs.append(1))
        kept_P1 = batch.kept_P[:, None]
        loss = jnp.sum(params * jnp.where(kept_P1, batch.prompt_PS, 0))
        return loss, Metrics({"loss/x": loss}, {}, {"x_max": loss})

    sorted_batch = reordered(batch(), kept_P, micro_count)
    step = jax.jit(lambda p, b: accumulate(loss_fn, p, b, micro_count, any_kept))
    gradient, _ = jax.block_until_ready(step(jnp.float32(1), sorted_batch))
    jax.effects_barrier()
    return len(runs), np.asarray(gradient)


@pytest.mark.parametrize(("micro_batch", "expected"), [(1, 3), (2, 2), (4, 1), (8, 1)])
def test_micro_batches_without_a_kept_group_are_not_run(micro_batch, expected):
    runs, gradient = runs_of(KEPT, PROMPTS // micro_batch)
    assert runs == expected
    assert gradient == np.asarray(batch().prompt_PS)[KEPT].sum()


@pytest.mark.parametrize("micro_count", [1, 4])
def test_without_any_group_nothing_is_run(micro_count):
    assert runs_of(np.zeros(PROMPTS, bool), micro_count) == (0, 0)


def test_with_all_groups_kept_nothing_changes():
    plain, whole = batch(), batch()._replace(kept_P=jnp.ones(PROMPTS, bool))
    first = loss_and_gradient(plain, 2, dropping=False)
    second = loss_and_gradient(whole, 2)
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


def test_garbage_in_a_dropped_group_reaches_nothing(by_hand):
    mixed = reordered(batch(), KEPT, 1)
    dropped_P = ~np.asarray(mixed.kept_P)
    poisoned = mixed._replace(
        sampler_log_prob_PKT=jnp.where(
            dropped_P[:, None, None], jnp.nan, mixed.sampler_log_prob_PKT
        )
    )
    assert_close(loss_and_gradient(poisoned, 1)[1], by_hand[1], 2e-5)


def test_the_first_micro_batches_hold_what_is_kept():
    kept_P = np.asarray([0, 1, 0, 1, 1, 0, 0, 0, 0, 0, 1, 1], bool)
    order_P = kept_first(kept_P, mini_batch=6, micro_count=3)
    # Mini-batch by mini-batch, nothing lost.
    assert sorted(order_P[:6].tolist()) == list(range(6))
    assert sorted(order_P[6:].tolist()) == list(range(6, 12))
    for rows, expected in ((order_P[:6], [2, 1, 0]), (order_P[6:], [2, 0, 0])):
        assert micro_batches(kept_P[rows], 3).sum(axis=1).tolist() == expected
    assert kept_first(np.asarray([0, 1, 0, 1], bool), mini_batch=4, micro_count=2).tolist() == [
        1,
        0,
        3,
        2,
    ]


def test_spread_comes_from_the_cached_scores():
    """Two traces alike to the bit, and two that are not."""
    alike = SuffixScores(np.full((2, 3), -0.5, np.float32), np.full(3, -1.0, np.float32))
    apart = SuffixScores(
        np.asarray([[-0.1, -0.2], [-0.4, -0.3]], np.float32), np.full(2, -1.0, np.float32)
    )
    settings = worlds.settings(DEFINITION, scheme="am")
    judged = judge([alike, apart], settings.objective)
    assert has_spread(*judged, "grpo").tolist() == [False, True]
    np.testing.assert_allclose(judged.baseline_P, np.exp(-1.0), rtol=1e-6)
    np.testing.assert_allclose(judged.reward_PK[1], np.exp([[-0.1, -0.2], [-0.4, -0.3]]).mean(1))


@pytest.mark.slow
def test_a_run_that_drops_groups_says_how_many(reference):
    run = reference("rollout.drop_groups_without_spread=true")
    rows = [row for row in run.metrics() if "rollout/dropped_share" in row]
    assert len(rows) == 8
    assert len({row["rollout/dropped_share"] for row in rows}) > 1
    for row in rows:
        # One definition of spread: that of the metric.
        assert row["rollout/dropped_share"] == pytest.approx(row["reward/no_spread_share"])
        assert row["update/skipped"] == 0


@pytest.mark.slow
def test_before_the_first_update_dropping_changes_no_trace_and_no_reward(reference):
    first, second = (
        run.metrics()[1]
        for run in (reference("method=nrt"), reference("rollout.drop_groups_without_spread=true"))
    )
    assert first["trace/tokens"] == second["trace/tokens"]
    assert second["reward/baseline"] == pytest.approx(first["reward/baseline"], rel=1e-4)


def test_a_mini_batch_without_any_group_does_not_dilute_what_is_told():
    def update(loss, ratio, gap):
        skipped = {"update/skipped": 0, "update/skipped_in_row": 0}
        told = {"loss/total": loss, "policy/ratio": ratio, "mismatch/mean": gap}
        return skipped | told

    updates = [update(0.0, 0.0, 0.0), update(1.0, 1.2, 0.3), update(2.0, 1.4, 0.7)]
    metrics = _step_metrics(updates, [False, True, True])
    assert metrics["loss/total"] == pytest.approx(1.0)
    assert metrics["policy/ratio"] == pytest.approx(1.3)
    assert metrics["mismatch/mean"] == pytest.approx(0.3)


def test_nothing_is_scored_before_sampling_scores_are_asked_for():
    settings = worlds.settings(DEFINITION)
    score = make_scorer(settings, 1, several_updates=False, reference=None, wanted=any_kept)
    assert score(PARAMS, batch()) == SamplingScores()
