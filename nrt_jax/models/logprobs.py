"""Log-probabilities of given tokens, computed in chunks so that no array is [B, T, V].

On a mesh every device scores its own tokens, with its shard of the vocabulary: the head is gathered
over `fsdp` once per pass, its gradient is summed on the device and reduced once, and of the shards
of the vocabulary only sums of a number per token travel.

Letters: B sequences, T tokens of a row or, within a chunk, of the chunk, V vocabulary, D model dim;
inside shard_map all are those of one device.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.models.sharding import partition_spec


class TokenLogprobs(NamedTuple):
    """Per position, in nats: log pi(target), and the entropy of the whole distribution."""

    logprob_BT: Float[Array, "B T"]
    entropy_BT: Float[Array, "B T"]


def token_logprobs(
    hidden_BTD: Float[Array, "B T D"],
    head_DV: Float[Array, "D V"],
    targets_BT: Int[Array, "B T"],
    *,
    vocab_size: int,
    chunk_tokens: int,
    inverse_temperature_BT: Float[Array, "B T"] | None = None,
    banned_ids: tuple[int, ...] = (),
    banned_BT: Bool[Array, "B T"] | None = None,
    mesh: Mesh | None = None,
) -> TokenLogprobs:
    """log softmax(hidden @ head / temperature) at `targets_BT`, and entropies, in float32.

    Where `banned_BT` is true, the softmax is over all tokens but `banned_ids`.

    Rows are cut into chunks of at most about `chunk_tokens` / B positions; with a `mesh`, over
    which rows and tokens must divide, the tokens of a device are. The backward pass recomputes the
    logits of each chunk, so the largest array in both directions is that of one chunk's logits.
    Gradients of both results reach hidden states and head, that of the head summed in float32; the
    temperature is a constant. Columns of the head from `vocab_size` on are padding, with
    probability 0 and no gradient.
    """
    if inverse_temperature_BT is None:
        inverse_temperature_BT = jnp.ones(targets_BT.shape, jnp.float32)
    mesh = None if mesh is None or mesh.size == 1 else mesh
    fixed = _Fixed(vocab_size, chunk_tokens, banned_ids, mesh)
    scales = _Scales(inverse_temperature_BT, banned_BT if banned_ids else None)
    return _logprobs(fixed, hidden_BTD, head_DV, targets_BT, scales)


class _Fixed(NamedTuple):
    """What a compiled program has as constants."""

    vocab_size: int
    chunk_tokens: int
    banned_ids: tuple[int, ...]
    mesh: Mesh | None

    def shards(self, axis: str) -> int:
        """Devices along a mesh axis."""
        return 1 if self.mesh is None else self.mesh.shape[axis]

    def total(self, tree: Any, axis: str = "tensor") -> Any:
        """The sum over a mesh axis."""
        return tree if self.shards(axis) == 1 else jax.lax.psum(tree, axis)

    def first_column(self, V: int) -> Array | int:
        """Which column of the whole vocabulary is the first of this device's V."""
        return 0 if self.shards("tensor") == 1 else V * jax.lax.axis_index("tensor")


class _Scales(NamedTuple):
    """How the logits of each position become those of its softmax."""

    inverse_BT: Float[Array, "B T"]
    banned_BT: Bool[Array, "B T"] | None
    """None where no token is banned."""


_ROWS, _HEAD = partition_spec(("batch", "sequence")), partition_spec(("embed", "vocab"))


def _on_devices(function: Callable[..., Any], fixed: _Fixed, in_specs: Any, out_specs: Any) -> Any:
    """The function of the arrays of one device, run by every device."""
    if fixed.mesh is None:
        return partial(function, fixed)
    return jax.shard_map(
        partial(function, fixed),
        mesh=fixed.mesh,
        in_specs=in_specs,
        out_specs=out_specs,
        # Sums over `tensor` make results equal on its devices, which is not inferred.
        check_vma=False,
    )


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _logprobs(
    fixed: _Fixed, hidden_BTD: Array, head_DV: Array, targets_BT: Array, scales: _Scales
) -> TokenLogprobs:
    return _forward(fixed, hidden_BTD, head_DV, targets_BT, scales)[0]


def _forward(
    fixed: _Fixed, hidden_BTD: Array, head_DV: Array, targets_BT: Array, scales: _Scales
) -> tuple[TokenLogprobs, Any]:
    """The result, and what the backward pass needs, where no array has a V per token."""
    score = _on_devices(_score, fixed, (_ROWS, _HEAD, _ROWS, _ROWS), _ROWS)
    logprob_BT, entropy_BT, log_sum_BT = score(hidden_BTD, head_DV, targets_BT, scales)
    kept = (hidden_BTD, head_DV, targets_BT, scales, log_sum_BT, entropy_BT)
    return TokenLogprobs(logprob_BT, entropy_BT), kept


