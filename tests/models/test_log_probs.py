"""Chunked scores against a plain log-softmax, in value, gradient and memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.models.log_probs import TokenScores, token_scores
from tests.models.tiny import close, tokens

B, T, D, V = 2, 48, 8, 101


def example() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    hidden = jax.random.normal(jax.random.key(0), (B, T, D))
    head = 0.7 * jax.random.normal(jax.random.key(1), (D, V))
    temperature = jax.random.uniform(jax.random.key(2), (B, T), minval=0.5, maxval=2.0)
    return hidden, head, tokens((B, T), V), temperature


def plain(hidden, head, targets, temperature) -> TokenScores:
    log_pi = jax.nn.log_softmax(hidden @ head / temperature[..., None], axis=-1)
    log_prob = (log_pi * jax.nn.one_hot(targets, V)).sum(-1)
    return TokenScores(log_prob, -(jnp.exp(log_pi) * log_pi).sum(-1))


def chunked(hidden, head, targets, temperature, chunk_tokens=16, vocab_size=V) -> TokenScores:
    return token_scores(
        hidden,
        head,
        targets,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        inverse_temperature_BT=1 / temperature,
    )


def weighted_sum(scores: TokenScores) -> jax.Array:
    """A scalar in which every score counts differently."""
    weights = 1 + jnp.arange(B * T, dtype=jnp.float32).reshape(B, T) / T
    return jnp.sum(weights * scores.log_prob_BT + jnp.sin(weights) * scores.entropy_BT)


@pytest.mark.parametrize("chunk_tokens", [1, 10, 16, 62, B * T, 10**6])
def test_equals_plain_log_softmax(chunk_tokens):
    """Also where the chunk does not divide T, is smaller than B, or holds everything."""
    hidden, head, targets, temperature = example()

    def run(function):
        """The scores, and the gradient of a sum of them with respect to states and head."""

        def loss(hidden, head):
            scores = function(hidden, head, targets, temperature)
            return weighted_sum(scores), scores

        return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)

    close(run(partial(chunked, chunk_tokens=chunk_tokens)), run(plain))


def test_columns_beyond_the_vocabulary_do_not_exist():
    """Value, entropy and gradient are those of the head without them; theirs is zero."""
    hidden, head, targets, temperature = example()
    padded = jnp.pad(head, ((0, 0), (0, 27)), constant_values=3.0)

    def loss(head):
        scores = chunked(hidden, head, targets, temperature / 8)
        return weighted_sum(scores), scores

    (gradient, scores) = jax.jit(jax.grad(loss, has_aux=True))(padded)
    expected_gradient, expected = jax.jit(jax.grad(loss, has_aux=True))(head)
    close(scores, expected)
    close(gradient[:, :V], expected_gradient)
    np.testing.assert_array_equal(gradient[:, V:], 0)


def test_without_temperature_it_is_one():
    hidden, head, targets, _ = example()
    close(
        token_scores(hidden, head, targets, vocab_size=head.shape[1], chunk_tokens=16),
        plain(hidden, head, targets, jnp.ones((B, T))),
    )


def test_scores_of_bfloat16_states_are_float32():
    hidden, head, targets, _ = example()
    scores = token_scores(
        hidden.astype(jnp.bfloat16), head, targets, vocab_size=head.shape[1], chunk_tokens=16
    )
    assert {x.dtype for x in scores} == {jnp.dtype(jnp.float32)}
    # Float32 sums of products of bfloat16 numbers: only the rounding of the inputs is lost.
    rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head))
    close(scores, plain(*rounded, targets, jnp.ones((B, T))))


def largest_buffer(chunk_tokens: int) -> int:
    """Elements of the largest array in the compiled value-and-gradient."""
    hidden, head, targets, temperature = example()

    def loss(hidden, head):
        return weighted_sum(chunked(hidden, head, targets, temperature, chunk_tokens))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = step.lower(hidden, head).compile().as_text()
    shapes = re.findall(r"\b(?:f32|bf16|s32|pred)\[([\d,]*)\]", text)
    return max(int(np.prod([int(n) for n in shape.split(",") if n])) for shape in shapes)


def test_no_array_of_all_tokens_times_vocabulary():
    """Forward and backward, as compiled; the same search finds it where nothing is chunked."""
    assert largest_buffer(chunk_tokens=B * T) >= B * T * V
    assert largest_buffer(chunk_tokens=B * 8) <= B * 8 * V < T * V
