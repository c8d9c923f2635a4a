"""The loss that a step of a run reports, against plain loops over its mini-batches."""

import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints.abstract_model import abstract_model, init_params, load_tokenizer
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.training import rollouts, sft
from nrt_jax.training.loop import train
from tests.training.plain_loss import Policy, plain_loss, plain_sft_loss
from tests.training.runs import TinyRun

# Two mini-batches per step and two micro-batches per mini-batch, on the eight devices of the tests.
# The learning rate changes no float32 weight, so that the policy is the same in both mini-batches.
STEP = (
    "train.steps=1",
    "train.batch_prompts=32",
    "train.mini_batch_prompts=16",
    "train.micro_batch_prompts=8",
    "train.packing=false",
    "optimizer.learning_rate=1e-30",
    "optimizer.weight_decay=0",
    "objective.kl_coefficient=0",
    "evaluation.examples=0",
)
MINI_BATCH = 16
THINK_END = 5
"""Of the quickstart's tokenizer, whose six special tokens come first."""


def one_step(tiny_config, tmp_path, *overrides) -> tuple[Policy, RunConfig, dict[str, float]]:
    """The policy, the config and the metrics of a run of one step."""
    overrides = (*STEP, *overrides)
    run = TinyRun(tiny_config, tmp_path / "run", overrides)
    words = (*overrides, f"run_dir={run.directory}")
    config = load_config(RunConfig, [tiny_config], words)
    train(config)
    tokenizer = load_tokenizer(config)
    model = abstract_model(config, tokenizer)
    # The model's own definition wants rows that divide over its devices.
    decoder = abstract_decoder(model.architecture, vocab_multiple=config.model.vocab_multiple)
    policy = Policy(
        nnx.graphdef(decoder),
        init_params(config, model, tokenizer),
        tokenizer.think_start_id,
        tokenizer.think_end_id,
    )
    (metrics,) = [row for row in run.metrics() if "loss/total" in row]
    return policy, config, metrics


def watch_batches(monkeypatch, module, name) -> list:
    """Record the mini-batches that a function of the module packs."""
    minis, pack = [], getattr(module, name)

    def watched(examples, plan, **how):
        if not any(examples is mini for mini in minis):
            minis.append(examples)
        return pack(examples, plan, **how)

    monkeypatch.setattr(module, name, watched)
    return minis


def test_nrt(tiny_config, tmp_path, monkeypatch):
    minis = watch_batches(monkeypatch, rollouts, "nrt_batch")
    policy, config, metrics = one_step(tiny_config, tmp_path)
    assert [len(mini) for mini in minis] == [MINI_BATCH, MINI_BATCH]
    assert metrics["batch/micro_batches"] == 4
    expected = [plain_loss(policy, mini, config.objective) for mini in minis]
    for name in expected[0]:
        mean = np.mean([terms[name] for terms in expected])
        assert metrics[f"loss/{name}"] == pytest.approx(mean, rel=2e-4, abs=2e-6), name
    assert abs(expected[0]["token"]) > 1e-2


def test_sft(tiny_config, tmp_path, monkeypatch):
    minis = watch_batches(monkeypatch, sft, "sft_batch")
    policy, _, metrics = one_step(tiny_config, tmp_path, "method=sft", "profile.steps=[1]")
    assert list((tmp_path / "run" / "profile" / "step_1").rglob("*.xplane.pb"))
    assert [len(mini) for mini in minis] == [MINI_BATCH, MINI_BATCH]
    assert metrics["batch/micro_batches"] == 4
    expected = np.mean([plain_sft_loss(policy, mini) for mini in minis])
    assert metrics["loss/sft"] == pytest.approx(expected, rel=2e-4)


def test_with_think_end_alone_the_trainer_scores_what_the_sampler_drew_from(
    tiny_config, tmp_path, monkeypatch
):
    """No other special token ends a trace or is part of one."""
    minis = watch_batches(monkeypatch, rollouts, "nrt_batch")
    _, _, metrics = one_step(tiny_config, tmp_path, "rollout.stop_tokens=think_end")
    traces = [trace for mini in minis for group in mini for trace in group.traces]
    special = set(range(6))
    assert {trace.end_token for trace in traces} == {THINK_END, None}
    assert not special & {int(token) for trace in traces for token in trace.tokens}
    assert metrics["trace/end_other_share"] == 0
    assert metrics["mismatch/max"] < 1e-4


@pytest.mark.slow
def test_a_run_with_sharded_tokens_equals_the_run_without(tiny_config, tmp_path):
    """Rollouts, updates and evaluations of four steps, on the eight devices of the tests."""
    runs = []
    for mesh in (("mesh.data=8",), ("mesh.data=4", "mesh.context=2")):
        overrides = (
            "train.steps=4",
            "train.batch_prompts=8",
            "train.mini_batch_prompts=8",
            "train.micro_batch_prompts=8",
            *mesh,
        )
        run = TinyRun(tiny_config, tmp_path / mesh[-1], overrides)
        train(load_config(RunConfig, [tiny_config], (*overrides, f"run_dir={run.directory}")))
        runs.append(run)
    without, sharded = (run.metrics() for run in runs)
    for mine, theirs in zip(sharded, without, strict=True):
        mine, theirs = (_of_training(row) for row in (mine, theirs))
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)
    assert runs[1].lines("samples.jsonl") == runs[0].lines("samples.jsonl")
    weights, expected = (run.arrays(4) for run in runs)
    for name, array in expected.items():
        np.testing.assert_allclose(weights[name], array, rtol=1e-3, atol=1e-4, err_msg=name)


def _of_training(row: dict[str, float]) -> dict[str, float]:
    """Metrics without what follows from the mesh: the shapes of batches, and the weights that move
    to the rollouts."""
    return {n: x for n, x in row.items() if not n.startswith(("batch/", "weights/bytes"))}