def _score(
    fixed: _Fixed, hidden_BTD: Array, head_DV: Array, targets_BT: Array, scales: _Scales
) -> tuple[Array, Array, Array]:
    """log pi(target), the entropy, and the log of the sum of the exponentials."""
    head = _whole_head(head_DV, hidden_BTD.dtype, fixed)

    def score_chunk(_, chunk):
        hidden_BTD, targets_BT, scales = chunk
        logits_BTV = _logits(hidden_BTD, head, scales, fixed)
        largest_BT1 = logits_BTV.max(axis=-1, keepdims=True)
        if fixed.shards("tensor") > 1:
            largest_BT1 = jax.lax.pmax(largest_BT1, "tensor")
        exp_sum_BT1 = jnp.sum(jnp.exp(logits_BTV - largest_BT1), axis=-1, keepdims=True)
        log_sum_BT1 = largest_BT1 + jnp.log(fixed.total(exp_sum_BT1))
        # Computing the exponentials again is cheaper than storing them for the two sums.
        log_pi_BTV = logits_BTV - log_sum_BT1
        entropy_BT = -jnp.sum(jnp.exp(log_pi_BTV) * log_pi_BTV, axis=-1)
        target_BT = _at_targets(logits_BTV, targets_BT, fixed)
        entropy_BT, target_BT = fixed.total((entropy_BT, target_BT))
        return None, (target_BT - log_sum_BT1[..., 0], entropy_BT, log_sum_BT1[..., 0])

    cut = _into_chunks((hidden_BTD, targets_BT, scales), fixed)
    _, scored = jax.lax.scan(score_chunk, None, cut)
    return _from_chunks(scored, targets_BT.shape[1])


def _at_targets(logits_BTV: Array, targets_BT: Array, fixed: _Fixed) -> Array:
    """The logits of the targets that are among this device's columns, 0 for the others."""
    V = logits_BTV.shape[-1]
    columns_BT = targets_BT - fixed.first_column(V)
    here_BT = jnp.clip(columns_BT, 0, V - 1)
    at_BT = jnp.take_along_axis(logits_BTV, here_BT[..., None], axis=-1)[..., 0]
    return at_BT if fixed.shards("tensor") == 1 else jnp.where(columns_BT == here_BT, at_BT, 0.0)


def _backward(fixed: _Fixed, kept: Any, gradient: TokenLogprobs) -> tuple:
    """Gradients of hidden states and head."""
    in_specs = (_ROWS, _HEAD, *[_ROWS] * 5)
    differentiate = _on_devices(_gradients, fixed, in_specs, (_ROWS, _HEAD))
    hidden_gradient_BTD, head_gradient_DV = differentiate(*kept, gradient)
    return hidden_gradient_BTD, head_gradient_DV, None, None


def _gradients(
    fixed: _Fixed,
    hidden_BTD: Array,
    head_DV: Array,
    targets_BT: Array,
    scales: _Scales,
    log_sum_BT: Array,
    entropy_BT: Array,
    gradient: TokenLogprobs,
) -> tuple[Array, Array]:
    """Of hidden states, and of this device's shard of the head.

    For scaled logits l, e = 1 at the target and the entropy H = -sum pi log pi:
    d logprob / d l = e - pi, d H / d l = -pi (log pi + H).
    """
    head = _whole_head(head_DV, hidden_BTD.dtype, fixed)
    level_BT = gradient.logprob_BT + gradient.entropy_BT * entropy_BT

    def chunk_gradient(head_gradient_DV, chunk):
        hidden_BTD, targets_BT, scales, log_sum_BT, of_logprob_BT, of_entropy_BT, level_BT = chunk
        logits_BTV = _logits(hidden_BTD, head, scales, fixed)
        log_pi_BTV = logits_BTV - log_sum_BT[..., None]
        slope_BTV = level_BT[..., None] + of_entropy_BT[..., None] * log_pi_BTV
        V = head.shape[1]
        columns_11V = fixed.first_column(V) + jnp.arange(V)[None, None]
        at_target_BTV = jnp.where(
            columns_11V == targets_BT[..., None], of_logprob_BT[..., None], 0.0
        )
        d_BTV = (at_target_BTV - jnp.exp(log_pi_BTV) * slope_BTV) * scales.inverse_BT[..., None]
        possible_BTV = _possible(V, scales, fixed)
        if possible_BTV is not None:
            d_BTV = jnp.where(possible_BTV, d_BTV, 0.0)
        d_BTV = d_BTV.astype(head.dtype)
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        hidden_gradient_BTD = fixed.total(product("bcv,dv->bcd", d_BTV, head)).astype(head.dtype)
        return head_gradient_DV + product("bcd,bcv->dv", hidden_BTD, d_BTV), hidden_gradient_BTD

    of_rows = (hidden_BTD, targets_BT, scales, log_sum_BT, *gradient, level_BT)
    zeros_DV = jnp.zeros(head.shape, jnp.float32)
    head_gradient_DV, cut_gradient = jax.lax.scan(
        chunk_gradient, zeros_DV, _into_chunks(of_rows, fixed)
    )
    hidden_gradient_BTD = _from_chunks(cut_gradient, hidden_BTD.shape[1])
    return hidden_gradient_BTD, _reduced(head_gradient_DV, fixed).astype(head_DV.dtype)


