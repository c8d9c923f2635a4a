"""One decoder on many meshes: the same hidden states and gradients, and rows spread as promised."""

from functools import partial

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import PartitionSpec

from nrt_jax.errors import InputError
from nrt_jax.models import attention_backend
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.rows import TokenRows
from nrt_jax.models.sharding import param_shardings
from nrt_jax.models.splash_attention import splash_attend
from tests.models.tiny import LLAMA, architecture, close, decoder, mesh, tokens

A = architecture(vocab_size=64, **LLAMA)
P, R, S, T = 8, 2, 16, 24
MESHES = [
    {"data": 8},
    {"fsdp": 2, "tensor": 2, "context": 2},
    {"context": 8},
    {"tensor": 2, "context": 4},
]


def run(model: Decoder):
    """Hidden states of the tokens of packed rows, and gradients of a weighted sum of them.

    Without a mesh prompts and rows run one after the other, with one in one pass.
    """
    graph, state = nnx.split(model)
    state = nnx.to_pure_dict(state)
    if model.mesh is not None:
        state = jax.device_put(state, param_shardings(model.mesh, nnx.state(model)))

    @jax.jit
    @partial(jax.value_and_grad, has_aux=True)
    def loss(state):
        model = nnx.merge(graph, state)
        prompts, prompt_segments = tokens((P, S)), _segments(P, S, ends=(7, 14))
        positions = jnp.broadcast_to(jnp.arange(S), (P, S))
        prompt_rows = TokenRows(prompts, positions, prompt_segments)
        branches, segments = tokens((P * R, T), seed=1), _segments(P * R, T, ends=(5, 11, 20))
        positions = S + jnp.broadcast_to(jnp.arange(T), segments.shape)
        continued = jnp.minimum(segments, 2)
        rows = TokenRows(branches, positions, segments, continued)
        if model.mesh is None:
            _, prefix = model.hidden(*prompt_rows[:3])
            states, _ = model.hidden(*rows[:3], prefix, continued)
        else:
            _, states = model.hidden_of_packs(prompt_rows, rows)
        weights = jnp.sin(jnp.arange(states.size)).reshape(states.shape)
        states = jnp.where(segments[:, :, None] != 0, states, 0)
        return jnp.sum(weights * states), states

    (_, states), gradients = loss(state)
    return states, gradients


def _segments(rows: int, slots: int, ends: tuple[int, ...]) -> jax.Array:
    """Segments 1, 2, ... that end before `ends`, and padding."""
    starts = jnp.asarray((0, *ends))
    ids = jnp.searchsorted(starts, jnp.arange(slots), side="right")
    return jnp.broadcast_to(jnp.where(ids > len(ends), 0, ids), (rows, slots))


@pytest.fixture(scope="module")
def expected():
    return run(decoder(A))


@pytest.mark.parametrize("axes", MESHES, ids=str)
def test_a_mesh_changes_neither_states_nor_gradients(axes, expected):
    states, gradients = run(decoder(A, mesh=mesh(**axes)))
    close(states, expected[0])
    close(gradients, expected[1])
    rows = PartitionSpec(("data", "fsdp"), "context", None)
    wanted = jax.NamedSharding(mesh(**axes), rows)
    assert states.sharding.is_equivalent_to(wanted, states.ndim), states.sharding


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["full", "dots"])
def test_splash_changes_neither_states_nor_gradients(remat, expected, monkeypatch):
    """In Pallas' interpreter, with the weights and the tokens of all rows spread."""
    interpreted = partial(splash_attend, interpret=True)
    monkeypatch.setattr(attention_backend, "splash_attend", interpreted)
    on = mesh(fsdp=2, tensor=2, context=2)
    states, gradients = run(decoder(A, mesh=on, attention="splash", remat=remat))
    close(states, expected[0])
    close(gradients, expected[1])


def test_a_mesh_of_one_device_compiles_to_the_same_program():
    def program(model: Decoder) -> str:
        graph, state = nnx.split(model)
        positions, ids = jnp.zeros((2, 8), jnp.int32), tokens((2, 8))

        def states(state):
            return nnx.merge(graph, state).hidden(ids, positions, positions + 1)[0]

        return jax.jit(states).lower(state).as_text()

    assert program(decoder(A, mesh=mesh())) == program(decoder(A))


@pytest.mark.parametrize(
    ("axes", "rows", "message"),
    [
        ({"context": 8}, (8, 12), r"context=8 does not divide a row's tokens of size 12; .*\[1, 2"),
        ({"data": 4}, (6, 8), r"data\*fsdp=4 does not divide a batch's rows of size 6; .*\[1, 2"),
    ],
)
def test_rows_that_do_not_divide_are_refused(axes, rows, message):
    ids = tokens(rows)
    with pytest.raises(InputError, match=message):
        decoder(A, mesh=mesh(**axes)).hidden(ids, ids, ids)


def test_units_that_do_not_divide_are_refused():
    """Eight rows divide over four devices; the two prompts that they continue do not."""
    model = decoder(A, mesh=mesh(data=4))
    ids = jnp.ones((2, 8), jnp.int32)
    _, prefix = decoder(A).hidden(ids, ids, ids)
    rows = jnp.ones((8, 8), jnp.int32)
    with pytest.raises(InputError, match=r"data\*fsdp=4 does not divide a batch's rows of size 2"):
        model.hidden(rows, rows, rows, prefix)
