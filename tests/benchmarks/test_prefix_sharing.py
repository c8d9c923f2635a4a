"""The two layouts that the benchmark compares compute the same, and cost what it says."""

from functools import partial

import jax
import pytest
from flax import nnx

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.training.batch import nrt_batch
from nrt_jax.training.forward import NrtSettings
from tests.benchmarks.scripts import load

script = load("prefix_sharing")
SMALL = Architecture(
    vocab_size=500, hidden_size=256, intermediate_size=512, num_hidden_layers=1, head_dim=64
)


def test_layouts_agree():
    """`measure` refuses sums or gradients that differ; deeper than what the counts need."""
    deep = SMALL.model_copy(update={"num_hidden_layers": 2})
    shared, plain, error = script.measure(deep, script.Sizes(19, 3, 7, 5), repeats=1)
    assert error < 1e-5
    assert shared.flops < plain.flops


def test_formulas_are_what_the_sums_cost(monkeypatch):
    sizes = script.Sizes(160, 4, 40, 23)
    # XLA counts the body of a scan over chunks once.
    monkeypatch.setattr(script, "CHUNK_TOKENS", 4096)
    definition, state = nnx.split(abstract_decoder(SMALL))
    params = nnx.to_pure_dict(state)
    group, plan = script.one_group(sizes, SMALL.vocab_size)
    batch = jax.device_put(nrt_batch([group], plan, think_start=1, think_end=2))
    settings = NrtSettings(definition, ObjectiveConfig(), 1, 2, 1.0, 4096)
    plain_logprob = partial(script.plain_logprob, definition=definition, prompt=sizes.prompt)

    def counted(logprob, data) -> float:
        costs = jax.jit(jax.value_and_grad(logprob)).lower(params, data).cost_analysis()
        assert costs is not None
        return costs["flops"]

    shared = counted(partial(script.shared_logprob, settings=settings), batch)
    plain = counted(plain_logprob, script.plain_layout(group))
    assert script.shared_flops(SMALL, plan) == pytest.approx(shared, rel=0.05)
    assert script.plain_flops(SMALL, sizes) == pytest.approx(plain, rel=0.05)


def test_twice_the_work_without_sharing():
    sizes = script.Sizes(1024, 8, 256, 64)
    _, plan = script.one_group(sizes, script.MODEL.vocab_size)
    plain = script.plain_flops(script.MODEL, sizes)
    assert plain >= 2 * script.shared_flops(script.MODEL, plan)
