"""Every setting of the rollouts reaches what it is for."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.engine.sampling import Sampling
from nrt_jax.stop import StopRequest
from nrt_jax.training import rollouts
from nrt_jax.training.setup import Run, open_run

SIZES = (
    "train.batch_prompts=8",
    "train.mini_batch_prompts=8",
    "train.micro_batch_prompts=8",
    "evaluation.examples=0",
    "objective.kl_coefficient=0",
)


@pytest.fixture
def opened(tiny_config, tmp_path) -> Iterator[Callable[..., Run]]:
    """A run on the eight devices of this process, before its first step."""
    with ExitStack() as stack:

        def run(*overrides: str) -> Run:
            words = (f"run_dir={tmp_path / 'run'}", *SIZES, *overrides)
            config = load_config(RunConfig, [tiny_config], words)
            return stack.enter_context(open_run(config, StopRequest()))

        yield run


def test_how_traces_are_drawn(opened, monkeypatch):
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
    )
    engine, examples = rollouts.rollout_engine(run), next(run.batches)
    calls = []

    def generate(engine, params, requests, key, *, steps):
        calls.append((params, requests, steps))
        return [() for _ in requests]

    monkeypatch.setattr(rollouts, "generate", generate)
    groups = rollouts.sample_groups(run, engine, run.engine_weights(), examples, 1)
    ((params, requests, steps),) = calls
    assert params is run.state.params
    assert steps == 3
    for request, group, example in zip(requests, groups, examples, strict=True):
        assert request.sampling == Sampling(0.8, 0.9, 7, 0.01, 1.2)
        assert request.copies == 5
        assert request.prompt_tokens.tolist() == [
            *example.prompt_tokens.tolist(),
            run.tokenizer.think_start_id,
        ]
        assert request.suffix_tokens is None
        assert (group.example, group.version) == (example, 0)
    assert engine.prefill_chunk == 32
    ours = {run.tokenizer.find(name) for name in ("=", "3")}
    assert engine.stop_ids == run.tokenizer.special_ids | ours
    layer = engine.init_decode_state().layers[0]
    assert jnp.dtype("int8") in {leaf.dtype for leaf in jax.tree.leaves(layer)}


def test_the_engines_weights_are_the_trainings_own(opened):
    run = opened()
    weights = run.engine_weights()
    assert weights.params is run.state.params
    assert weights.metrics["weights/bytes"] == 0
    assert rollouts.rollout_engine(run).mesh is run.model.mesh


def test_a_mesh_and_a_dtype_of_their_own(opened):
    run = opened("mesh={data: 1, fsdp: 8}", "rollout.mesh={data: 8}", "rollout.dtype=bfloat16")
    assert rollouts.rollout_engine(run).mesh.shape == {
        "data": 8,
        "fsdp": 1,
        "tensor": 1,
        "context": 1,
    }
    first = run.engine_weights()
    embedding = first.params["embedding"]
    assert embedding.dtype == jnp.bfloat16
    assert embedding.sharding.is_fully_replicated
    assert first.params["final_norm"]["scale"].dtype == jnp.float32
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(first.params)]
    assert first.metrics["weights/bytes"] == sum(sizes)
    assert run.engine_weights() is first, "once a version"
    # What finish_step and an update do.
    run.state = run.state._replace(params=jax.tree.map(lambda w: 2 * w, run.state.params))
    run.step = 1
    second = run.engine_weights()
    assert (first.version, second.version) == (0, 1)
    np.testing.assert_array_equal(
        np.asarray(second.params["embedding"]), 2 * np.asarray(first.params["embedding"])
    )


def test_devices_of_their_own(opened):
    run = opened("rollout.devices=4")
    engine = rollouts.rollout_engine(run)
    assert engine.mesh.devices.flatten().tolist() == jax.devices()[-4:]
    assert run.model.mesh.devices.flatten().tolist() == jax.devices()[:-4]
    embedding = run.engine_weights().params["embedding"]
    assert embedding.sharding.device_set == set(jax.devices()[-4:])
    assert run.state.params["embedding"].sharding.device_set == set(jax.devices()[:-4])
