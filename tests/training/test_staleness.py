"""Prefetched rollouts: whose weights draw them, in which order, and across a kill."""

from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints.saved_groups import pack_groups, read_arrays, unpack_groups
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.training import nrt
from nrt_jax.training.batch import NrtBatch, answer_mask, group_lengths, nrt_batch
from nrt_jax.training.forward import GroupLogprobs, NrtSettings, group_logprobs
from nrt_jax.training.frozen_logprobs import FrozenLogprobs
from nrt_jax.training.loop import train
from nrt_jax.training.loss import mask_completions
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.rollouts import Sampler
from tests.training import worlds
from tests.training.runs import assert_same
from tests.training.test_resume import finish, stop_at

STALE = (
    "rollout.staleness=1",
    "objective.old_logprobs=recompute",
    "objective.importance_cap=2",
)


# --- versions and order ---------------------------------------------------------------------------


class Watched:
    """A run in this process, with what it sampled, from which weights, and when."""

    def __init__(self, config: RunConfig, monkeypatch: pytest.MonkeyPatch):
        self.events: list[str] = []
        self.groups: dict[int, list] = {}
        self.weights: dict[int, Any] = {}
        self.settings: NrtSettings | None = None
        self.finished = 0
        self._watch(monkeypatch)
        train(config)

    def _watch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        sample, read, finish_step = Sampler.sample, nrt._step_metrics, nrt.finish_step
        update = nrt.StepFunctions.run_mini_batches

        def sample_groups(sampler, weights, examples, step):
            self.events.append(f"sample {step}")
            self.weights.setdefault(weights.version, jax.tree.map(np.array, weights.params))
            self.groups[step] = sample(sampler, weights, examples, step)
            return self.groups[step]

        def run_mini_batches(functions, state, minis):
            self.events.append(f"update {self.finished + 1}")
            return update(functions, state, minis)

        def step_metrics(*args):
            self.events.append("read")
            return read(*args)

        def finish(run, metrics):
            finish_step(run, metrics)
            self.finished = run.progress.step
            self.weights[self.finished] = jax.tree.map(np.array, run.progress.state.params)
            tokenizer = run.policy.tokenizer
            self.settings = NrtSettings(
                definition=run.policy.model.definition,
                objective=run.config.objective,
                think_start=tokenizer.think_start_id,
                think_end=tokenizer.think_end_id,
                temperature=1.0,
                chunk_tokens=2048,
            )

        monkeypatch.setattr(Sampler, "sample", sample_groups)
        monkeypatch.setattr(nrt, "_step_metrics", step_metrics)
        monkeypatch.setattr(nrt.StepFunctions, "run_mini_batches", run_mini_batches)
        monkeypatch.setattr(nrt, "finish_step", finish)

    def gap(self, step: int, version: int) -> float:
        """Largest difference of a step's sampled logprobs from those under a version's weights."""
        settings, scored, batch = self._scored(step, version)
        completions = mask_completions(
            scored.logprob_PKT,
            scored.entropy_PKT,
            FrozenLogprobs(),
            batch.groups,
            settings.objective,
        )
        gap_PKT = np.abs(completions.logprob_PKT - completions.sampler_PKT)
        return float(np.where(completions.covered_PKT, gap_PKT, 0).max())

    def baseline_gap(self, step: int, version: int) -> float:
        """The same of c_base."""
        _, scored, batch = self._scored(step, version)
        assert batch.scored is not None
        assert scored.log_c_base_PA is not None
        gap_PA = np.abs(scored.log_c_base_PA - batch.scored.log_c_base_PA)
        return float(np.where(answer_mask(batch.groups), gap_PA, 0).max())

    def _scored(self, step: int, version: int) -> tuple[NrtSettings, GroupLogprobs, NrtBatch]:
        """A step's groups as one batch, scored under a version's weights."""
        settings, groups = self.settings, self.groups[step]
        assert settings is not None
        (plan,) = Packer(Layout(len(groups), packing=False)).plan(
            [group_lengths(group) for group in groups]
        )
        think = {"think_start": settings.think_start, "think_end": settings.think_end}
        batch = worlds.as_jax(nrt_batch(groups, plan, **think))
        decoder = nnx.merge(settings.definition, worlds.as_jax(self.weights[version]))
        return settings, group_logprobs(decoder, settings, batch, baselines=True), batch


