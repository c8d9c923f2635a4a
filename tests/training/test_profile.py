"""The steps that are traced, and the names of the phases in programs."""

import jax
import jax.numpy as jnp
import optax
import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.training.logger import PhaseTimer
from nrt_jax.training.profile import traced
from nrt_jax.training.update import Metrics, add_micro_batch, apply_update, zero_total
from tests.conftest import REPOSITORY

QUICKSTART = [REPOSITORY / "configs" / "quickstart" / "nrt.yaml"]


def quickstart(*overrides: str) -> RunConfig:
    return load_config(RunConfig, QUICKSTART, overrides)


def test_a_step_of_the_list_leaves_a_trace(tmp_path):
    config, timer = quickstart(f"run_dir={tmp_path}", "profile.steps=[2]"), PhaseTimer()
    for step in (1, 2, 3):
        with traced(config, step), timer("generate"):
            jnp.ones(3).block_until_ready()
    (folder,) = (tmp_path / "profile").iterdir()
    assert folder.name == "step_2"
    (trace,) = folder.rglob("*.xplane.pb")
    assert b"generate" in trace.read_bytes()


def test_a_step_that_the_run_does_not_have():
    with pytest.raises(InputError, match=r"profile.steps names step 900 of train.steps"):
        quickstart("profile.steps=[1, 900]")


def loss_fn(params, batch):
    return jnp.sum(jnp.tanh(params * batch)), Metrics({}, {}, {})


def test_forward_and_backward_have_their_names():
    params, batch = jnp.ones(3), jnp.arange(3.0)
    total = zero_total(loss_fn, params, batch)
    program = jax.jit(lambda *args: add_micro_batch(loss_fn, *args)).lower(params, total, batch)
    text = program.as_text(debug_info=True)
    assert "/forward/jvp()/tanh" in text
    assert "/backward/transpose(jvp())/mul" in text


def test_the_gradient_is_that_of_grad():
    params, batch = jnp.linspace(-1, 1, 3), jnp.arange(3.0)
    total, _ = add_micro_batch(loss_fn, params, zero_total(loss_fn, params, batch), batch)
    expected, _ = jax.grad(loss_fn, has_aux=True)(params, batch)
    assert total.gradient.tolist() == expected.tolist()


def test_the_update_has_its_name():
    from nrt_jax.checkpoints.train_state import TrainState

    optimizer, params = optax.sgd(0.1), jnp.ones(3)
    state = TrainState(params, optimizer.init(params), *[jnp.int32(0)] * 3)
    apply = lambda state, gradient: apply_update(  # noqa: E731
        state, gradient, optimizer=optimizer, moments=None
    )
    assert "/update/" in jax.jit(apply).lower(state, params).as_text(debug_info=True)
