"""Floating-point operations of the decoder's matrix products, by formula.

A multiplication with its addition counts as 2. Norms, rotations, softmaxes and other elementwise
work are left out: a few per cent of a model of real width.
"""

from typing import NamedTuple

from nrt_jax.config.architecture import Architecture
from nrt_jax.models.decoder import Remat

_ATTENTION_AGAIN: dict[Remat, float] = {"none": 0.5, "full": 1.5, "dots": 1.5, "offload": 1.5}
"""Products of the attention that the backward pass computes again, over those of the forward: the
scores are one of two."""


class Rows(NamedTuple):
    """What one pass of the decoder runs, padding included."""

    tokens: int
    """Positions of all rows."""
    keys: int | float
    """Keys that a position is scored against, hidden ones included where they are computed."""
    scored: int = 0
    """Positions whose logprobs the head gives."""


class Flops(NamedTuple):
    """Operations by the part of the model, all layers together."""

    weights: float
    """Products with the weights of the layers."""
    attention: float
    """Scores of queries and keys, and the weighted sums of values."""
    head: float

    @property
    def total(self) -> float:
        """All of them."""
        return float(sum(self))


def forward_flops(architecture: Architecture, rows: Rows, vocab_multiple: int = 1) -> Flops:
    """A forward pass; the vocabulary is padded to a multiple of `vocab_multiple`.

    Per layer and position 4 D d (N + H) + 6 D F for the weights, with N query heads and H key/value
    heads of d, and 4 N d a key for the attention; 2 D V a scored position for the head.
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


def recomputed_flops(architecture: Architecture, rows: Rows, remat: Remat) -> Flops:
    """What the backward pass computes again inside the layers.

    Attention keeps no scores, so they are computed again under every policy, as fused kernels do
    too. The policies that keep the products with weights run the whole attention for the one that
    follows it; `full` runs all of a layer but its last product, which no gradient needs.
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

    `chunked_head` is the head of `token_logprobs`, whose product is computed again going backward
    under every `remat`.
    """
    forward = forward_flops(architecture, rows, vocab_multiple)
    recomputed = recomputed_flops(architecture, rows, remat)
    if chunked_head:
        recomputed = recomputed._replace(head=forward.head)
    return Flops(*(3 * f + r for f, r in zip(forward, recomputed, strict=True)))
