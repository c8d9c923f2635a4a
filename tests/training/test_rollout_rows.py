"""The log of rollouts of a run: its rows are what the step sampled, scored and trained on."""

from dataclasses import replace
from itertools import islice

import jax
import numpy as np
import pandas as pd
import pytest

from nrt_jax import distributed
from nrt_jax.analysis.rollout_log import by_group, by_prompt, read_traces
from nrt_jax.config.load import load_config
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.models.sharding import batch_sharding, make_mesh
from nrt_jax.objective.rewards import score_rewards
from nrt_jax.training.loop import train
from nrt_jax.training.loss import TraceValues
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.rollout_rows import rollout_table, to_host, values_of_groups
from nrt_jax.training.rollouts import mini_batch
from nrt_jax.types import SuffixLogprobs
from tests.training import worlds
from tests.training.runs import TinyRun

SIZES = (
    "train.steps=2",
    "train.batch_prompts=8",
    "train.mini_batch_prompts=4",
    "train.micro_batch_prompts=4",
    "mesh.data=4",
    "rollout.devices=4",
    "evaluation.examples=0",
    "objective.kl_coefficient=0",
)


def trained(tiny_config, directory, *overrides: str) -> TinyRun:
    words = (*SIZES, f"run_dir={directory}", *overrides)
    train(load_config(RunConfig, [tiny_config], words))
    return TinyRun(tiny_config, directory)


@pytest.fixture(scope="module")
def logged(tiny_config, tmp_path_factory) -> TinyRun:
    folder = tmp_path_factory.mktemp("logged")
    return trained(tiny_config, folder / "run", "logging.rollouts=true")


def test_rows_agree_with_the_metrics(logged):
    rows = pd.read_parquet(logged.directory / "rollouts")
    assert rows[["step", "group", "sample"]].to_numpy().tolist() == [
        [step, group, k] for step in (1, 2) for group in range(8) for k in range(2)
    ]
    for metrics, (_, of_step) in zip(logged.metrics(), rows.groupby("step"), strict=True):
        assert np.mean(of_step["reward"]) == pytest.approx(metrics["reward/mean"], rel=1e-5)
        assert np.mean(of_step["baseline"]) == pytest.approx(metrics["reward/baseline"], rel=1e-5)
        assert of_step["num_tokens"].mean() == metrics["trace/tokens"]
        ends = of_step["finish"].value_counts(normalize=True)
        shares = {"length": 0.0, "<|think_end|>": 0.0} | ends.to_dict()
        assert shares["length"] == metrics["trace/end_length_share"]
        assert shares["<|think_end|>"] == metrics["trace/end_think_end_share"]
        # The first update scores the traces with the weights that drew them.
        first = of_step[of_step["group"] < 4]
        gaps = np.abs(np.concatenate(list(first["logprobs"] - first["trained_logprobs"])))
        assert gaps.mean() == pytest.approx(metrics["mismatch/mean"], abs=1e-6)
        assert gaps.max() < 1e-4
        second = of_step[of_step["group"] >= 4]
        moved = np.concatenate(list(second["logprobs"] - second["trained_logprobs"]))
        assert np.abs(moved).max() > 1e-4
    assert rows["num_tokens"].tolist() == rows["tokens"].map(len).tolist()
    assert rows["end_logprob"].isna().tolist() == (rows["finish"] == "length").tolist()


def test_rewards_are_those_of_the_answer_logprobs(logged, tiny_config):
    objective = load_config(RunConfig, [tiny_config], []).objective
    groups = by_group(read_traces(logged.directory, first_step=1, last_step=1))
    # Of the first update: the second compares with c_base from before the first.
    for group in islice(groups, 4):
        answers = np.stack([trace.answer_logprobs for trace in group])
        score = SuffixLogprobs(answers, group[0].baseline_logprobs)
        rewards = score_rewards([score], objective)
        assert [trace.reward for trace in group] == pytest.approx(rewards.reward_PK[0], rel=1e-4)
        assert [trace.baseline for trace in group] == pytest.approx(
            2 * [rewards.baseline_P[0]], rel=1e-4
        )


def test_the_reader_filters_and_groups(logged):
    everything, second = (list(read_traces(logged.directory, first_step=first)) for first in (1, 2))
    assert [trace.step for trace in everything] == 16 * [1] + 16 * [2]
    assert {trace.step for trace in second} == {2}
    assert {trace.weights_step for trace in second} == {1}
    assert [(g[0].group, len(g)) for g in by_group(second)] == [(group, 2) for group in range(8)]
    prompts = by_prompt(everything)
    assert sum(map(len, prompts.values())) == 32
    assert all(trace.row == row for (_, row), traces in prompts.items() for trace in traces)
    rows = pd.read_parquet(logged.directory / "rollouts")
    for trace, tokens, logprobs in zip(everything, rows["tokens"], rows["logprobs"], strict=True):
        assert trace.tokens.tolist() == tokens.tolist()
        assert trace.logprobs.tobytes() == logprobs.tobytes()


