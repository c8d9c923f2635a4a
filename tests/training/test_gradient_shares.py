"""Each term's share of the gradient, against the gradient of that term alone."""

import jax
import numpy as np
import optax
import pytest

from nrt_jax.checkpoints.train_state import state_shardings
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.models.sharding import make_mesh
from nrt_jax.training.frozen_logprobs import frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss, terms_of
from nrt_jax.training.nrt import StepFunctions
from nrt_jax.training.update import Update, UpdateRule
from tests.training import worlds

DEFINITION, PARAMS = worlds.tiny_decoder()
SEQUENCES = 16


def step_functions(settings) -> StepFunctions:
    def loss_fn(params, batch):
        return nrt_loss(params, *batch, sequences=SEQUENCES, settings=settings)

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    optimizer = optax.sgd(0.1)
    return StepFunctions(
        update=Update(loss_fn, UpdateRule(optimizer, state_shardings(optimizer, PARAMS, mesh))),
        frozen_logprobs=frozen_logprobs_fn(settings, several_updates=False, reference=None),
        terms=terms_of(settings.objective),
    )


@pytest.fixture(scope="module")
def params():
    return jax.device_put(PARAMS, jax.devices()[0])


def test_shares_are_the_norms_of_the_terms_own_gradients(params):
    settings = worlds.settings(DEFINITION, entropy_coefficient=0.5, format_where="natural_end")
    functions, batch = step_functions(settings), worlds.random_batch()
    shares = functions.gradient_shares(params, batch)
    frozen = functions.frozen_logprobs(params, batch)

    @jax.jit
    def norms_of_terms(params):
        def term(params, name):
            loss = nrt_loss(params, batch, frozen, sequences=SEQUENCES, settings=settings)
            return loss[1].sums[f"loss/{name}"]

        names = ("trace", "token", "format", "entropy")
        return {name: optax.tree.norm(jax.grad(term)(params, name)) for name in names}

    norms = jax.device_get(norms_of_terms(params))
    assert min(norms.values()) > 0
    total = sum(norms.values())
    assert shares == pytest.approx(
        {f"gradient/{name}_share": norm / total for name, norm in norms.items()}, rel=1e-4
    )


def test_the_update_and_its_measurement_are_one_program(params):
    functions, batch = step_functions(worlds.settings(DEFINITION)), worlds.random_batch()
    functions.gradient_shares(params, batch)
    assert [name for name, _ in functions.update._programs] == ["a micro-batch"]


def test_terms_without_a_coefficient_have_no_share():
    objective = worlds.settings(DEFINITION, kl_coefficient=0.1, format_coefficient=0).objective
    assert terms_of(objective) == ["trace", "token", "kl"]


def test_groups_that_are_not_kept_have_shares_of_0(params):
    batch = worlds.random_batch()
    dropped = batch._replace(
        groups=batch.groups._replace(kept_P=np.zeros_like(batch.groups.kept_P))
    )
    shares = step_functions(worlds.settings(DEFINITION)).gradient_shares(params, dropped)
    assert set(shares.values()) == {0.0}
