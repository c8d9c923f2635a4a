"""The formula of the operations against XLA's own count.

XLA counts the body of a scan once, so the models have one layer and the logprobs one chunk; the
count is taken before XLA's optimisations, which for a single chunk merge the head's second product
with its first.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Remat, abstract_decoder
from nrt_jax.models.flops import Flops, Rows, forward_flops, training_flops
from nrt_jax.models.logprobs import token_logprobs
from tests.models.tiny import architecture

B, T, S = 2, 512, 160
WIDE = architecture(
    vocab_size=1000, hidden_size=256, intermediate_size=640, num_hidden_layers=1, head_dim=64
)
"""Wide enough that elementwise work is little."""


def counted(remat: Remat, vocab_multiple: int, gradient: bool, prefix_tokens: int = 0) -> float:
    """XLA's count for B rows of T tokens, all scored, each after a prefix of its own."""
    decoder = abstract_decoder(WIDE, remat=remat, vocab_multiple=vocab_multiple)
    definition, params = nnx.split(decoder)
    ids_BT = jnp.ones((B, T), jnp.int32)
    ids_BS = jnp.ones((B, prefix_tokens), jnp.int32)
    kv = jnp.ones((1, B, prefix_tokens, WIDE.num_key_value_heads, WIDE.head_dim))

    def logprob(params: nnx.State, kv: jax.Array) -> jax.Array:
        model = nnx.merge(definition, params)
        prefix = KVPrefix(kv, kv, ids_BS, ids_BS) if prefix_tokens else None
        hidden_BTD, _ = model.hidden(ids_BT, ids_BT, ids_BT, prefix)
        scores = token_logprobs(
            hidden_BTD, model.head_DV(), ids_BT, vocab_size=WIDE.vocab_size, chunk_tokens=B * T
        )
        return scores.logprob_BT.sum()

    function = jax.value_and_grad(logprob, argnums=(0, 1)) if gradient else logprob
    costs = jax.jit(function).lower(params, kv).cost_analysis()
    assert costs is not None
    return costs["flops"]


@pytest.mark.parametrize("prefix_tokens", [0, S])
@pytest.mark.parametrize("vocab_multiple", [1, 256])
def test_forward_pass(vocab_multiple, prefix_tokens):
    rows = Rows(B * T, T + prefix_tokens, B * T)
    expected = counted("none", vocab_multiple, False, prefix_tokens)
    assert forward_flops(WIDE, rows, vocab_multiple).total == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("prefix_tokens", [0, S])
@pytest.mark.parametrize("remat", get_args(Remat))
def test_value_and_gradient(remat, prefix_tokens):
    rows = Rows(B * T, T + prefix_tokens, B * T)
    expected = counted(remat, 256, True, prefix_tokens)
    assert training_flops(WIDE, rows, remat, 256).total == pytest.approx(expected, rel=0.03)


@pytest.mark.parametrize("remat", [remat for remat in get_args(Remat) if remat != "none"])
def test_what_is_recomputed(remat):
    """The difference between two programs has next to no elementwise work in it."""
    rows = Rows(B * T, T, B * T)
    expected = counted(remat, 1, True) - counted("none", 1, True)
    formula = training_flops(WIDE, rows, remat).total - training_flops(WIDE, rows, "none").total
    assert formula == pytest.approx(expected, rel=0.05)


def test_parts_grow_with_what_they_are_of():
    rows = Rows(tokens=10, keys=20, scored=5)
    once = forward_flops(WIDE, rows)
    twice = forward_flops(WIDE, rows._replace(keys=40, scored=10))
    assert twice == Flops(once.weights, 2 * once.attention, 2 * once.head)
    deeper = WIDE.model_copy(update={"num_hidden_layers": 3})
    assert forward_flops(deeper, rows) == Flops(3 * once.weights, 3 * once.attention, once.head)
    plain_head = training_flops(WIDE, rows, "none", chunked_head=False)
    assert plain_head.weights == 3 * once.weights
    assert plain_head.head == 3 * once.head