def watched(tiny_config, directory, *overrides: str) -> Watched:
    """Train on the eight devices of this process, four of them for the rollouts."""
    words = (
        f"run_dir={directory}",
        "train.steps=4",
        "train.batch_prompts=8",
        "train.mini_batch_prompts=4",
        "train.micro_batch_prompts=4",
        "rollout.devices=4",
        "evaluation.examples=0",
        *overrides,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        return Watched(load_config(RunConfig, [tiny_config], words), monkeypatch)


@pytest.fixture(scope="module")
def stale(tiny_config, tmp_path_factory) -> Watched:
    return watched(tiny_config, tmp_path_factory.mktemp("stale") / "run", *STALE)


def test_every_trace_of_a_step_is_of_one_version_one_update_old(stale):
    assert [{g.version for g in stale.groups[s]} for s in range(1, 5)] == [{0}, {0}, {1}, {2}]
    for step, groups in stale.groups.items():
        (version,) = {group.version for group in groups}
        assert stale.gap(step, version) < 1e-4
    # The weights do move, so that another version would have been noticed.
    assert stale.gap(3, 2) > 1e-3


@pytest.mark.slow
def test_c_base_is_that_of_the_weights_that_drew_the_traces(stale):
    for step, groups in stale.groups.items():
        (version,) = {group.version for group in groups}
        assert stale.baseline_gap(step, version) < 1e-4
    assert stale.baseline_gap(3, 2) > 1e-3
    # The rewards of the traces are the current weights', so nobody asks for their scores.
    assert all(group.log_c_KA is None for groups in stale.groups.values() for group in groups)


@pytest.mark.slow
def test_without_staleness_every_trace_is_of_the_newest_weights(tiny_config, tmp_path):
    plain = watched(tiny_config, tmp_path / "run")
    assert [{g.version for g in plain.groups[s]} for s in range(1, 5)] == [{0}, {1}, {2}, {3}]
    for step in plain.groups:
        assert plain.gap(step, step - 1) < 1e-4
    turns = [f"{what} {step}".strip() for step in range(1, 5) for what in ("sample", "update")]
    assert [event for event in plain.events if event != "read"] == turns


def test_the_next_rollouts_come_between_an_update_and_its_metrics(stale):
    assert stale.events == [
        "sample 1",
        *("update 1", "sample 2", "read"),
        *("update 2", "sample 3", "read"),
        *("update 3", "sample 4", "read"),
        *("update 4", "read"),
    ]


# --- kill and resume ------------------------------------------------------------------------------


@pytest.mark.slow
def test_killed_and_stopped_it_ends_as_one_that_never_was(new_run, reference):
    """The traces that wait for their update are drawn with weights that are gone by then."""
    whole = reference(*STALE)
    run = new_run(*STALE)
    stop_at(run, lambda: run.at_line(1))
    assert max(run.steps, default=0) in (0, 1)
    assert run.kill_at(lambda: run.at_line(5))
    stop_at(run, lambda: run.at_line(6))
    finish(run)
    assert_same(run, whole)
    ages = [row["rollout/staleness"] for row in whole.metrics() if "rollout/staleness" in row]
    assert ages == [0.0] + 7 * [1.0]


@pytest.mark.parametrize("scored", [(), ("log_c_base_A",), ("log_c_base_A", "log_c_KA")])
def test_groups_come_back_to_the_bit(scored):
    groups, rng = worlds.random_groups(4, 3), np.random.default_rng(0)
    for p, group in enumerate(groups):
        A = len(group.example.answer_tokens)
        shapes = {"log_c_base_A": A, "log_c_KA": (3, A)}
        logprobs = {name: rng.normal(size=shapes[name]).astype(np.float32) for name in scored}
        groups[p] = replace(group, version=7, **logprobs)
    back = unpack_groups(pack_groups(groups), [group.example for group in groups])
    for mine, theirs in zip(back, groups, strict=True):
        assert mine.example is theirs.example
        assert mine.version == theirs.version
        for name in ("log_c_base_A", "log_c_KA"):
            saved, restored = getattr(theirs, name), getattr(mine, name)
            assert (restored is None) == (saved is None)
            if saved is not None:
                assert restored.shape == saved.shape
                assert restored.tobytes() == saved.tobytes()
        for one, other in zip(mine.traces, theirs.traces, strict=True):
            assert one.tokens.dtype == other.tokens.dtype
            assert one.tokens.tobytes() == other.tokens.tobytes()
            assert one.logprobs.dtype == other.logprobs.dtype
            assert one.logprobs.tobytes() == other.logprobs.tobytes()
            assert (one.end_token, one.end_logprob) == (other.end_token, other.end_logprob)


def test_one_wrong_character_is_noticed():
    text = pack_groups(worlds.random_groups(4, 3))
    middle = len(text) // 2
    other = "A" if text[middle] != "A" else "B"
    with pytest.raises(Exception, match=r"CRC|zip|decompress|invalid|differ"):
        read_arrays(text[:middle] + other + text[middle + 1 :])
