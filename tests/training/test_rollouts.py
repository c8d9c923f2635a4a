"""Every setting of the rollouts reaches what it is for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.engine.sampling import Sampling
from nrt_jax.training import nrt
from nrt_jax.training.rollouts import Sampler, random_streams
from nrt_jax.training.setup import Run, setup, training_batches
from nrt_jax.types import Example, TokenizedExample

SIZES = (
    "train.batch_prompts=8",
    "train.mini_batch_prompts=8",
    "train.micro_batch_prompts=8",
    "evaluation.examples=0",
    "objective.kl_coefficient=0",
)


@pytest.fixture
def config(tiny_config, tmp_path) -> Callable[..., RunConfig]:
    """A config for the eight devices of this process."""

    def load(*overrides: str) -> RunConfig:
        words = (f"run_dir={tmp_path / 'run'}", *SIZES, *overrides)
        return load_config(RunConfig, [tiny_config], words)

    return load


@pytest.fixture
def opened(config) -> Iterator[Callable[..., Run]]:
    """A run before its first step."""
    with ExitStack() as stack:
        yield lambda *overrides: stack.enter_context(setup(config(*overrides)))


def sampler(run: Run, **changes) -> Sampler:
    assert run.engines.traces is not None
    return Sampler(run.config, run.policy.tokenizer, run.engines.traces, **changes)


def example(index: int, answer_tokens: int) -> TokenizedExample:
    answer = np.full(answer_tokens, 5, np.int32)
    return TokenizedExample(Example(index, "q", "a"), np.asarray([1, 4, 3], np.int32), answer)


def test_how_traces_are_drawn(opened):
    run = opened(
        "objective.old_logprobs=recompute",
        "rollout.temperature=0.8",
        "rollout.top_k=7",
        "rollout.top_p=0.9",
        "rollout.min_p=0.01",
        "rollout.repetition_penalty=1.2",
        "rollout.decode_steps=3",
        "rollout.prefill_chunk=32",
        "rollout.cache_dtype=int8",
        "rollout.stop_tokens=['=', '3']",
        "rollout.traces_per_prompt=5",
        "rollout.max_trace_tokens=4",
        "rollout.max_response_tokens=9",
    )
    calls = []

    def generate(engine, params, requests, key, *, steps):
        calls.append((params, requests, steps))
        return [() for _ in requests]

    tokenizer, engine = run.policy.tokenizer, run.engines.traces
    examples = [example(index, length) for index, length in enumerate((1, 2, 4, 5), start=6)]
    examples[1] = replace(examples[1], after_start_tokens=np.asarray([8, 7], np.int32))
    groups = sampler(run, generate=generate).sample(run.engines.weights(run.progress), examples, 1)
    ((params, requests, steps),) = calls
    assert params is run.progress.state.params
    assert steps == 3
    for request, group, row in zip(requests, groups, examples, strict=True):
        assert request.sampling == Sampling(0.8, 0.9, 7, 0.01, 1.2)
        assert request.num_samples == 5
        assert request.stream == row.example.index
        assert request.prompt_tokens.dtype == np.int32
        after_start = row.after_start_tokens.tolist()
        assert request.prompt_tokens.tolist() == [1, 4, 3, tokenizer.think_start_id, *after_start]
        assert request.suffix_tokens is None
        assert (group.example, group.version) == (row, 0)
    # t_start, z, t_end and the answer are at most nine tokens, and z alone at most four.
    assert [request.max_tokens for request in requests] == [4, 4, 3, 2]
    assert engine.prefill_chunk == 32
    ours = {tokenizer.find(name) for name in ("=", "3")}
    assert engine.stop_ids == tokenizer.special_ids | ours
    layer = engine.init_decode_state().layers[0]
    assert jnp.dtype("int8") in {leaf.dtype for leaf in jax.tree.leaves(layer)}


def test_each_step_and_each_seed_draw_traces_of_their_own(opened):
    run = opened("rollout.traces_per_prompt=8")
    weights, examples = run.engines.weights(run.progress), [example(0, 1), example(1, 1)]

    def tokens(step: int, seed: int = 0) -> list[list[int]]:
        config = run.config.model_copy(update={"seed": seed})
        groups = replace(sampler(run), config=config).sample(weights, examples, step)
        return [trace.tokens.tolist() for group in groups for trace in group.traces]

    first = tokens(1)
    assert tokens(1) == first
    assert len({str(drawn) for drawn in (first, tokens(2), tokens(3), tokens(1, seed=1))}) == 4


def test_a_row_twice_in_a_batch_draws_traces_of_its_own(opened):
    """The first time it draws what it draws alone; the next times something else, reproducibly."""
    run = opened("rollout.traces_per_prompt=8")
    weights, (one, other) = run.engines.weights(run.progress), (example(0, 1), example(1, 1))

    def tokens(*examples: TokenizedExample) -> list[list[list[int]]]:
        groups = sampler(run).sample(weights, examples, 1)
        return [[trace.tokens.tolist() for trace in group.traces] for group in groups]

    first, second, third = tokens(one, one, one)
    assert len({str(drawn) for drawn in (first, second, third)}) == 3
    assert [first] == tokens(one)
    assert tokens(other, one, one)[1:] == [first, second]
    assert tokens(one, other, one)[::2] == [first, second]


@pytest.mark.parametrize(
    ("overrides", "several_updates", "stale"),
    [
        ((), False, False),
        (("train.batch_prompts=16",), True, False),
        (
            (
                "rollout.staleness=1",
                "objective.old_logprobs=recompute",
                "objective.importance_cap=2",
            ),
            False,
            True,
        ),
    ],
)
def test_what_stays_fixed_during_a_step(opened, monkeypatch, overrides, several_updates, stale):
    """c_base where several updates share a rollout, and what older weights scored."""
    asked, make = {}, nrt.frozen_logprobs_fn

    def watched(settings, **how):
        asked.update(how, settings=settings)
        return make(settings, **how)

    monkeypatch.setattr(nrt, "frozen_logprobs_fn", watched)
    run = opened("rollout.temperature=0.5", "model.logprob_chunk_tokens=64", *overrides)
    nrt.make_step_functions(run.config, run.policy)
    settings, tokenizer = asked.pop("settings"), run.policy.tokenizer
    assert asked == {"several_updates": several_updates, "reference": None}
    assert settings.objective is run.config.objective
    assert (settings.think_start, settings.think_end) == (
        tokenizer.think_start_id,
        tokenizer.think_end_id,
    )
    assert (settings.temperature, settings.chunk_tokens, settings.stale) == (0.5, 64, stale)


def test_no_two_places_of_a_batch_share_their_noise():
    rows = [0, 3, 0, 5, 0, 3, 2**31 - 1, 2**31 - 1]
    streams = random_streams([example(row, 1) for row in rows])
    assert len(set(streams)) == len(rows)
    assert [streams[i] for i in (0, 1, 3, 6)] == [0, 3, 5, 2**31 - 1]
    assert all(-(2**31) <= stream < 0 for stream in (streams[i] for i in (2, 4, 5, 7)))


def test_another_seed_reads_the_data_in_another_order(config):
    examples = [example(index, 1) for index in range(24)]

    def order(*overrides: str) -> list[int]:
        batches = training_batches(config(*overrides), examples)
        return [row.example.index for _ in range(3) for row in next(batches)]

    first = order()
    assert sorted(first) == list(range(24))
    assert order() == first
    assert len({str(drawn) for drawn in (first, order("seed=1"), order("data.seed=2"))}) == 3


def test_the_engines_weights_are_the_trainings_own(opened):
    run = opened()
    weights = run.engines.weights(run.progress)
    assert weights.params is run.progress.state.params
    assert weights.metrics["weights/bytes"] == 0
    assert run.engines.traces.mesh is run.policy.model.mesh


def test_training_and_evaluation_share_compiled_programs(opened):
    run = opened("evaluation.examples=1")
    assert run.engines.traces.programs is run.engines.answerer.trace_engine.programs


def test_a_mesh_and_a_dtype_of_their_own(opened):
    run = opened("mesh={data: 1, fsdp: 8}", "rollout.mesh={data: 8}", "rollout.dtype=bfloat16")
    engines, progress = run.engines, run.progress
    assert engines.traces.mesh.shape == {"data": 8, "fsdp": 1, "tensor": 1, "context": 1}
    first = engines.weights(progress)
    embedding = first.params["embedding"]
    assert embedding.dtype == jnp.bfloat16
    assert embedding.sharding.is_fully_replicated
    assert first.params["final_norm"]["scale"].dtype == jnp.float32
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(first.params)]
    assert first.metrics["weights/bytes"] == sum(sizes)
    assert engines.weights(progress) is first, "once a version"
    # What an update and finish_step do.
    progress.state = progress.state._replace(
        params=jax.tree.map(lambda w: 2 * w, progress.state.params)
    )
    progress.step = 1
    second = engines.weights(progress)
    assert (first.version, second.version) == (0, 1)
    np.testing.assert_array_equal(
        np.asarray(second.params["embedding"]), 2 * np.asarray(first.params["embedding"])
    )


def test_devices_of_their_own(opened):
    run = opened("rollout.devices=4")
    assert run.engines.traces.mesh.devices.flatten().tolist() == jax.devices()[-4:]
    assert run.policy.model.mesh.devices.flatten().tolist() == jax.devices()[:-4]
    embedding = run.engines.weights(run.progress).params["embedding"]
    assert embedding.sharding.device_set == set(jax.devices()[-4:])
    trained = run.progress.state.params["embedding"]
    assert trained.sharding.device_set == set(jax.devices()[:-4])