def test_the_log_changes_no_number_and_is_off_by_default(logged, tiny_config, tmp_path):
    plain = trained(tiny_config, tmp_path / "run")
    assert not (plain.directory / "rollouts").exists()
    assert plain.metrics() == logged.metrics()
    assert {row["time/rollout_log_s"] > 0 for row in logged.lines("metrics.jsonl")} == {True}
    with pytest.raises(InputError, match=r"has no rollouts/\*\.parquet; train .*rollouts=true"):
        next(read_traces(plain.directory))


def test_every_process_gets_the_values_of_all_devices(monkeypatch):
    mesh = make_mesh(MeshConfig())
    wanted = values_that_name_their_group(worlds.random_batch(prompts=8))
    plain = to_host([[jax.device_put(wanted)]], mesh)[0][0]
    assert plain.reward_PK.tolist() == wanted.reward_PK.tolist()
    monkeypatch.setattr(distributed, "process_count", lambda: 2)
    found = to_host([[jax.device_put(wanted, batch_sharding(mesh))]], mesh)[0][0]
    for mine, theirs in zip(found, wanted, strict=True):
        assert isinstance(mine, np.ndarray)
        assert mine.tolist() == theirs.tolist()


# --- groups that the update leaves out ------------------------------------------------------------


def scored_groups() -> list:
    """Four groups with scores of the engine that are nobody else's."""
    groups, rng = worlds.random_groups(4, 3), np.random.default_rng(0)
    for p, group in enumerate(groups):
        A = len(group.example.answer_tokens)
        log_c = [rng.uniform(-2, 0, shape).astype(np.float32) for shape in ((3, A), (A,))]
        groups[p] = replace(group, log_c_KA=log_c[0], log_c_base_A=log_c[1])
    return groups


def values_that_name_their_group(batch) -> TraceValues:
    """What an update would give, with values that follow from the group in that place."""
    arrays = batch.groups
    K = arrays.trace_length_PK.shape[1]
    return TraceValues(
        logprob_PKT=arrays.sampler_logprob_PKT,
        log_c_PKA=np.repeat(-arrays.answer_PA[:, None].astype(np.float32), K, axis=1),
        log_c_base_PA=-2.0 * arrays.answer_PA.astype(np.float32),
        reward_PK=arrays.trace_length_PK.astype(np.float32),
        baseline_P=arrays.answer_length_P.astype(np.float32),
        advantage_PK=-arrays.trace_length_PK.astype(np.float32),
    )


@pytest.mark.parametrize("kept", [(True, False, True, True), (True, True, False, False)])
def test_each_group_has_its_own_values_and_a_dropped_one_its_scores(kept):
    groups, think = scored_groups(), {"think_start": 2, "think_end": 3}
    packer = Packer(Layout(micro_batch_prompts=1))
    minis = [
        mini_batch(groups[start : start + 2], np.asarray(kept[start : start + 2]), packer, **think)
        for start in (0, 2)
    ]
    values = [[values_that_name_their_group(b) for b in mini.micro_batches] for mini in minis]
    objective = ObjectiveConfig(length_constant=8.0)
    of_groups = values_of_groups(groups, minis, values, objective)
    table = rollout_table(7, groups, of_groups, ["length"] * 12)
    assert table["step"].to_pylist() == 12 * [7]
    rows = table.to_pandas()
    scores = [SuffixLogprobs(group.log_c_KA, group.log_c_base_A) for group in groups]
    rewards = score_rewards(scores, objective)
    for p, (group, trained) in enumerate(zip(groups, kept, strict=True)):
        for k, trace in enumerate(group.traces):
            row = rows.iloc[3 * p + k]
            assert row["tokens"].tolist() == trace.tokens.tolist()
            if not trained:
                assert row["trained_logprobs"] is None
                assert np.isnan(row["advantage"])
                assert row["answer_logprobs"].tolist() == group.log_c_KA[k].tolist()
                assert row["reward"] == rewards.reward_PK[p, k]
                assert row["baseline"] == rewards.baseline_P[p]
                continue
            assert row["trained_logprobs"].tolist() == trace.logprobs.tolist()
            assert (-row["answer_logprobs"]).tolist() == group.example.answer_tokens.tolist()
            assert row["baseline_logprobs"].tolist() == (2 * row["answer_logprobs"]).tolist()
            assert row["baseline"] == len(row["answer_logprobs"])
            assert row["reward"] == -row["advantage"] == len(trace.tokens)
