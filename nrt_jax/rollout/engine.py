"""The JetStream engine over our decoder: prefill, insert, generate.

Letters: L layers, B slots, K copies of one prompt, S cache length, H key/value heads, d head dim,
V vocabulary, C columns of a step's result.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Bool, Float, Int, Key

from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.sharding import partition_spec, replicated
from nrt_jax.models.variants import Architecture
from nrt_jax.rollout import jetstream_compat as jetstream
from nrt_jax.rollout.sampler import sample

SMALLEST_BUCKET = 16


class Prefix(NamedTuple):
    """A prompt after prefill: its keys and values, and the logits of what follows it."""

    k_LSHd: Float[Array, "L S H d"]
    v_LSHd: Float[Array, "L S H d"]
    logits_V: Float[Array, "V"]
    length: Int[Array, ""]


class SlotRequests(NamedTuple):
    """What each of K copies of one prompt is to do; a slot of -1 is no copy."""

    slot_K: Int[Array, "K"]
    key_K: Key[Array, "K"]
    limit_K: Int[Array, "K"]
    temperature_K: Float[Array, "K"]
    top_p_K: Float[Array, "K"]


class DecodeState(NamedTuple):
    """Every slot's cache and the logits its next token will be drawn from."""

    k_LBSHd: Float[Array, "L B S H d"]
    v_LBSHd: Float[Array, "L B S H d"]
    logits_BV: Float[Array, "B V"]
    length_B: Int[Array, "B"]
    generated_B: Int[Array, "B"]
    limit_B: Int[Array, "B"]
    active_B: Bool[Array, "B"]
    key_B: Key[Array, "B"]
    temperature_B: Float[Array, "B"]
    top_p_B: Float[Array, "B"]


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


