"""The JetStream engine over our decoder: prefill, insert, generate.

It compiles the functions of prefill.py, decode.py and score.py for the shapes that it meets.
Letters: those of decode_state.py; R rows that are scored, A tokens of a row, W = A - 1.
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

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.rollout import AttentionKernel
from nrt_jax.engine import jetstream_compat as jetstream
from nrt_jax.engine import prefill, score
from nrt_jax.engine.attention_kernels import kv_cache
from nrt_jax.engine.decode import Decoding, decode_steps, insert_copies
from nrt_jax.engine.decode_state import (
    DecodeState,
    Moves,
    Sampled,
    SlotRequests,
    bucket,
    empty_state,
    moved,
    padded,
    resized,
    sizes_of,
    slot_sampling,
    state_shardings,
)
from nrt_jax.engine.kv_cache import Sizes, shards_of
from nrt_jax.engine.prefill import Prefix
from nrt_jax.engine.sampling import Sampling
from nrt_jax.models.sharding import replicated


@struct.dataclass
class SampledTokens(jetstream.ResultTokens):
    """ResultTokens with two more columns: the logprob's bits, and whether the slot is done."""

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
    def logprob_B(self) -> Float[np.ndarray, "B"]:
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
    int8 for one byte and a factor; None is the decoder's own. `attention` is what decodes: XLA's
    own attention, the platform's Pallas kernel, or (auto) the kernel where it takes the model.
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
        attention: AttentionKernel = "auto",
        copies: int = 1,
        prefill_chunk: int | None = None,
        top_logprobs: int = 0,
        tokenizer_path: str = "",
    ):
        self._definition, self._architecture, self._mesh = definition, architecture, mesh
        self._cache_dtype = dtype if cache_dtype is None else cache_dtype
        platform, shards = mesh.devices.flat[0].platform, shards_of(mesh)
        self._slots = -(-slots // shards) * shards
        self._decoding = Decoding(
            kv_cache(attention, platform, mesh, architecture, self._cache_dtype),
            shards,
            min(copies, self._slots // shards),
            np.isin(np.arange(architecture.vocab_size), sorted(stop_ids)),
            top_logprobs,
            dtype,
            unstacks_once=platform == "cpu",
        )
        self._max_prompt, self._max_new_tokens = bucket(max_prompt_tokens), max_new_tokens
        self._prefill_chunk = None if prefill_chunk is None else bucket(prefill_chunk)
        self._stop_ids, self._tokenizer_path = stop_ids, tokenizer_path
        self._programs: dict[tuple, Callable] = {}
        self.compiled: Counter[str] = Counter()
        """How many programs of each kind were compiled, for other shapes."""

    def _program(self, kind: str, *shapes: Any, make: Callable[[], Callable]) -> Callable:
        """The compiled function for one combination of shapes, so that they can be counted."""
        if (kind, *shapes) not in self._programs:
            self._programs[kind, *shapes] = make()
            self.compiled[kind] += 1
        return self._programs[kind, *shapes]

    def _with_decoder(self, function: Callable, **fixed: Any) -> Callable:
        """`function` of a decoder and more, as one of its weights and more, to be compiled."""

        def of_params(params: Any, *args: Any) -> Any:
            return function(nnx.merge(self._definition, params), *args, **fixed)

        return of_params

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

        A prefix has room for the tokens it was made with; `empty_prefix` makes one with more. The
        one that is continued is consumed.
        """
        if true_length > len(padded_tokens):
            raise ValueError(
                f"true_length {true_length} exceeds the {len(padded_tokens)} padded tokens"
            )
        tokens_S, everywhere = jnp.asarray(padded_tokens), replicated(self._mesh)
        if existing_prefix is None:
            run_prompt = self._program(
                "prefill",
                len(tokens_S),
                make=lambda: jax.jit(
                    self._with_decoder(prefill.run_prompt), out_shardings=everywhere
                ),
            )
            return run_prompt(params, tokens_S, true_length)
        run_next_part = self._program(
            "prefill_part",
            existing_prefix.k_LSHd.shape[1],
            len(tokens_S),
            make=lambda: jax.jit(
                self._with_decoder(prefill.run_next_part),
                donate_argnums=1,
                out_shardings=everywhere,
            ),
        )
        return run_next_part(params, existing_prefix, tokens_S, true_length)

    def empty_prefix(self, room: int) -> Prefix:
        """A prefix of no tokens, to be continued up to `room` of them."""
        make = self._program(
            "empty_prefix",
            room,
            make=lambda: jax.jit(
                lambda: prefill.empty_prefix(self._architecture, room, self._decoding.dtype),
                out_shardings=replicated(self._mesh),
            ),
        )
        return make()

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
            rooms, slots = sizes_of(decode_state).prompts, len(decode_state.active_B)
            assert rooms == slots, "there is a prompt for every slot"
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
        cache, layers = self._decoding.cache, decode_state.layers
        state = decode_state._replace(layers=())
        prompts = [cache.prompts_of(layer) for layer in layers]

        def make() -> Callable:
            return jax.jit(
                partial(insert_copies, decoding=self._decoding),
                donate_argnums=(1, 2),
                out_shardings=jax.tree.map(lambda x: x.sharding, (state, prompts)),
            )

        program = self._program(
            "insert",
            len(state.active_B),
            jax.tree.structure(prompts[0]),
            tuple(x.shape for x in jax.tree.leaves(prompts[0])),
            prefix.k_LSHd.shape[1],
            len(requests.slot_K),
            make=make,
        )
        state, prompts = program(prefix, state, prompts, requests)
        return state._replace(layers=tuple(map(cache.with_prompts, layers, prompts)))

    def release(self, decode_state: DecodeState, release_B: Bool[np.ndarray, "B"]) -> DecodeState:
        """Stop the sequences of some slots; the state passed in is consumed."""
        program = self._program(
            "release",
            len(release_B),
            make=lambda: jax.jit(
                lambda active_B, release_B: active_B & ~release_B, donate_argnums=0
            ),
        )
        return decode_state._replace(active_B=program(decode_state.active_B, release_B))

    # Generate

    def generate(self, params: Any, decode_state: DecodeState) -> tuple[DecodeState, SampledTokens]:
        """Draw one token in every slot, then run it; the state passed in is consumed."""
        decode_state, sampled = self.generate_steps(params, decode_state, 1)
        program = self._program(
            "columns", make=lambda: jax.jit(_columns, out_shardings=replicated(self._mesh))
        )
        return decode_state, SampledTokens(
            data=program(decode_state.generated_B, sampled),
            tokens_idx=(0, 1),
            valid_idx=(1, 2),
            length_idx=(2, 3),
            samples_per_slot=1,
        )

    def generate_steps(
        self, params: Any, decode_state: DecodeState, steps: int, enough: int | None = None
    ) -> tuple[DecodeState, Sampled]:
        """Up to `steps` tokens in every slot, in one dispatch; the state passed in is consumed.

        It ends early when no slot is active, or when `enough` sequences ended in this dispatch.
        """
        program = self._program(
            "generate",
            len(decode_state.active_B),
            sizes_of(decode_state),
            steps,
            make=lambda: jax.jit(
                self._with_decoder(decode_steps, steps=steps, decoding=self._decoding),
                donate_argnums=1,
                out_shardings=(
                    state_shardings(self._mesh, decode_state),
                    replicated(self._mesh),
                ),
            ),
        )
        return program(params, decode_state, self._slots if enough is None else enough)

    # Scores

    def score(
        self,
        params: Any,
        decode_state: DecodeState,
        slot_R: Int[np.ndarray, "R"],
        trace_length_R: Int[np.ndarray, "R"],
        tokens_RA: Int[np.ndarray, "R A"],
    ) -> Float[Array, "R W"]:
        """log pi(token i + 1 | prompt, trace, tokens <= i), in nats, float32, at temperature 1.

        Row r continues the first `trace_length_R[r]` tokens that slot `slot_R[r]` wrote, whose keys
        and values are read from its cache (Eq. 3's c_i for tokens t_end y*). The state is left as
        it is. Padding belongs at the end of a row.
        """
        program = self._program(
            "score",
            len(decode_state.active_B),
            sizes_of(decode_state),
            tokens_RA.shape,
            make=lambda: jax.jit(
                self._with_decoder(score.score_suffixes, decoding=self._decoding),
                out_shardings=replicated(self._mesh),
            ),
        )
        return program(params, decode_state, slot_R, trace_length_R, tokens_RA)

    def score_prompt(
        self, params: Any, tokens: np.ndarray, top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log pi(token i + 1 | tokens <= i), and the `top` most probable tokens in its place.

        For n tokens: logprobs [n - 1] in nats, ids [n - 1, top], their logprobs [n - 1, top].
        """
        tokens_S = padded(tokens)
        program = self._program(
            "score_prompt",
            len(tokens_S),
            top,
            make=lambda: jax.jit(
                self._with_decoder(score.score_prompt, top=top),
                out_shardings=replicated(self._mesh),
            ),
        )
        scores = jax.tree.map(np.asarray, program(params, tokens_S, len(tokens)))
        return tuple(x[: len(tokens) - 1] for x in scores)

    # State

    def init_decode_state(self, sizes: Sizes | None = None) -> DecodeState:
        """An empty state; without sizes, a prompt for every slot and the longest of all."""
        sizes = self.largest_sizes if sizes is None else sizes
        a, B, decoding = self._architecture, self._slots, self._decoding

        def empty() -> DecodeState:
            layers = tuple(
                decoding.cache.empty(sizes, B, a.num_key_value_heads, a.head_dim, self._cache_dtype)
                for _ in range(a.num_hidden_layers)
            )
            return empty_state(layers, B, decoding.copies, a.vocab_size)

        def make() -> Callable:
            shardings = state_shardings(self._mesh, jax.eval_shape(empty))
            return jax.jit(empty, out_shardings=shardings)

        return self._program("init", sizes, make=make)()

    def resize(self, decode_state: DecodeState, sizes: Sizes) -> DecodeState:
        """The same sequences with another room in their caches; what does not fit is cut off.

        The state passed in is consumed.
        """
        if sizes == sizes_of(decode_state):
            return decode_state
        cache, shards = self._decoding.cache, self.shards
        return self._reshape(
            ("resize", sizes),
            decode_state,
            lambda layer: cache.resize(layer, sizes),
            lambda rest: rest._replace(places=resized(rest.places, sizes, shards)),
        )

    def move_slots(self, decode_state: DecodeState, moves: Moves) -> DecodeState:
        """The same sequences in other slots, more or fewer; the state passed in is consumed."""
        cache, shards = self._decoding.cache, self.shards
        return self._reshape(
            ("move_slots", len(moves.from_B)),
            decode_state,
            lambda layer, moves: cache.move_slots(layer, moves.from_B.reshape(shards, -1)),
            lambda rest, moves: moved(rest, moves, shards),
            moves,
        )

    def _reshape(
        self,
        kind: tuple[str, Any],
        state: DecodeState,
        of_layer: Callable,
        of_rest: Callable,
        *args: Any,
    ) -> DecodeState:
        """One layer after the other, so that only one of them is there twice."""

        def make() -> Callable:
            rest = jax.eval_shape(of_rest, state._replace(layers=()), *args)
            layer = jax.eval_shape(of_layer, state.layers[0], *args)
            shardings = state_shardings(self._mesh, rest._replace(layers=(layer,)))
            layer_program = jax.jit(of_layer, out_shardings=shardings.layers[0])
            rest_program = jax.jit(of_rest, out_shardings=shardings._replace(layers=()))

            def run(state: DecodeState, *args: Any) -> DecodeState:
                layers = []
                for old in state.layers:
                    layers.append(layer_program(old, *args))
                    _delete(old, but=layers[-1])
                return rest_program(state._replace(layers=()), *args)._replace(layers=tuple(layers))

            return run

        name, target = kind
        program = self._program(name, len(state.active_B), sizes_of(state), target, make=make)
        return program(state, *args)

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
        return self._decoding.shards

    @property
    def copies(self) -> int:
        """Most slots that share one prompt."""
        return self._decoding.copies

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
    def top_logprobs(self) -> int:
        """Most probable tokens that are reported for each token drawn."""
        return self._decoding.top_logprobs

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


def _delete(arrays: Any, *, but: Any) -> None:
    """Free the memory of arrays, except those that a program handed through as they were."""
    kept = {id(leaf) for leaf in jax.tree.leaves(but)}
    for leaf in jax.tree.leaves(arrays):
        if id(leaf) not in kept:
            leaf.delete()


def _columns(generated_B: Int[Array, "B"], sampled: Sampled) -> Int[Array, "B C"]:
    """One step as the columns of JetStream's results, and two more."""
    bits_B = jax.lax.bitcast_convert_type(sampled.logprob_CB[0], jnp.int32)
    named = (sampled.token_CB[0], sampled.count_B, generated_B, bits_B, sampled.done_B)
    return jnp.stack([column.astype(jnp.int32) for column in named], axis=1)
