"""What one decoder must do: causality, prefix = full forward, padding, remat, bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.config.architecture import Architecture
from nrt_jax.models.decoder import Decoder
from tests.models.incremental import prefill_and_decode
from tests.models.tiny import LLAMA, WINDOW, architecture, close, decoder, tokens

VARIANTS = {
    "llama3": architecture(**LLAMA),
    "tied": architecture(tie_word_embeddings=True),
    "window": architecture(**WINDOW),
}
variants = pytest.mark.parametrize("a", VARIANTS.values(), ids=VARIANTS.keys())
positions_and_masks = pytest.mark.parametrize(
    "a", [VARIANTS["llama3"], VARIANTS["window"]], ids=["llama3", "window"]
)
"""Which row continues which prompt is no matter of the head."""
forward = nnx.jit(lambda model, *inputs: model(*inputs))


@pytest.mark.parametrize("window", [None, 4])
def test_causal_by_gradient(window):
    """d logits[t] / d embedding of token s is zero exactly where t may not see s."""
    changes = {} if window is None else WINDOW | {"sliding_window": window}
    model = decoder(architecture(num_hidden_layers=1, **changes))
    T = 9
    graph, weights = nnx.split(model)

    @jax.jit
    @jax.jacrev
    def jacobian(weights):
        return nnx.merge(graph, weights)(jnp.arange(T)[None])[0].sum(axis=-1)

    # Token s is row s of the embedding, so that the gradient of a row is that of a position.
    gradient = nnx.to_pure_dict(jacobian(weights))["embedding"][:, :T]
    distance = np.arange(T)[:, None] - np.arange(T)[None, :]
    seen = (distance >= 0) & (distance < (T if window is None else window))
    np.testing.assert_array_equal(np.abs(gradient).max(axis=-1) > 0, seen)


@variants
def test_prefill_and_decode_equal_the_full_forward(a: Architecture):
    model, ids = decoder(a), tokens((2, 12))
    close(prefill_and_decode(model, ids, prompt=7), forward(model, ids))


@positions_and_masks
def test_branches_of_one_prefix_equal_full_sequences(a: Architecture):
    """Values and gradients; two prompts of lengths 6 and 4 (left-padded), three branches each."""
    P, R, S, T = 2, 3, 6, 5
    prompts, branches = tokens((P, S)), tokens((P * R, T), seed=1)
    prompt_valid = jnp.arange(S)[None] >= jnp.asarray([[0], [2]])
    branch_valid = jnp.arange(T)[None] < jnp.asarray([[5], [3], [4], [5], [1], [2]])
    copies = jnp.repeat(prompts, R, axis=0), jnp.repeat(prompt_valid, R, axis=0)
    whole = [
        jnp.concatenate(pair, axis=1) for pair in zip(copies, (branches, branch_valid), strict=True)
    ]
    graph, weights = nnx.split(decoder(a))

    def shared(weights):
        model = nnx.merge(graph, weights)
        prompt_positions = jnp.maximum(jnp.cumsum(prompt_valid, axis=1) - 1, 0)
        _, prefix = model.hidden(prompts, prompt_positions, prompt_valid.astype(int))
        start = jnp.repeat(prompt_valid.sum(axis=1), R)
        here = start[:, None] + jnp.arange(T)[None]
        logits = model.logits(model.hidden(branches, here, branch_valid.astype(int), prefix)[0])
        return _objective(logits, branch_valid), logits

    def full(weights):
        logits = nnx.merge(graph, weights)(whole[0], None, whole[1].astype(int))[:, S:]
        return _objective(logits, branch_valid), logits

    (_, actual), actual_grad = jax.jit(jax.value_and_grad(shared, has_aux=True))(weights)
    (_, expected), expected_grad = jax.jit(jax.value_and_grad(full, has_aux=True))(weights)
    close(actual[branch_valid], expected[branch_valid])
    close(nnx.to_pure_dict(actual_grad), nnx.to_pure_dict(expected_grad), 2e-5)


@positions_and_masks
def test_packed_rows_equal_each_sequence_alone(a: Architecture):
    """Values and gradients; prompts of 4, 3 and 5 tokens in two rows, five branches in four.

    Row 0 of the prompts holds prompts 0 and 1, row 1 padding and prompt 2.
    """
    prompts = [tokens((4,)), tokens((3,), seed=1), tokens((5,), seed=2)]
    places = [(0, 0, 1), (0, 4, 2), (1, 2, 1)]  # row, first slot, segment id
    branches = [tokens((n,), seed=3 + i) for i, n in enumerate((3, 2, 4, 5, 2))]
    # Row, first slot, segment id, prompt: rows 0 and 1 continue prompt row 0.
    packed = [(0, 0, 1, 0), (0, 3, 2, 1), (1, 1, 1, 1), (2, 0, 1, 2), (3, 4, 3, 2)]
    prompt_PS, branch_BT = _empty_rows(2, 8), _empty_rows(4, 6)
    for ids, (row, start, segment) in zip(prompts, places, strict=True):
        _write(prompt_PS, row, start, ids, 0, segment, 0)
    for ids, (row, start, segment, p) in zip(branches, packed, strict=True):
        _write(branch_BT, row, start, ids, len(prompts[p]), segment, places[p][2])
    graph, weights = nnx.split(decoder(a))

    def shared(weights):
        model = nnx.merge(graph, weights)
        *prompt_rows, _ = jnp.asarray(prompt_PS)
        *branch_rows, continued_BT = jnp.asarray(branch_BT)
        _, prefix = model.hidden(*prompt_rows)
        states, _ = model.hidden(*branch_rows, prefix, continued_BT)
        starts = [(row, at) for row, at, _, _ in packed]
        outputs = zip(branches, starts, strict=True)
        return _weighted([states[row, at : at + len(ids)] for ids, (row, at) in outputs])

    def alone(weights):
        model = nnx.merge(graph, weights)
        outputs = []
        for ids, (_, _, _, p) in zip(branches, packed, strict=True):
            whole = jnp.concatenate([prompts[p], ids])[None]
            order, ones = jnp.arange(whole.shape[1])[None], jnp.ones(whole.shape, int)
            outputs.append(model.hidden(whole, order, ones)[0][0, len(prompts[p]) :])
        return _weighted(outputs)

    (_, actual), actual_grad = jax.jit(jax.value_and_grad(shared, has_aux=True))(weights)
    (_, expected), expected_grad = jax.jit(jax.value_and_grad(alone, has_aux=True))(weights)
    close(actual, expected)
    close(nnx.to_pure_dict(actual_grad), nnx.to_pure_dict(expected_grad), 2e-5)


def _empty_rows(rows: int, slots: int) -> np.ndarray:
    """Tokens, positions, segment ids and those of the prompts, [4, rows, slots]."""
    return np.zeros((4, rows, slots), np.int32)


def _write(packed, row: int, start: int, ids, position: int, segment: int, prompt: int) -> None:
    n = len(ids)
    packed[:, row, start : start + n] = np.stack(
        [ids, position + np.arange(n), np.full(n, segment), np.full(n, prompt)]
    )


def _weighted(states: list[jax.Array]) -> tuple[jax.Array, list[jax.Array]]:
    """A sum in which every number has a weight of its own, and the states."""
    total = sum(jnp.sum(jnp.sin(jnp.arange(x.size)).reshape(x.shape) * x) for x in states)
    return jnp.asarray(total), states


def _objective(logits: jax.Array, valid: jax.Array) -> jax.Array:
    log_pi = jax.nn.log_softmax(logits)[..., 7]
    return jnp.sum(jnp.where(valid, log_pi * (1 + jnp.arange(log_pi.shape[1]))[None], 0))


@variants
def test_padding_on_either_side_changes_nothing(a: Architecture):
    model, T, padding = decoder(a), 8, 3
    ids = tokens((2, T))
    expected = jax.nn.log_softmax(forward(model, ids))
    true, false = jnp.ones((2, T), int), jnp.zeros((2, padding), int)
    junk = tokens((2, padding), seed=1)
    left = forward(model, jnp.concatenate([junk, ids], 1), None, jnp.concatenate([false, true], 1))
    right = forward(model, jnp.concatenate([ids, junk], 1), None, jnp.concatenate([true, false], 1))
    close(jax.nn.log_softmax(left[:, padding:]), expected)
    close(jax.nn.log_softmax(right[:, :T]), expected)


def _loss_and_gradient(model: Decoder, ids: jax.Array) -> tuple[jax.Array, dict]:
    graph, weights = nnx.split(model)

    def loss(weights):
        log_pi = jax.nn.log_softmax(nnx.merge(graph, weights)(ids)[:, :-1])
        return -jnp.mean(jnp.take_along_axis(log_pi, ids[:, 1:, None], axis=-1))

    value, gradient = jax.jit(jax.value_and_grad(loss))(weights)
    return value, nnx.to_pure_dict(gradient)


@pytest.mark.parametrize("remat", ["full", "dots", "offload"])
def test_remat_changes_neither_loss_nor_gradient(remat):
    a, ids = architecture(**LLAMA), tokens((2, 24))
    close(
        _loss_and_gradient(decoder(a, remat=remat), ids),
        _loss_and_gradient(decoder(a, remat="none"), ids),
    )


def test_remat_keeps_less():
    """Bytes that the forward pass keeps for the backward pass: all, matrix products, inputs."""
    kept = {}
    for remat in ("none", "dots", "full"):
        graph, weights = nnx.split(decoder(architecture(), remat=remat))
        states = jax.eval_shape(
            lambda w, graph=graph: jax.vjp(lambda w: nnx.merge(graph, w)(tokens((2, 24))), w)[1],
            weights,
        )
        kept[remat] = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(states))
    assert kept["full"] < kept["dots"] < kept["none"]


def test_bfloat16_compute_is_close_and_its_logits_float32():
    """Weights and their gradients stay float32; bfloat16 keeps 8 bits, and two layers add up."""
    a, ids = architecture(**LLAMA), tokens((2, 24))
    half = decoder(a, dtype=jnp.bfloat16)
    logits = forward(half, ids)
    assert logits.dtype == jnp.float32
    expected = forward(decoder(a), ids)
    close(logits, expected, 0.05)
    assert np.abs(logits - expected).max() > 0
    loss, gradient = _loss_and_gradient(half, ids)
    expected_loss, expected_gradient = _loss_and_gradient(decoder(a), ids)
    assert {x.dtype for x in jax.tree.leaves(gradient)} == {jnp.dtype(jnp.float32)}
    close(loss, expected_loss, 0.02)
    close(gradient, expected_gradient, 0.1)
