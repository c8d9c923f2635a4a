"""Floating-point operations of the decoder's matrix products, by formula.

A multiplication with its addition counts as 2. Norms, rotations, softmaxes and other elementwise
work are not counted: they are a few per cent for a model of real width.
"""

from typing import NamedTuple

from nrt_jax.config.architecture import Architecture
from nrt_jax.models.decoder import Remat

_ATTENTION_AGAIN: dict[Remat, float] = {"none": 0.5, "full": 1.5, "dots": 1.5, "offload": 1.5}
"""Attention products that the backward pass recomputes, relative to the forward pass, where the
scores are one of two products."""


class Rows(NamedTuple):
    """What one pass of the decoder runs, padding included."""

    tokens: int
    """Positions of all rows."""
    keys: int | float
    """Keys per position, masked keys included where they are computed."""
    scored: int = 0
    """Positions whose logprobs the head computes."""


class Flops(NamedTuple):
    """Operations by part of the model, summed over the layers."""

    weights: float
    """Products with the weights of the layers."""
    attention: float
    """Scores of queries and keys, and weighted sums of values."""
    head: float

    @property
    def total(self) -> float:
        """Sum of all parts."""
        return float(sum(self))


def forward_flops(architecture: Architecture, rows: Rows, vocab_multiple: int = 1) -> Flops:
    """A forward pass; the vocabulary is padded to a multiple of `vocab_multiple`.

    Per layer and position 4 D d (H G + H) + 6 D F for the weights, with H key/value heads of
    dim d and G query heads for each, and 4 H G d per key for the attention; 2 D V per scored
    position for the head.
    """
    a = architecture
    D, L = a.hidden_size, a.num_hidden_layers
    padded_vocab = a.vocab_size + -a.vocab_size % vocab_multiple
    projections = 4 * D * a.head_dim * (a.num_attention_heads + a.num_key_value_heads)
    weights = projections + 6 * D * a.intermediate_size
    attention = 4 * a.num_attention_heads * a.head_dim * rows.keys
    return Flops(
        float(L * rows.tokens * weights),
        float(L * rows.tokens * attention),
        float(2 * D * padded_vocab * rows.scored),
    )


def equal_keys(architecture: Architecture) -> float:
    """Keys per token at which attention costs as much as the products with weights."""
    per_token = forward_flops(architecture, Rows(tokens=1, keys=1))
    return per_token.weights / per_token.attention


def recomputed_flops(architecture: Architecture, rows: Rows, remat: Remat) -> Flops:
    """What the backward pass recomputes inside the layers.

    Attention keeps no scores, so every policy recomputes them, as fused kernels do too. The
    policies that keep the products with weights recompute the whole attention, whose output the
    next product needs; `full` recomputes a whole layer but its last product, which no gradient
    needs.
    """
    forward = forward_flops(architecture, rows._replace(scored=0))
    a = architecture
    down = 2 * a.hidden_size * a.intermediate_size * a.num_hidden_layers * rows.tokens
    weights = forward.weights - down if remat == "full" else 0.0
    return Flops(weights, _ATTENTION_AGAIN[remat] * forward.attention, 0.0)


def training_flops(
    architecture: Architecture,
    rows: Rows,
    remat: Remat,
    vocab_multiple: int = 1,
    *,
    chunked_head: bool = True,
) -> Flops:
    """A forward and a backward pass: every product, its two gradients, and what is recomputed.

    `chunked_head` is the head of `token_logprobs`, whose backward pass recomputes the product under
    every `remat`.
    """
    forward = forward_flops(architecture, rows, vocab_multiple)
    recomputed = recomputed_flops(architecture, rows, remat)
    if chunked_head:
        recomputed = recomputed._replace(head=forward.head)
    return Flops(*(3 * f + r for f, r in zip(forward, recomputed, strict=True)))