_logprobs.defvjp(_forward, _backward)


def _whole_head(head_DV: Array, dtype: Any, fixed: _Fixed) -> Array:
    """The head in the dtype of the computation, gathered over `fsdp`."""
    head = head_DV.astype(dtype)
    return head if fixed.shards("fsdp") == 1 else jax.lax.all_gather(head, "fsdp", tiled=True)


def _reduced(head_gradient_DV: Array, fixed: _Fixed) -> Array:
    """The sum over all devices with other tokens, of this device's shard of the model dim.

    Over `fsdp` by an exchange and a sum on the device: of a scattered sum as large as this, XLA for
    TPUs makes a sum of the whole, which sends twice as much.
    """
    shards = fixed.shards("fsdp")
    if shards > 1:
        shares = head_gradient_DV.reshape(shards, -1, head_gradient_DV.shape[1])
        head_gradient_DV = jax.lax.all_to_all(shares, "fsdp", 0, 0).sum(0)
    return fixed.total(fixed.total(head_gradient_DV, "data"), "context")


def _logits(hidden_BTD: Array, head_DV: Array, scales: _Scales, fixed: _Fixed) -> Array:
    """Logits over temperature in float32; what is not possible gets probability 0.

    Its logit is half the least float, since -inf would make the entropy NaN. A slice of the logits
    would not divide over a mesh.
    """
    full_precision = hidden_BTD.dtype == jnp.float32
    if full_precision:
        # Scales D numbers per token instead of V.
        hidden_BTD = hidden_BTD * scales.inverse_BT[..., None]
    logits_BTV = jnp.einsum("bcd,dv->bcv", hidden_BTD, head_DV, preferred_element_type=jnp.float32)
    if not full_precision:
        logits_BTV *= scales.inverse_BT[..., None]
    possible_BTV = _possible(head_DV.shape[1], scales, fixed)
    lowest = jnp.finfo(jnp.float32).min / 2
    return logits_BTV if possible_BTV is None else jnp.where(possible_BTV, logits_BTV, lowest)


def _possible(V: int, scales: _Scales, fixed: _Fixed) -> Array | None:
    """False for the padding of the vocabulary, and for banned tokens; None if all are possible."""
    whole = V * fixed.shards("tensor")
    token_V = np.arange(whole) < fixed.vocab_size
    if scales.banned_BT is None and token_V.all():
        return None

    def of_device(mask_V: np.ndarray) -> Array:
        return jax.lax.dynamic_slice(jnp.asarray(mask_V), (fixed.first_column(V),), (V,))[
            None, None
        ]

    if scales.banned_BT is None:
        return of_device(token_V)
    banned_11V = of_device(np.isin(np.arange(whole), fixed.banned_ids))
    return of_device(token_V) & ~(scales.banned_BT[..., None] & banned_11V)


def _chunk_count(T: int, limit: int) -> int:
    """The fewest chunks of at most `limit` positions, or up to twice as many if they divide T."""
    least = -(-T // limit)
    return next((n for n in range(least, 2 * least) if T % n == 0), least)


def _into_chunks(tree: Any, fixed: _Fixed) -> Any:
    """[B, T, ...] to [chunks, B, chunk tokens, ...] with zeros after T; no token leaves its device.

    Chunk i takes tokens i, i + chunks, ...: where XLA shards the arrays, a device holds
    neighbouring tokens, so every chunk takes its share of each device's tokens.
    """
    B, T = jax.tree.leaves(tree)[0].shape[:2]
    chunks = _chunk_count(T, max(1, fixed.chunk_tokens // B))

    def cut(x_BT: Array) -> Array:
        x_BT = jnp.pad(x_BT, ((0, 0), (0, -T % chunks)) + ((0, 0),) * (x_BT.ndim - 2))
        return jnp.moveaxis(x_BT.reshape(B, -1, chunks, *x_BT.shape[2:]), 2, 0)

    return jax.tree.map(cut, tree)


def _from_chunks(tree: Any, T: int) -> Any:
    """The inverse of `_into_chunks`."""

    def join(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])[:, :T]

    return jax.tree.map(join, tree)
