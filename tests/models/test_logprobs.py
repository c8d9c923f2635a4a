"""Chunked scores against a plain log-softmax, in value, gradient and memory."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as Spec

from nrt_jax.models.logprobs import TokenLogprobs, token_logprobs
from nrt_jax.planning.compiled_text import collectives
from tests.models.tiny import close, mesh, tokens

B, T, D, V = 2, 48, 8, 101


def example() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    hidden = jax.random.normal(jax.random.key(0), (B, T, D))
    head = 0.7 * jax.random.normal(jax.random.key(1), (D, V))
    temperature = jax.random.uniform(jax.random.key(2), (B, T), minval=0.5, maxval=2.0)
    return hidden, head, tokens((B, T), V), temperature


def plain(hidden, head, targets, temperature) -> TokenLogprobs:
    log_pi = jax.nn.log_softmax(hidden @ head / temperature[..., None], axis=-1)
    logprob = jnp.take_along_axis(log_pi, targets[..., None], axis=-1)[..., 0]
    return TokenLogprobs(logprob, -(jnp.exp(log_pi) * log_pi).sum(-1))


def chunked(
    hidden, head, targets, temperature, chunk_tokens=16, vocab_size=V, on=None
) -> TokenLogprobs:
    return token_logprobs(
        hidden,
        head,
        targets,
        vocab_size=vocab_size,
        chunk_tokens=chunk_tokens,
        inverse_temperature_BT=1 / temperature,
        mesh=on,
    )


def weighted_sum(scores: TokenLogprobs, of_logprob: float = 1, of_entropy: float = 1) -> jax.Array:
    """A scalar in which every score counts differently."""
    weights = 1 + jnp.arange(scores.logprob_BT.size, dtype=jnp.float32) / T
    weights = weights.reshape(scores.logprob_BT.shape)
    logprob, entropy = weights * scores.logprob_BT, jnp.sin(weights) * scores.entropy_BT
    return jnp.sum(of_logprob * logprob + of_entropy * entropy)


def with_gradient(function, hidden, head, *rest, weights=(1, 1)):
    """The gradient of a sum of the scores with respect to states and head, and the scores."""

    def loss(hidden, head):
        scores = function(hidden, head, *rest)
        return weighted_sum(scores, *weights), scores

    return jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(hidden, head)


def exact(hidden, head, targets, temperature, weights=(1, 1)):
    """The same of a plain log-softmax in float64."""
    with jax.enable_x64(True):
        doubles = (jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, head))
        temperature = jnp.asarray(np.asarray(temperature), jnp.float64)
        result = with_gradient(plain, *doubles, targets, temperature, weights=weights)
        return jax.tree.map(np.asarray, result)


@pytest.mark.parametrize("chunk_tokens", [1, 10, 16, 62, B * T, 10**6])
def test_equals_plain_log_softmax(chunk_tokens):
    """Also where the chunk does not divide T, is smaller than B, or holds everything."""
    function = partial(chunked, chunk_tokens=chunk_tokens)
    close(with_gradient(function, *example()), exact(*example()))


@pytest.mark.parametrize("weights", [(1, 0), (0, 1)])
def test_gradient_of_either_score_alone(weights):
    inputs = example()
    close(with_gradient(chunked, *inputs, weights=weights), exact(*inputs, weights=weights))


@pytest.mark.parametrize("shape", [(1, 1), (1, 47), (2, 1), (3, 13)])
def test_any_number_of_rows_and_tokens(shape):
    """Where the chunks do not divide T, the zeros that fill the last have no part in anything."""
    _, head, _, _ = example()
    hidden = jax.random.normal(jax.random.key(3), (*shape, D))
    inputs = hidden, head, tokens(shape, V), jnp.full(shape, 0.7)
    close(with_gradient(partial(chunked, chunk_tokens=12), *inputs), exact(*inputs))


def test_columns_beyond_the_vocabulary_do_not_exist():
    """Value, entropy and gradient are those of the head without them; theirs is zero.

    Also where the gradient of the entropy is so large that it overflows times their score.
    """
    hidden, head, targets, temperature = example()
    padded = jnp.pad(head, ((0, 0), (0, 27)), constant_values=3.0)
    rest = targets, temperature / 8
    (of_hidden, of_head), scores = with_gradient(chunked, hidden, padded, *rest, weights=(1, 9))
    expected = exact(hidden, head, *rest, weights=(1, 9))
    close(((of_hidden, of_head[:, :V]), scores), expected)
    np.testing.assert_array_equal(of_head[:, V:], 0)


@pytest.mark.parametrize("padding", [0, 27])
def test_banned_tokens_are_in_no_softmax_where_they_are_banned(padding):
    """The others have the scores of a vocabulary without them, and banned ones no gradient there.

    At positions where nothing is banned the targets may be any token.
    """
    hidden, head, targets, temperature = example()
    banned_ids = (0, 7, 50, V - 1)
    banned = jnp.arange(T)[None] % 3 + jnp.zeros((B, 1), jnp.int32) > 0
    allowed = np.setdiff1d(np.arange(V), banned_ids)
    is_banned = np.isin(np.arange(V), banned_ids)
    targets = jnp.where(banned & is_banned[targets], allowed[3], targets)
    padded = jnp.pad(head, ((0, 0), (0, padding)), constant_values=5.0)

    def ours(hidden, head, targets, temperature):
        return token_logprobs(
            hidden,
            head,
            targets,
            vocab_size=V,
            chunk_tokens=16,
            inverse_temperature_BT=1 / temperature,
            banned_ids=banned_ids,
            banned_BT=banned,
        )

    def expected(hidden, head, targets, temperature):
        whole = plain(hidden, head[:, :V], targets, temperature)
        places = jnp.searchsorted(jnp.asarray(allowed), targets)
        others = plain(hidden, head[:, allowed], places, temperature)
        return jax.tree.map(lambda a, b: jnp.where(banned, a, b), others, whole)

    arguments = hidden, padded, targets, temperature
    close(with_gradient(ours, *arguments), with_gradient(expected, *arguments), 1e-4)


def test_without_temperature_it_is_one():
    hidden, head, targets, _ = example()
    close(
        token_logprobs(hidden, head, targets, vocab_size=head.shape[1], chunk_tokens=16),
        plain(hidden, head, targets, jnp.ones((B, T))),
    )


def test_scores_of_bfloat16_states_are_float32():
    hidden, head, targets, _ = example()
    scores = token_logprobs(
        hidden.astype(jnp.bfloat16), head, targets, vocab_size=head.shape[1], chunk_tokens=16
    )
    assert {x.dtype for x in scores} == {jnp.dtype(jnp.float32)}
    # Float32 sums of products of bfloat16 numbers: only the rounding of the inputs is lost.
    rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head))
    close(scores, plain(*rounded, targets, jnp.ones((B, T))))


def test_gradient_of_bfloat16_states_is_close_to_the_exact_one():
    """The head's, which is kept in float32, is a float32 sum over the chunks."""
    hidden, head, targets, temperature = example()
    low = hidden.astype(jnp.bfloat16)
    (of_hidden, of_head), _ = with_gradient(chunked, low, head, targets, temperature)
    assert (of_hidden.dtype, of_head.dtype) == (jnp.bfloat16, jnp.float32)
    rounded = (x.astype(jnp.bfloat16).astype(jnp.float32) for x in (hidden, head))
    expected, _ = exact(*rounded, targets, temperature)
    close((of_hidden, of_head), expected, tolerance=2**-7)