def bucket(length: int) -> int:
    """Smallest power of two, 16 or more, that holds `length` tokens."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


class DecoderEngine(jetstream.Engine):
    """Continuous batching over `slots` sequences that share one compiled decode step.

    Any token of `stop_ids` ends a sequence, as does the limit of its request. The weights are an
    argument of every call, so the training loop's own arrays are used without a copy.
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
        tokenizer_path: str = "",
    ):
        self._definition, self._architecture, self._mesh = definition, architecture, mesh
        self._slots, self._dtype, self._tokenizer_path = slots, dtype, tokenizer_path
        self._max_prompt = bucket(max_prompt_tokens)
        self._cache_length = self._max_prompt + max_new_tokens
        self._max_new_tokens, self._stop_ids = max_new_tokens, stop_ids
        self._is_stop_V = np.isin(np.arange(architecture.vocab_size), sorted(stop_ids))
        everywhere, shardings = replicated(mesh), self._state_shardings()
        self._init = jax.jit(self._empty_state, out_shardings=shardings)
        self._prefill = jax.jit(self._prefill_impl, out_shardings=everywhere)
        self._insert = jax.jit(self._insert_impl, donate_argnums=1, out_shardings=shardings)
        self._generate = jax.jit(
            self._generate_impl, donate_argnums=1, out_shardings=(shardings, everywhere)
        )

    def prefill(
        self,
        *,
        params: Any,
        existing_prefix: Prefix | None = None,
        padded_tokens: Int[Array | np.ndarray, "S"],
        true_length: int,
    ) -> Prefix:
        """Run one prompt, padded on the right to a bucket; a prefix to continue is not taken."""
        if existing_prefix is not None:
            raise ValueError("existing_prefix: this engine prefills a prompt as a whole; pass None")
        if true_length > len(padded_tokens):
            raise ValueError(
                f"true_length {true_length} exceeds the {len(padded_tokens)} padded tokens"
            )
        return self._prefill(params, jnp.asarray(padded_tokens), true_length)

    def _prefill_impl(
        self, params: Any, tokens_S: Int[Array, "S"], true_length: Int[Array, ""]
    ) -> Prefix:
        decoder = nnx.merge(self._definition, params)
        positions_1S = jnp.arange(tokens_S.shape[0])[None]
        segments_1S = (positions_1S < true_length).astype(jnp.int32)
        hidden_1SD, kv = decoder.hidden(tokens_S[None], positions_1S, segments_1S)
        logits_V = decoder.logits(hidden_1SD[0, true_length - 1])
        return Prefix(kv.k[:, 0], kv.v[:, 0], logits_V, jnp.asarray(true_length, jnp.int32))

    def insert(
        self,
        prefix: Prefix,
        decode_state: DecodeState,
        slot: int,
        request: SlotRequests | None = None,
    ) -> DecodeState:
        """Start one sequence in `slot`; without a request it is greedy, up to max_new_tokens."""
        if request is None:
            request = SlotRequests(
                slot_K=np.asarray([slot], np.int32),
                key_K=jax.random.key(0)[None],
                limit_K=np.asarray([self._max_new_tokens], np.int32),
                temperature_K=np.zeros(1, np.float32),
                top_p_K=np.ones(1, np.float32),
            )
        return self.insert_copies(prefix, decode_state, request)

    def insert_copies(
        self, prefix: Prefix, decode_state: DecodeState, requests: SlotRequests
    ) -> DecodeState:
        """Start K sequences from one prefill; the state passed in is consumed."""
        return self._insert(prefix, decode_state, requests)

    def _insert_impl(
        self, prefix: Prefix, state: DecodeState, requests: SlotRequests
    ) -> DecodeState:
        slot_K = jnp.where(requests.slot_K < 0, self._slots, requests.slot_K)
        S = prefix.k_LSHd.shape[1]

        def put(all_slots: Array, value: Array | int | bool) -> Array:
            return all_slots.at[slot_K].set(value, mode="drop")

        return DecodeState(
            k_LBSHd=state.k_LBSHd.at[:, slot_K, :S].set(prefix.k_LSHd[:, None], mode="drop"),
            v_LBSHd=state.v_LBSHd.at[:, slot_K, :S].set(prefix.v_LSHd[:, None], mode="drop"),
            logits_BV=put(state.logits_BV, prefix.logits_V[None]),
            length_B=put(state.length_B, prefix.length),
            generated_B=put(state.generated_B, 0),
            limit_B=put(state.limit_B, requests.limit_K),
            active_B=put(state.active_B, requests.limit_K > 0),
            key_B=put(state.key_B, requests.key_K),
            temperature_B=put(state.temperature_B, requests.temperature_K),
            top_p_B=put(state.top_p_B, requests.top_p_K),
        )

    def generate(self, params: Any, decode_state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        """Draw one token in every slot, then run it; the state passed in is consumed."""
        decode_state, data_BC = self._generate(params, decode_state)
        return decode_state, SampledTokens(
            data=data_BC, tokens_idx=(0, 1), valid_idx=(1, 2), length_idx=(2, 3), samples_per_slot=1
        )

    def _generate_impl(
        self, params: Any, state: DecodeState
    ) -> tuple[DecodeState, Int[Array, "B C"]]:
        keys_B = jax.vmap(jax.random.fold_in)(state.key_B, state.generated_B)
        token_B, log_prob_B = sample(state.logits_BV, keys_B, state.temperature_B, state.top_p_B)
        generated_B = state.generated_B + state.active_B
        stopped_B = jnp.asarray(self._is_stop_V)[token_B] | (generated_B >= state.limit_B)
        done_B = state.active_B & stopped_B
        logits_BV, k_LBSHd, v_LBSHd = self._advance(params, state, token_B)
        columns = (
            token_B,
            state.active_B,
            generated_B,
            jax.lax.bitcast_convert_type(log_prob_B, jnp.int32),
            done_B,
        )
        data_BC = jnp.stack([column.astype(jnp.int32) for column in columns], axis=1)
        state = state._replace(
            k_LBSHd=k_LBSHd,
            v_LBSHd=v_LBSHd,
            logits_BV=logits_BV,
            length_B=state.length_B + state.active_B,
            generated_B=generated_B,
            active_B=state.active_B & ~stopped_B,
        )
        return state, data_BC

    def _advance(
        self, params: Any, state: DecodeState, token_B: Int[Array, "B"]
    ) -> tuple[Float[Array, "B V"], Float[Array, "L B S H d"], Float[Array, "L B S H d"]]:
        """Run one token a slot against its cache, and append its keys and values."""
        decoder = nnx.merge(self._definition, params)
        cached_BS = jnp.arange(self._cache_length)[None, :]
        prefix = KVPrefix(
            state.k_LBSHd,
            state.v_LBSHd,
            jnp.broadcast_to(cached_BS, (self._slots, self._cache_length)),
            cached_BS < state.length_B[:, None],
        )
        hidden_B1D, new = decoder.hidden(
            token_B[:, None], state.length_B[:, None], jnp.ones((self._slots, 1), jnp.int32), prefix
        )
        at = (slice(None), jnp.arange(self._slots), state.length_B)
        k_LBSHd = state.k_LBSHd.at[at].set(new.k[:, :, 0], mode="drop")
        v_LBSHd = state.v_LBSHd.at[at].set(new.v[:, :, 0], mode="drop")
        return decoder.logits(hidden_B1D[:, 0]), k_LBSHd, v_LBSHd

    def init_decode_state(self) -> DecodeState:
        """An empty state: no slot is active."""
        return self._init()

    def _empty_state(self) -> DecodeState:
        a, B = self._architecture, self._slots
        cache = (a.num_hidden_layers, B, self._cache_length, a.num_key_value_heads, a.head_dim)
        return DecodeState(
            k_LBSHd=jnp.zeros(cache, self._dtype),
            v_LBSHd=jnp.zeros(cache, self._dtype),
            logits_BV=jnp.zeros((B, a.vocab_size), jnp.float32),
            length_B=jnp.zeros(B, jnp.int32),
            generated_B=jnp.zeros(B, jnp.int32),
            limit_B=jnp.zeros(B, jnp.int32),
            active_B=jnp.zeros(B, bool),
            key_B=jax.random.split(jax.random.key(0), B),
            temperature_B=jnp.ones(B, jnp.float32),
            top_p_B=jnp.ones(B, jnp.float32),
        )

    def _state_shardings(self) -> DecodeState:
        """Slots over the batch axes, key/value heads over the tensor axis."""
        cache = partition_spec(("layers", "batch", None, "kv_heads", None))
        rows = NamedSharding(self._mesh, partition_spec(("batch",)))
        heads = NamedSharding(self._mesh, cache)
        return DecodeState(heads, heads, *([rows] * (len(DecodeState._fields) - 2)))

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
    def samples_per_slot(self) -> int:
        """One sequence a slot."""
        return 1

    @property
    def max_prefill_length(self) -> int:
        """Longest prompt in tokens, a bucket."""
        return self._max_prompt

    @property
    def max_new_tokens(self) -> int:
        """Most tokens that can follow the longest prompt."""
        return self._max_new_tokens

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
