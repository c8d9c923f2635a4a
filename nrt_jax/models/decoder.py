"""The decoder of Llama and Mistral: one definition for training, scoring, prefill and decoding.

Letters: P prompts, K samples per prompt, B sequences, T tokens, V vocabulary, D model dim,
F feed-forward, H key/value heads, G query heads per key/value head, d head dim, L layers.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.config.architecture import Architecture
from nrt_jax.models import rope
from nrt_jax.models.attention import KVPrefix, segment_positions
from nrt_jax.models.attention_backend import Backend
from nrt_jax.models.joined_rows import STREAM, JoinedRows
from nrt_jax.models.logprobs import TokenLogprobs, token_logprobs
from nrt_jax.models.project import PRODUCT, embed, project
from nrt_jax.models.rows import TokenRows
from nrt_jax.models.sharding import constrain

Remat = Literal["none", "full", "dots", "offload"]
Attend = Callable[..., tuple[Float[Array, "B T H G d"], Any]]
"""From q [B, T, H, G, d], k and v [B, T, H, d] to the output and whatever the caller keeps."""

_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.save_only_these_names(PRODUCT),
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[PRODUCT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def _normal(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    stddev: float,
    padding: tuple[int, ...] | None = None,
) -> nnx.Param:
    """A random weight; `padding` appends zeros to each dim and changes none of the draws."""
    weight = stddev * jax.random.normal(rngs.params(), shape, jnp.float32)
    if padding is not None:
        weight = jnp.pad(weight, [(0, zeros) for zeros in padding])
    return nnx.Param(weight, logical_axes=axes)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale, computed in float32."""

    def __init__(self, features: int, epsilon: float):
        self.scale = nnx.Param(jnp.ones(features, jnp.float32), logical_axes=("norm",))
        self.epsilon = epsilon

    def __call__(self, x: Float[Array, "*B D"]) -> Float[Array, "*B D"]:
        x32 = x.astype(jnp.float32)
        inverse_rms = jax.lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + self.epsilon)
        scale = self.scale[...].reshape((1,) * (x.ndim - 1) + (-1,))
        return (x32 * inverse_rms * scale).astype(x.dtype)