SHAPES = re.compile(r"\b(?:f32|bf16|s32|pred)\[([\d,]*)\]")
GATHERS = re.compile(r"= (.*?) (?:all-gather|all-to-all|collective-permute)(?:-start)?\(")


def shapes_in(text: str) -> list[list[int]]:
    """Of every array that a piece of a compiled program names."""
    return [[int(n) for n in shape.split(",") if n] for shape in SHAPES.findall(text)]


def largest_buffer(chunk_tokens: int) -> int:
    """Elements of the largest array in the compiled value-and-gradient."""
    hidden, head, targets, temperature = example()

    def loss(hidden, head):
        return weighted_sum(chunked(hidden, head, targets, temperature, chunk_tokens))

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    text = step.lower(hidden, head).compile().as_text()
    return max(int(np.prod(shape)) for shape in shapes_in(text))


def test_no_array_of_all_tokens_times_vocabulary():
    """Forward and backward, as compiled; the same search finds it where nothing is chunked."""
    assert largest_buffer(chunk_tokens=B * T) >= B * T * V
    assert largest_buffer(chunk_tokens=B * 8) <= B * 8 * V < T * V


MESHES = [
    {},
    {"tensor": 2},
    {"data": 2},
    {"fsdp": 2, "tensor": 2},
    {"context": 2, "tensor": 2},
    {"data": 2, "fsdp": 2, "tensor": 2},
]


@pytest.mark.parametrize(
    ("sizes", "by_hand"), [*((sizes, True) for sizes in MESHES), (MESHES[-1], False)], ids=str
)
def test_on_a_mesh_scores_are_the_same_and_no_logits_move(sizes, by_hand):
    """Rows over data and fsdp, tokens over context, the head over fsdp and tensor.

    By hand every device scores its own tokens, and the head travels once per pass; else XLA splits
    the arrays.
    """
    rows, width, on = 4, 104, mesh(**sizes)
    hidden = jax.random.normal(jax.random.key(0), (rows, T, D))
    head = 0.7 * jax.random.normal(jax.random.key(1), (D, width))
    inputs = hidden, head, tokens((rows, T), width - 3), jnp.full((rows, T), 0.7)
    of_tokens = Spec(("data", "fsdp"), "context")
    specs = of_tokens, Spec("fsdp", "tensor"), of_tokens, of_tokens
    spread = [jax.device_put(x, NamedSharding(on, s)) for x, s in zip(inputs, specs, strict=True)]
    parts = sizes.get("tensor", 1)
    options = {"chunk_tokens": rows * 12, "vocab_size": width - 3}
    if by_hand:
        options |= {"chunk_tokens": rows * 12 * parts // on.size, "on": on}

    def loss(hidden, head, *rest):
        scores = chunked(hidden, head, *rest, **options)
        return weighted_sum(scores), scores

    step = jax.jit(jax.grad(loss, argnums=(0, 1), has_aux=True)).lower(*spread).compile()
    (of_hidden, of_head), scores = step(*spread)
    real = (hidden, head[:, : width - 3], *inputs[2:])
    close(((of_hidden, of_head[:, : width - 3]), scores), exact(*real))
    text = step.as_text()
    of_vocabulary = [s for s in shapes_in(text) if s and s[-1] in (width, width // parts)]
    chunk = rows * 12 * width // on.size
    assert max(int(np.prod(s)) for s in of_vocabulary) <= max(chunk, D * width)
    moved = [shape for found in GATHERS.findall(text) for shape in shapes_in(found)]
    # The head is gathered over fsdp, which shows that the search finds what there is; by hand, the
    # shares of its gradient are exchanged.
    share = [1, D // sizes.get("fsdp", 1), width // parts]
    assert all(shape in ([D, width // parts], share) for shape in moved)
    assert bool(moved) == ("fsdp" in sizes)
    if by_hand:
        of_head = [c for c in collectives(text, on.size) if width // parts in c.shapes[0][1]]
        assert not [c for c in of_head if c.loops]
