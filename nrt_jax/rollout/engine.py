"""The JetStream engine over our decoder: prefill, insert, generate.

Letters: L layers, U shards of the slots, B slots, N prompts, K copies of one prompt, S prompt
tokens, H key/value heads, d head dim, V vocabulary, C decode steps of a dispatch or columns of a
step's result, R rows that are scored, A tokens of a scored row.
"""

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.errors import InputError
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.log_probs import token_scores
from nrt_jax.models.sharding import LOGICAL_TO_MESH, replicated
from nrt_jax.models.variants import Architecture
from nrt_jax.rollout import cache
from nrt_jax.rollout import jetstream_compat as jetstream
from nrt_jax.rollout.cache import Sizes
from nrt_jax.rollout.decode_state import (
    DecodeState,
    Prefix,
    Sampled,
    SlotRequests,
    bucket,
    empty_state,
    sizes_of,
    slot_sampling,
    state_shardings,
)
from nrt_jax.rollout.sampler import Sampling, most_probable, sample

SCORE_CHUNK_TOKENS = 1024


@struct.dataclass
class SampledTokens(jetstream.ResultTokens):
    """ResultTokens with two more columns: the log-prob's bits, and whether the slot is done."""

    def convert_to_numpy(self) -> "SampledTokens":
        """The same columns on the host."""
        return self.replace(data=np.asarray(self.data))

    @property
    def token_B(self) -> Int[np.ndarray, "B"]:
        return np.asarray(self.data)[:, 0]

    @property
    def valid_B(self) -> Bool[np.ndarray, "B"]:
        return np.asarray(self.data)[:, 1].astype(bool)

    @property
    def length_B(self) -> Int[np.ndarray, "B"]:
        return np.asarray(self.data)[:, 2]

    @property
    def log_prob_B(self) -> Float[np.ndarray, "B"]:
        return np.asarray(self.data)[:, 3].copy().view(np.float32)

    @property
    def done_B(self) -> Bool[np.ndarray, "B"]:
        return np.asarray(self.data)[:, 4].astype(bool)