class Attention(nnx.Module):
    """Grouped-query attention with rotary positions."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        a = architecture
        D, H, d = a.hidden_size, a.num_key_value_heads, a.head_dim
        query_heads, std = a.num_attention_heads, a.initializer_range
        self.query = _normal(rngs, (D, query_heads, d), ("embed", "heads", "head_dim"), std)
        self.key = _normal(rngs, (D, H, d), ("embed", "kv_heads", "head_dim"), std)
        self.value = _normal(rngs, (D, H, d), ("embed", "kv_heads", "head_dim"), std)
        self.output = _normal(rngs, (query_heads, d, D), ("heads", "head_dim", "embed"), std)
        self.frequencies = tuple(rope.inverse_frequencies(a).tolist())

    def __call__(
        self,
        x_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        attend: Attend,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        """Project what `attend` returns for the rotated queries, keys and values; and its extra."""
        B, T, _ = x_BTD.shape
        frequencies = jnp.asarray(self.frequencies, jnp.float32)
        q = project(x_BTD, self.query, mesh=mesh)
        k_BTHd = project(x_BTD, self.key, mesh=mesh)
        v_BTHd = project(x_BTD, self.value, mesh=mesh)
        q = rope.rotate(q, positions_BT, frequencies)
        k_BTHd = rope.rotate(k_BTHd, positions_BT, frequencies)
        q_BTHGd = q.reshape(B, T, k_BTHd.shape[2], -1, q.shape[-1])
        out_BTHGd, extra = attend(q_BTHGd, k_BTHd, v_BTHd)
        return project(out_BTHGd.reshape(q.shape), self.output, 2, mesh), extra


class SwiGLU(nnx.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        D, F = architecture.hidden_size, architecture.intermediate_size
        std = architecture.initializer_range
        self.gate = _normal(rngs, (D, F), ("embed", "mlp"), std)
        self.up = _normal(rngs, (D, F), ("embed", "mlp"), std)
        self.down = _normal(rngs, (F, D), ("mlp", "embed"), std)

    def __call__(
        self, x_BTD: Float[Array, "B T D"], mesh: Mesh | None = None
    ) -> Float[Array, "B T D"]:
        gate_BTF = project(x_BTD, self.gate, mesh=mesh)
        up_BTF = project(x_BTD, self.up, mesh=mesh)
        inner_BTF = constrain(_gated(gate_BTF, up_BTF), mesh, ("batch", "sequence", "mlp"))
        return project(inner_BTF, self.down, mesh=mesh)


@jax.checkpoint
def _gated(gate_BTF: Float[Array, "B T F"], up_BTF: Float[Array, "B T F"]) -> Array:
    """silu(gate) * up; the checkpoint keeps only its two arguments for the gradient."""
    return jax.nn.silu(gate_BTF) * up_BTF


class Layer(nnx.Module):
    """h + attention(norm(h)), then h + mlp(norm(h))."""

    def __init__(self, architecture: Architecture, rngs: nnx.Rngs):
        eps = architecture.rms_norm_eps
        self.attention_norm = RMSNorm(architecture.hidden_size, eps)
        self.attention = Attention(architecture, rngs)
        self.mlp_norm = RMSNorm(architecture.hidden_size, eps)
        self.mlp = SwiGLU(architecture, rngs)

    def __call__(
        self,
        h_BTD: Float[Array, "B T D"],
        positions_BT: Int[Array, "B T"],
        attend: Attend,
        mesh: Mesh | None = None,
    ) -> tuple[Float[Array, "B T D"], Any]:
        attended_BTD, extra = self.attention(self.attention_norm(h_BTD), positions_BT, attend, mesh)
        h_BTD = h_BTD + attended_BTD
        return h_BTD + self.mlp(self.mlp_norm(h_BTD), mesh), extra


class Decoder(nnx.Module):
    """Embedding, L stacked layers run by one scan, final norm, head.

    Weights are drawn in float32; `dtype` is the dtype of the computation. `remat` sets what the
    backward pass recomputes: the cheap parts (none), everything inside a layer (full), or all but
    the products with weights, which stay on the device (dots) or in the host's memory (offload).
    The vocabulary dim of embedding and head is padded with zeros to a multiple of `vocab_multiple`,
    so that it divides over a mesh axis; the padding has no token ids and no logits.
    `attention` is the backend for whole rows. `mesh` is what rows and their tokens are sharded
    over; without it activations have no sharding constraints.
    """

    def __init__(
        self,
        architecture: Architecture,
        rngs: nnx.Rngs,
        *,
        dtype: DTypeLike = jnp.float32,
        remat: Remat = "none",
        vocab_multiple: int = 1,
        attention: Backend = "xla",
        mesh: Mesh | None = None,
    ):
        a = architecture
        V, D, std = a.vocab_size, a.hidden_size, a.initializer_range
        padding = -V % vocab_multiple
        self.architecture, self.dtype, self.remat = a, dtype, remat
        self.attention, self.mesh = attention, mesh
        self.embedding = _normal(rngs, (V, D), ("vocab", "embed"), std, (padding, 0))

        @nnx.split_rngs(splits=a.num_hidden_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(rngs: nnx.Rngs) -> Layer:
            return Layer(a, rngs)

        self.layers = stack(rngs)
        self.final_norm = RMSNorm(D, a.rms_norm_eps)
        if not a.tie_word_embeddings:
            self.head = _normal(rngs, (D, V), ("embed", "vocab"), std, (0, padding))

    @property
    def context_shards(self) -> int:
        """Devices that the tokens of a row are sharded over."""
        return 1 if self.mesh is None else self.mesh.shape["context"]

    def hidden(
        self,
        tokens_BT: Int[Array, "B T"],
        positions_BT: Int[Array, "B T"],
        segment_ids_BT: Int[Array, "B T"],
        prefix: KVPrefix | None = None,
        prefix_segment_ids_BT: Int[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], KVPrefix]:
        """Final-norm hidden states, and every layer's keys and values of these tokens.

        A token sees the earlier tokens of its own segment; segment 0 is padding.
        `prefix` (with leading L) holds the keys and values of earlier tokens. With P rows of it and
        B = P * K sequences, sequences p * K to p * K + K - 1 continue row p: each token continues
        the prompt whose segment id it has in `prefix_segment_ids_BT` (1 by default). Positions are
        absolute. A later call may continue from the returned prefix. Raises InputError when the
        rows (of the prefix, if there is one) or the tokens do not divide over the mesh.
        """
        if prefix_segment_ids_BT is None and prefix is not None:
            prefix_segment_ids_BT = jnp.ones_like(positions_BT)
        rows = TokenRows(tokens_BT, positions_BT, segment_ids_BT, prefix_segment_ids_BT)
        (hidden_BTD,), (k, v) = self._run([rows], None, prefix)
        return hidden_BTD, KVPrefix(k, v, positions_BT, segment_ids_BT)

    def hidden_of_packs(
        self, prompts: TokenRows, *continuations: TokenRows, constant: TokenRows | None = None
    ) -> list[Float[Array, "B T D"]]:
        """Final-norm hidden states of one row of prompts per pack, and of rows that continue them.

        As `hidden` of the prompts, and then of each of the others with the prompts as its prefix;
        those of `constant`, which have no gradient, are last. All run in one pass over the layers,
        so that every weight is moved once.
        """
        return self._run([prompts, *continuations], constant, None)[0]

    def _run(
        self, rows: Sequence[TokenRows], constant: TokenRows | None, prefix: KVPrefix | None
    ) -> tuple[list[Float[Array, "B T D"]], Any]:
        """Hidden states of all rows; and of the only rows, every layer's keys and values.

        The first rows continue `prefix`, the others continue the first.
        """
        first = rows[0]
        packs = len(first.tokens_BT if prefix is None else prefix.positions_PS)
        of_prefix = None if prefix is None else (prefix.positions_PS, prefix.segment_ids_PS)
        of_first = (first.positions_BT, first.segment_ids_BT)
        join = partial(
            JoinedRows.of,
            packs=packs,
            backend=self.attention,
            window=self.architecture.sliding_window,
            mesh=self.mesh,
        )
        joined = join(rows, [of_prefix, *[of_first] * (len(rows) - 1)])
        apart = None if constant is None else join([constant], [of_first])
        definition, weights_L = nnx.split(self.layers)

        def run_layer(hidden, layer_inputs):
            weights, kv = layer_inputs
            h_BND, kv = joined.run(nnx.merge(definition, weights), hidden[0], kv)
            if apart is None:
                return (h_BND,), kv if len(rows) == 1 else None
            # Joined with the others, constant rows would run through the backward pass with
            # gradients of zero. They run in the same body, since XLA gathers a weight once for the
            # products of a body.
            weights, kv = jax.lax.stop_gradient((weights, kv))
            constant_BTD, _ = apart.run(nnx.merge(definition, weights), hidden[1], kv)
            return (h_BND, constant_BTD), None

        if self.remat != "none":
            run_layer = jax.checkpoint(run_layer, policy=_POLICIES[self.remat])
        hidden = (self._embedded(joined.tokens_BN),)
        if apart is not None:
            hidden += (jax.lax.stop_gradient(self._embedded(apart.tokens_BN)),)
        kv_L = None if prefix is None else (prefix.k, prefix.v)
        (h_BND, *of_constant), kv_L = jax.lax.scan(run_layer, hidden, (weights_L, kv_L))
        of_constant = [jax.lax.stop_gradient(self.final_norm(h_BTD)) for h_BTD in of_constant]
        return [*joined.layout.split(self.final_norm(h_BND)), *of_constant], kv_L

    def _embedded(self, tokens_BT: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        h_BTD = embed(self.embedding[...], tokens_BT, self.dtype)
        # Sharded like the table first: otherwise every device gets all embeddings of the batch.
        h_BTD = constrain(h_BTD, self.mesh, ("looked_up", "sequence", "embed"))
        return constrain(h_BTD, self.mesh, STREAM)

    def next_hidden(
        self,
        tokens_B: Int[Array, " B"],
        positions_B: Int[Array, " B"],
        layers: Sequence[nnx.State],
        caches: Sequence[Any],
        attend: Callable[..., tuple[Float[Array, "B 1 H G d"], Any]],
    ) -> tuple[Float[Array, "B D"], tuple[Any, ...]]:
        """Final-norm hidden states of one token per sequence, and every layer's new cache.

        `attend(cache, q, k, v)` appends the token's keys and values to a layer's cache of any form,
        and returns the attention's output and the new cache. The layers are unrolled, so that each
        cache is a separate array, which is updated in place. `layers` are the weights of
        `split_layers`.
        """
        definition, _ = nnx.split(self.layers)
        positions_B1 = positions_B[:, None]
        h_B1D = self.embedding[...][tokens_B[:, None]].astype(self.dtype)
        new_caches = []
        for weights, cache in zip(layers, caches, strict=True):
            layer = nnx.merge(definition, weights)
            h_B1D, cache = layer(h_B1D, positions_B1, partial(attend, cache))
            new_caches.append(cache)
        return self.final_norm(h_B1D)[:, 0], tuple(new_caches)

    def split_layers(self) -> list[nnx.State]:
        """The stacked weights as a list of layers."""
        _, weights_L = nnx.split(self.layers)
        count = self.architecture.num_hidden_layers
        return [jax.tree.map(lambda weight, i=i: weight[i], weights_L) for i in range(count)]

    def head_DV(self) -> Float[Array, "D V"]:
        """The output matrix with V padded; the transposed embedding when the two are tied."""
        return self.embedding[...].T if self.architecture.tie_word_embeddings else self.head[...]

    def token_logprobs(
        self,
        hidden_BTD: Float[Array, "B T D"],
        targets_BT: Int[Array, "B T"],
        chunk_tokens: int,
        inverse_temperature_BT: Float[Array, "B T"] | None = None,
        banned_ids: tuple[int, ...] = (),
        banned_BT: Bool[Array, "B T"] | None = None,
    ) -> TokenLogprobs:
        """Logprobs of `targets_BT` and entropies; each device holds the logits of `chunk_tokens`
        positions at a time. Where `banned_BT` is true, `banned_ids` are not in the softmax."""
        return token_logprobs(
            hidden_BTD,
            self.head_DV(),
            targets_BT,
            vocab_size=self.architecture.vocab_size,
            chunk_tokens=chunk_tokens,
            inverse_temperature_BT=inverse_temperature_BT,
            banned_ids=banned_ids,
            banned_BT=banned_BT,
            mesh=self.mesh,
        )

    def logits(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 logits of the next token, without the padding of the vocabulary."""
        head_DV = self.head_DV().astype(hidden.dtype)
        logits = jnp.einsum("...d,dv->...v", hidden, head_DV, preferred_element_type=jnp.float32)
        return logits[..., : self.architecture.vocab_size]

    def __call__(
        self,
        tokens_BT: Int[Array, "B T"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Float[Array, "B T V"]:
        """Float32 logits of whole sequences; training never builds this array.

        Tokens see earlier tokens with their own segment id; 0 is padding, on either side. Positions
        count from 0 in each segment by default.
        """
        if segment_ids is None:
            segment_ids = jnp.ones(tokens_BT.shape, jnp.int32)
        if positions is None:
            positions = segment_positions(segment_ids)
        return _whole_logits(*nnx.split(self), tokens_BT, positions, segment_ids)


@partial(jax.jit, static_argnums=0)
def _whole_logits(
    definition: nnx.GraphDef, weights: nnx.State, tokens_BT, positions_BT, segment_ids_BT
) -> Float[Array, "B T V"]:
    # Compiled once per shape: without jit the scan over the layers is compiled at every call.
    decoder = nnx.merge(definition, weights)
    return decoder.logits(decoder.hidden(tokens_BT, positions_BT, segment_ids_BT)[0])


def abstract_decoder(
    architecture: Architecture,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    vocab_multiple: int = 1,
    attention: Backend = "xla",
    mesh: Mesh | None = None,
) -> Decoder:
    """The decoder with shapes instead of weights."""

    def make() -> Decoder:
        return Decoder(
            architecture,
            nnx.Rngs(0),
            dtype=dtype,
            remat=remat,
            vocab_multiple=vocab_multiple,
            attention=attention,
            mesh=mesh,
        )

    return nnx.eval_shape(make)