class DecoderEngine(jetstream.Engine):
    """Continuous batching over `slots` sequences that share one compiled decode step.

    Any token of `stop_ids` ends a sequence, as do those of its request and its limit. The weights
    are an argument of every call, so the training loop's own arrays are used without a copy. A
    prompt's keys and values are held once for up to `copies` slots that continue it. `slots` is
    rounded up to a multiple of the mesh's batch axes. `cache_dtype` is that of keys and values,
    int8 for one byte and a factor; None is the decoder's own.
    """

    def __init__(
        self,
        definition: nnx.GraphDef,
        architecture: Architecture,
        mesh: Mesh,
        *,
        slots: int,
        max_prompt_tokens: int,
        max_new_tokens: int,
        stop_ids: frozenset[int],
        dtype: Any = jnp.float32,
        cache_dtype: Any = None,
        copies: int = 1,
        prefill_chunk: int | None = None,
        top_log_probs: int = 0,
        tokenizer_path: str = "",
    ):
        self._definition, self._architecture, self._mesh = definition, architecture, mesh
        self._shards = int(np.prod([mesh.shape[axis] for axis in LOGICAL_TO_MESH["batch"]]))
        self._slots = -(-slots // self._shards) * self._shards
        self._copies = min(copies, self._slots // self._shards)
        self._dtype, self._cache_dtype = dtype, dtype if cache_dtype is None else cache_dtype
        self._max_prompt, self._max_new_tokens = bucket(max_prompt_tokens), max_new_tokens
        self._prefill_chunk = None if prefill_chunk is None else bucket(prefill_chunk)
        self._stop_ids, self._tokenizer_path = stop_ids, tokenizer_path
        self._is_stop_V = np.isin(np.arange(architecture.vocab_size), sorted(stop_ids))
        self._top_log_probs = top_log_probs
        self._programs: dict[tuple, Callable] = {}
        self.compiled: Counter[str] = Counter()
        """How many programs of each kind were compiled, for other shapes."""

    def _program(self, kind: str, *key: Any, make: Callable[[], Callable]) -> Callable:
        """The compiled function for one combination of shapes, so that they can be counted."""
        if (kind, *key) not in self._programs:
            self._programs[kind, *key] = make()
            self.compiled[kind] += 1
        return self._programs[kind, *key]

    # Prefill

    def prefill(
        self,
        *,
        params: Any,
        existing_prefix: Prefix | None = None,
        padded_tokens: Int[Array | np.ndarray, "S"],
        true_length: int,
    ) -> Prefix:
        """Run one prompt, padded on the right to a bucket; or, after a prefix, its next part.

        A prefix has room for the tokens it was made with; `empty_prefix` makes one with more.
        """
        if true_length > len(padded_tokens):
            raise ValueError(
                f"true_length {true_length} exceeds the {len(padded_tokens)} padded tokens"
            )
        tokens_S, everywhere = jnp.asarray(padded_tokens), replicated(self._mesh)
        if existing_prefix is None:
            program = self._program(
                "prefill",
                len(tokens_S),
                make=lambda: jax.jit(self._prefill_impl, out_shardings=everywhere),
            )
            return program(params, tokens_S, true_length)
        program = self._program(
            "extend",
            existing_prefix.k_LSHd.shape[1],
            len(tokens_S),
            make=lambda: jax.jit(self._extend_impl, donate_argnums=1, out_shardings=everywhere),
        )
        return program(params, existing_prefix, tokens_S, true_length)

    def empty_prefix(self, room: int) -> Prefix:
        """A prefix of no tokens, to be continued up to `room` of them."""
        a = self._architecture
        shape = (a.num_hidden_layers, room, a.num_key_value_heads, a.head_dim)
        make = self._program(
            "empty_prefix",
            room,
            make=lambda: jax.jit(
                lambda: Prefix(
                    jnp.zeros(shape, self._dtype),
                    jnp.zeros(shape, self._dtype),
                    jnp.zeros(a.vocab_size, jnp.float32),
                    jnp.zeros(a.vocab_size, bool),
                    jnp.int32(0),
                ),
                out_shardings=replicated(self._mesh),
            ),
        )
        return make()

    def _prefill_impl(
        self, params: Any, tokens_S: Int[Array, "S"], true_length: Int[Array, ""]
    ) -> Prefix:
        decoder = nnx.merge(self._definition, params)
        positions_1S = jnp.arange(tokens_S.shape[0])[None]
        valid_1S = positions_1S < true_length
        hidden_1SD, kv = decoder.hidden(tokens_S[None], positions_1S, valid_1S.astype(jnp.int32))
        return Prefix(
            kv.k[:, 0],
            kv.v[:, 0],
            decoder.logits(hidden_1SD[0, true_length - 1]),
            self._seen(tokens_S, valid_1S[0]),
            jnp.asarray(true_length, jnp.int32),
        )

    def _extend_impl(
        self, params: Any, prefix: Prefix, tokens_C: Int[Array, "C"], true_length: Int[Array, ""]
    ) -> Prefix:
        decoder = nnx.merge(self._definition, params)
        order_1C = jnp.arange(tokens_C.shape[0])[None]
        room_1S = jnp.arange(prefix.k_LSHd.shape[1])[None]
        valid_1C = order_1C < true_length
        before = KVPrefix(
            prefix.k_LSHd[:, None], prefix.v_LSHd[:, None], room_1S, room_1S < prefix.length
        )
        hidden_1CD, new = decoder.hidden(
            tokens_C[None], prefix.length + order_1C, valid_1C.astype(jnp.int32), before
        )
        # What is padding lies beyond the room or is written over by the next part.
        at_C = prefix.length + order_1C[0]
        return Prefix(
            prefix.k_LSHd.at[:, at_C].set(new.k[:, 0], mode="drop"),
            prefix.v_LSHd.at[:, at_C].set(new.v[:, 0], mode="drop"),
            decoder.logits(hidden_1CD[0, true_length - 1]),
            prefix.seen_V | self._seen(tokens_C, valid_1C[0]),
            jnp.asarray(prefix.length + true_length, jnp.int32),
        )

    def _seen(self, tokens_S: Int[Array, "S"], valid_S: Bool[Array, "S"]) -> Bool[Array, "V"]:
        V = self._architecture.vocab_size
        return jnp.zeros(V, bool).at[jnp.where(valid_S, tokens_S, V)].set(True, mode="drop")

    # Insert

    def insert(
        self,
        prefix: Prefix,
        decode_state: DecodeState,
        slot: int,
        request: SlotRequests | None = None,
    ) -> DecodeState:
        """Start one sequence in `slot`; without a request it is greedy, up to max_new_tokens."""
        if request is None:
            assert sizes_of(decode_state).prompts == self._slots, "a prompt for every slot"
            request = SlotRequests(
                slot_K=np.asarray([slot], np.int32),
                row_K=np.zeros(1, np.int32),
                prompt=slot,
                key_K=jax.random.key(0)[None],
                limit_K=np.asarray([self._max_new_tokens], np.int32),
                sampling=slot_sampling([Sampling(temperature=0.0)]),
            )
        return self.insert_copies(prefix, decode_state, request)

    def insert_copies(
        self, prefix: Prefix, decode_state: DecodeState, requests: SlotRequests
    ) -> DecodeState:
        """Start K sequences from one prefill; the state passed in is consumed."""
        state, layers = decode_state._replace(layers=()), decode_state.layers
        prompts = [(layer.prompt_k_NHSd, layer.prompt_v_NHSd) for layer in layers]
        sizes = sizes_of(decode_state)
        shardings = jax.tree.map(lambda x: x.sharding, (state, prompts))
        program = self._program(
            "insert",
            sizes.prompts,
            sizes.prompt_tokens,
            prefix.k_LSHd.shape[1],
            len(requests.slot_K),
            make=lambda: jax.jit(
                self._insert_impl, donate_argnums=(1, 2), out_shardings=shardings
            ),
        )
        state, prompts = program(prefix, state, prompts, requests)
        layers = tuple(
            layer._replace(prompt_k_NHSd=k, prompt_v_NHSd=v)
            for layer, (k, v) in zip(layers, prompts, strict=True)
        )
        return state._replace(layers=layers)

    def _insert_impl(
        self,
        prefix: Prefix,
        state: DecodeState,
        prompts: list[tuple[cache.Stored, cache.Stored]],
        requests: SlotRequests,
    ) -> tuple[DecodeState, list[tuple[cache.Stored, cache.Stored]]]:
        places, prompt = state.places, jnp.asarray(requests.prompt)
        slot_K = jnp.where(requests.slot_K < 0, self._slots, requests.slot_K)
        row_K = jnp.where(requests.slot_K < 0, self._copies, requests.row_K)
        per_shard = places.prompt_length_N.shape[0] // self._shards
        prompts = [
            (
                cache.insert_prompt(k, prefix.k_LSHd[i], prompt),
                cache.insert_prompt(v, prefix.v_LSHd[i], prompt),
            )
            for i, (k, v) in enumerate(prompts)
        ]

        def put(all_slots: Array, value: Array | int | bool) -> Array:
            return all_slots.at[slot_K].set(value, mode="drop")

        state = state._replace(
            places=cache.Places(
                places.prompt_length_N.at[prompt].set(prefix.length),
                places.slots_NK.at[prompt, row_K].set(
                    slot_K % (self._slots // self._shards), mode="drop"
                ),
                put(places.place_B, prompt % per_shard * self._copies + row_K),
                put(places.own_length_B, 0),
            ),
            logits_BV=put(state.logits_BV, prefix.logits_V[None]),
            seen_BV=put(state.seen_BV, prefix.seen_V[None]),
            position_B=put(state.position_B, prefix.length),
            generated_B=put(state.generated_B, 0),
            limit_B=put(state.limit_B, requests.limit_K),
            active_B=put(state.active_B, requests.limit_K > 0),
            key_B=put(state.key_B, requests.key_K),
            sampling=jax.tree.map(put, state.sampling, requests.sampling),
        )
        return state, prompts

    def release(self, decode_state: DecodeState, release_B: np.ndarray) -> DecodeState:
        """Stop the sequences of some slots; the state passed in is consumed."""
        program = self._program(
            "release", make=lambda: jax.jit(lambda active_B, B: active_B & ~B, donate_argnums=0)
        )
        return decode_state._replace(active_B=program(decode_state.active_B, release_B))

    # Generate

    def generate(self, params: Any, decode_state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        """Draw one token in every slot, then run it; the state passed in is consumed."""
        decode_state, sampled = self.generate_steps(params, decode_state, 1)
        data_BC = self._columns(decode_state, sampled)
        return decode_state, SampledTokens(
            data=data_BC, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )

    def _columns(self, state: DecodeState, sampled: Sampled) -> Int[Array, "B C"]:
        def columns(generated_B: Array, sampled: Sampled) -> Array:
            bits_B = jax.lax.bitcast_convert_type(sampled.log_prob_CB[0], jnp.int32)
            named = (sampled.token_CB[0], sampled.count_B, generated_B, bits_B, sampled.done_B)
            return jnp.stack([column.astype(jnp.int32) for column in named], axis=1)

        program = self._program(
            "columns", make=lambda: jax.jit(columns, out_shardings=replicated(self._mesh))
        )
        return program(state.generated_B, sampled)

    def generate_steps(
        self, params: Any, decode_state: DecodeState, steps: int, enough: int | None = None
    ) -> tuple[DecodeState, Sampled]:
        """Up to `steps` tokens in every slot, in one dispatch; the state passed in is consumed.

        It ends early when no slot is active, or when `enough` sequences ended in this dispatch.
        """
        enough = self._slots if enough is None else enough
        program = self._program(
            "generate",
            sizes_of(decode_state),
            steps,
            make=lambda: jax.jit(
                partial(self._generate_impl, steps=steps),
                donate_argnums=1,
                out_shardings=(
                    jax.tree.map(lambda x: x.sharding, decode_state),
                    replicated(self._mesh),
                ),
            ),
        )
        return program(params, decode_state, enough)

    def _generate_impl(
        self, params: Any, state: DecodeState, enough: Int[Array, ""], *, steps: int
    ) -> tuple[DecodeState, Sampled]:
        decoder, B, R = nnx.merge(self._definition, params), self._slots, self._top_log_probs
        # On CPU a slice of the stacked weights is a copy: one a dispatch, not one a token.
        on_cpu = self._mesh.devices.flat[0].platform == "cpu"
        layers = decoder.split_layers() if on_cpu else None
        started_B = state.active_B
        sampled = Sampled(
            jnp.zeros((steps, B), jnp.int32),
            jnp.zeros((steps, B), jnp.float32),
            jnp.zeros((steps, B, R), jnp.int32),
            jnp.zeros((steps, B, R), jnp.float32),
            jnp.zeros(B, jnp.int32),
            jnp.zeros(B, bool),
            jnp.int32(0),
        )

        def goes_on(carry: tuple[DecodeState, Sampled]) -> Array:
            state, sampled = carry
            ended = jnp.sum(started_B & ~state.active_B)
            return (sampled.steps < steps) & (ended < enough) & jnp.any(state.active_B)

        def step(carry: tuple[DecodeState, Sampled]) -> tuple[DecodeState, Sampled]:
            state, sampled = carry
            weights = decoder.split_layers() if layers is None else layers
            return self._step(decoder, weights, state, sampled)

        return jax.lax.while_loop(goes_on, step, (state, sampled))

    def _step(
        self, decoder: Decoder, layers: list[nnx.State], state: DecodeState, sampled: Sampled
    ) -> tuple[DecodeState, Sampled]:
        """Draw a token in every slot, and run it."""
        keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.generated_B)
        token_B, log_prob_B = sample(state.logits_BV, state.seen_BV, keys_B, state.sampling)
        generated_B = state.generated_B + state.active_B
        stopped_B = jnp.asarray(self._is_stop_V)[token_B] | (generated_B >= state.limit_B)
        stopped_B |= jnp.any(state.sampling.stop_BX == token_B[:, None], axis=1)
        i = sampled.steps
        if self._top_log_probs:
            top_id_BR, top_log_prob_BR = most_probable(state.logits_BV, self._top_log_probs)
            sampled = sampled._replace(
                top_id_CBR=sampled.top_id_CBR.at[i].set(top_id_BR),
                top_log_prob_CBR=sampled.top_log_prob_CBR.at[i].set(top_log_prob_BR),
            )
        sampled = sampled._replace(
            token_CB=sampled.token_CB.at[i].set(token_B),
            log_prob_CB=sampled.log_prob_CB.at[i].set(log_prob_B),
            count_B=sampled.count_B + state.active_B,
            done_B=sampled.done_B | (state.active_B & stopped_B),
            steps=i + 1,
        )
        logits_BV, caches = self._run(decoder, layers, state, token_B)
        state = state._replace(
            layers=caches,
            places=state.places._replace(
                own_length_B=state.places.own_length_B + state.active_B
            ),
            logits_BV=logits_BV,
            seen_BV=state.seen_BV.at[jnp.arange(self._slots), token_B].set(True),
            position_B=state.position_B + state.active_B,
            generated_B=generated_B,
            active_B=state.active_B & ~stopped_B,
        )
        return state, sampled

    def _run(
        self,
        decoder: Decoder,
        layers: list[nnx.State],
        state: DecodeState,
        token_B: Int[Array, "B"],
    ) -> tuple[Float[Array, "B V"], tuple[cache.LayerCache, ...]]:
        """Logits after one token a slot, and the caches with its keys and values."""
        sizes, places = sizes_of(state), state.places
        masks = cache.masks(places, sizes, self._shards, self._architecture.sliding_window)
        # The caches of sequences that are done stay as they are, to be scored.
        at_B = jnp.where(state.active_B, places.own_length_B, sizes.own_tokens)

        def attend(layer, q_B1HGd, k_B1Hd, v_B1Hd):
            layer = cache.append(layer, k_B1Hd[:, 0], v_B1Hd[:, 0], at_B)
            out_BHGd = cache.attend(layer, q_B1HGd[:, 0], places, masks, self._shards)
            return out_BHGd[:, None].astype(self._dtype), layer

        hidden_BD, caches = decoder.next_hidden(
            token_B, state.position_B, layers, state.layers, attend
        )
        return decoder.logits(hidden_BD), caches

    # Scores

    def score(
        self,
        params: Any,
        decode_state: DecodeState,
        slot_R: np.ndarray,
        trace_length_R: np.ndarray,
        tokens_RA: np.ndarray,
    ) -> Float[Array, "R A-1"]:
        """log pi(token i + 1 | prompt, trace, tokens <= i), in nats, float32, at temperature 1.

        Row r continues the first `trace_length_R[r]` tokens that slot `slot_R[r]` wrote, whose keys
        and values are read from its cache (Eq. 3's c_i for tokens t_end y*). The state is left as
        it is. Padding belongs at the end of a row.
        """
        program = self._program(
            "score",
            sizes_of(decode_state),
            tokens_RA.shape,
            make=lambda: jax.jit(self._score_impl, out_shardings=replicated(self._mesh)),
        )
        return program(params, decode_state, slot_R, trace_length_R, tokens_RA)

    def _score_impl(
        self,
        params: Any,
        state: DecodeState,
        slot_R: Int[Array, "R"],
        trace_length_R: Int[Array, "R"],
        tokens_RA: Int[Array, "R A"],
    ) -> Float[Array, "R A-1"]:
        decoder, sizes = nnx.merge(self._definition, params), sizes_of(state)
        shard_R = slot_R // (self._slots // self._shards)
        row_R = state.places.place_B[slot_R] // self._copies
        prompt_R = shard_R * (sizes.prompts // self._shards) + row_R
        length_R1 = state.places.prompt_length_N[prompt_R][:, None]
        prompt_1S, own_1T = (jnp.arange(n)[None] for n in sizes[1:])
        end_R1 = length_R1 + trace_length_R[:, None]
        layers = [cache.read(layer, slot_R, prompt_R) for layer in state.layers]
        prefix = KVPrefix(
            jnp.stack([k for k, _ in layers]).astype(self._dtype),
            jnp.stack([v for _, v in layers]).astype(self._dtype),
            jnp.concatenate([jnp.broadcast_to(prompt_1S, (len(slot_R), sizes.prompt_tokens)),
                             length_R1 + own_1T], axis=1),
            jnp.concatenate([prompt_1S < length_R1, length_R1 + own_1T < end_R1], axis=1),
        )
        positions_RA = end_R1 + jnp.arange(tokens_RA.shape[1] - 1)[None]
        hidden_RAD, _ = decoder.hidden(
            tokens_RA[:, :-1], positions_RA, jnp.ones_like(positions_RA), prefix
        )
        return token_scores(
            hidden_RAD,
            decoder.head_DV(),
            tokens_RA[:, 1:],
            vocab_size=self._architecture.vocab_size,
            chunk_tokens=SCORE_CHUNK_TOKENS,
        ).log_prob_BT

    def score_prompt(
        self, params: Any, tokens: np.ndarray, top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log pi(token i + 1 | tokens <= i), and the `top` most probable tokens in its place.

        For n tokens: log-probs [n - 1] in nats, ids [n - 1, top], their log-probs [n - 1, top].
        """
        length = bucket(len(tokens))
        padded = np.zeros(length, np.int32)
        padded[: len(tokens)] = tokens
        program = self._program(
            "score_prompt",
            length,
            top,
            make=lambda: jax.jit(
                partial(self._score_prompt_impl, top=top), out_shardings=replicated(self._mesh)
            ),
        )
        scores = jax.tree.map(np.asarray, program(params, padded, len(tokens)))
        return tuple(x[: len(tokens) - 1] for x in scores)

    def _score_prompt_impl(
        self, params: Any, tokens_S: Int[Array, "S"], length: Int[Array, ""], *, top: int
    ) -> tuple[Float[Array, "S"], Int[Array, "S R"], Float[Array, "S R"]]:
        decoder = nnx.merge(self._definition, params)
        positions_1S = jnp.arange(tokens_S.shape[0])[None]
        segments_1S = (positions_1S < length).astype(jnp.int32)
        hidden_1SD, _ = decoder.hidden(tokens_S[None], positions_1S, segments_1S)

        def score(hidden_D: Array, target: Array) -> tuple[Array, Array, Array]:
            log_pi_V = jax.nn.log_softmax(decoder.logits(hidden_D))
            top_R, id_R = jax.lax.top_k(log_pi_V, top)
            return log_pi_V[target], id_R.astype(jnp.int32), top_R

        targets_S = jnp.roll(tokens_S, -1)
        chunk = min(SCORE_CHUNK_TOKENS, tokens_S.shape[0])
        return jax.lax.map(lambda x: score(*x), (hidden_1SD[0], targets_S), batch_size=chunk)

    # State

    def init_decode_state(self, sizes: Sizes | None = None) -> DecodeState:
        """An empty state; without sizes, a prompt for every slot and the longest of all."""
        sizes = self.largest_sizes if sizes is None else sizes
        a, B = self._architecture, self._slots

        def empty() -> DecodeState:
            layers = tuple(
                cache.empty_layer(sizes, B, a.num_key_value_heads, a.head_dim, self._cache_dtype)
                for _ in range(a.num_hidden_layers)
            )
            return empty_state(layers, B, self._copies, a.vocab_size)

        shardings = state_shardings(self._mesh, jax.eval_shape(empty))
        make = lambda: jax.jit(empty, out_shardings=shardings)  # noqa: E731
        return self._program("init", sizes, make=make)()

    def resize(self, decode_state: DecodeState, sizes: Sizes) -> DecodeState:
        """The same sequences with another room in their caches; what does not fit is cut off."""
        old = sizes_of(decode_state)
        if sizes == old:
            return decode_state
        per_shard = sizes.prompts // self._shards

        def fit(x_N: Array) -> Array:
            x_U = x_N.reshape(self._shards, -1, *x_N.shape[1:])
            room = max(0, per_shard - x_U.shape[1])
            x_U = jnp.pad(x_U, [(0, 0), (0, room)] + [(0, 0)] * (x_N.ndim - 1))
            return x_U[:, :per_shard].reshape(sizes.prompts, *x_N.shape[1:])

        def resized(state: DecodeState) -> DecodeState:
            return state._replace(
                layers=tuple(
                    cache.resize_layer(layer, old, sizes, self._shards) for layer in state.layers
                ),
                places=state.places._replace(
                    prompt_length_N=fit(state.places.prompt_length_N),
                    slots_NK=fit(state.places.slots_NK),
                ),
            )

        shardings = state_shardings(self._mesh, decode_state)
        make = lambda: jax.jit(resized, out_shardings=shardings)  # noqa: E731
        return self._program("resize", old, sizes, make=make)(decode_state)

    @property
    def largest_sizes(self) -> Sizes:
        """Room for the longest prompt in every slot and for max_new_tokens after it."""
        return Sizes(self._slots, self._max_prompt, bucket(self._max_new_tokens))

    def load_params(self, params: Any) -> Any:
        """The weights as they are: training and decoding share one sharding."""
        return params

    def get_prefix_destination_sharding(self) -> Any:
        """Every device holds a prefix whole until it is inserted."""
        return replicated(self._mesh)

    def get_tokenizer(self) -> Any:
        """Where the tokenizer's files are."""
        return jetstream.TokenizerParameters(path=self._tokenizer_path)

    @property
    def max_concurrent_decodes(self) -> int:
        """Number of slots."""
        return self._slots

    @property
    def shards(self) -> int:
        """Groups of neighbouring slots; a prompt is shared within one."""
        return self._shards

    @property
    def copies(self) -> int:
        """Most slots that share one prompt."""
        return self._copies

    @property
    def samples_per_slot(self) -> int:
        """One sequence a slot."""
        return 1

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt in tokens, a bucket."""
        return self._max_prompt

    @property
    def prefill_chunk(self) -> int | None:
        """Longest part of a prompt that one prefill takes; None for no limit."""
        return self._prefill_chunk

    @property
    def max_new_tokens(self) -> int:
        """Most tokens that can follow the longest prompt."""
        return self._max_new_tokens

    @property
    def top_log_probs(self) -> int:
        """Most probable tokens that are reported for each token drawn."""
        return self._top_log_probs

    @property
    def stop_ids(self) -> frozenset[int]:
        """The tokens that end a sequence."""
        return self._stop_ids

    @property
    def mesh(self) -> Mesh:
        """The mesh of the weights and of the cache."""
        return self._mesh

    @property
    def colocated_cpus(self) -> None:
        """None are used."""
        return None
