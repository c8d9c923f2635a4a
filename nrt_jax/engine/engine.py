"""The decoding engine: prefill, insert and generate over a fixed number of slots.

The methods are those of JetStream's engine interface; nothing here needs that package. Each method
calls a compiled function of prefill.py, decode.py or score.py.
Letters: those of decode_state.py; A tokens of a suffix.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.rollout import AttentionKernel
from nrt_jax.engine import decode, prefill, score
from nrt_jax.engine.attention_kernels import kv_cache
from nrt_jax.engine.decode_state import (
    SMALLEST_OWN_TOKENS,
    DecodeState,
    Sampled,
    SlotMoves,
    SlotRequests,
    bucket,
    by_shard,
    empty_state,
    padded,
    quarter_bucket,
    sizes_of,
    state_shardings,
)
from nrt_jax.engine.kv_cache import Sizes, shards_of
from nrt_jax.engine.packed_requests import PackedRequests
from nrt_jax.engine.prefill import Prefix, prefix_shardings
from nrt_jax.engine.programs import (
    Programs,
    init_program,
    insert_program,
    move_program,
    resize_program,
    with_decoder,
)
from nrt_jax.engine.sampling import sampled_vocab
from nrt_jax.models.sharding import replicated


class Engine:
    """Continuous batching over `slots` sequences that share one compiled decode step.

    A sequence ends at a token of `stop_ids`, at a stop token of its own request, or at its limit.
    The weights are an argument of every call, so the training loop's arrays are used without a
    copy. Up to `num_samples` slots share the keys and values of one prompt.

    `slots` is rounded up to a multiple of the mesh's batch axes. `dtype` is that of the
    computation; `cache_dtype` that of stored keys and values (None: `dtype`; int8 stores a factor
    for each token and head beside them). `attention` selects XLA's attention, the platform's Pallas
    kernel, or (auto) the kernel where it supports the model. `top_logprobs` most probable tokens
    are reported for each token drawn. Tokens of `banned_ids` are never drawn: each draw is from the
    rest of the distribution, renormalised, as are its logprobs.

    With `one_size` all prompts are padded to the longest and slots hold the longest sequence from
    the start: one program each for prefill, insert and decode, for small limits. Engines with the
    same `programs` share those of equal settings and shapes.
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
        num_samples: int = 1,
        prefill_chunk: int | None = None,
        top_logprobs: int = 0,
        banned_ids: frozenset[int] = frozenset(),
        one_size: bool = False,
        programs: Programs | None = None,
    ):
        self._definition, self._architecture = definition, architecture
        self.mesh = mesh
        """The mesh of the weights and of the cache."""
        self._cache_dtype = dtype if cache_dtype is None else cache_dtype
        platform, shards = mesh.devices.flat[0].platform, shards_of(mesh)
        self._slots = -(-slots // shards) * shards
        self._vocab = sampled_vocab(architecture.vocab_size, mesh)
        self._decoding = decode.Decoding(
            cache=kv_cache(attention, platform, mesh, architecture, self._cache_dtype),
            shards=shards,
            num_samples=min(num_samples, self._slots // shards),
            top_logprobs=top_logprobs,
            dtype=dtype,
            unstacks_once=platform == "cpu",
            mesh=mesh,
        )
        self.max_prefill_length = bucket(max_prompt_tokens)
        """Longest prompt in tokens, a bucket."""
        self.max_new_tokens = max_new_tokens
        """Most tokens that can follow the longest prompt."""
        self._longest_prompt = quarter_bucket(max_prompt_tokens)
        self.prefill_chunk = None if prefill_chunk is None else bucket(prefill_chunk)
        """Longest part of a prompt that one prefill takes; None for no limit."""
        self.one_size = one_size
        """Whether prompts and slots have one capacity, and the number of slots does not change."""
        self.stop_ids = stop_ids
        """The tokens that end any sequence."""
        self._banned_ids = banned_ids
        self.top_logprobs = top_logprobs
        """Most probable tokens that are reported for each token drawn."""
        self.programs = Programs(mesh) if programs is None else programs
        """Its compiled programs, and those of the engines that it shares them with."""
        fixed = self._decoding._replace(cache=type(self._decoding.cache), num_samples=0)
        settings = (definition, architecture, self._slots, *map(str, (*fixed, self._cache_dtype)))
        self._number = self.programs.engine_number(settings)
        self.compiled = self.programs.compiled
        """Number of compiled programs by kind."""

    def _program(self, kind: str, *shapes: Any, make: Callable[[], Callable]) -> Callable:
        return self.programs.get(kind, self._number, *shapes, make=make)

    def _with_decoder(self, function: Callable, **fixed: Any) -> Callable:
        return with_decoder(self._definition, function, **fixed)

    # Prefill

    def prefill(
        self,
        *,
        params: Any,
        existing_prefix: Prefix | None = None,
        padded_tokens: Int[Array | np.ndarray, "S"],
        true_length: int,
    ) -> Prefix:
        """Run one prompt, padded on the right to a bucket, or the next part after a prefix.

        A prefix has the capacity that it was made with; `empty_prefix` makes one for several parts.
        The existing prefix is consumed. Any shard can insert it, as every shard runs the prompt.
        """
        if true_length > len(padded_tokens):
            raise ValueError(
                f"true_length {true_length} exceeds the {len(padded_tokens)} padded tokens"
            )
        tokens_RS = jnp.tile(jnp.asarray(padded_tokens), (self.shards, 1))
        length_R = jnp.full(self.shards, true_length, jnp.int32)
        return self.prefill_rows(params, existing_prefix, tokens_RS, length_R)

    def prefill_rows(
        self,
        params: Any,
        existing_prefix: Prefix | None,
        tokens_RS: Int[Array | np.ndarray, "R S"],
        length_R: Int[Array | np.ndarray, "R"],
    ) -> Prefix:
        """Run a prompt for each shard, or the next parts; the existing prefix is consumed."""
        before = () if existing_prefix is None else (existing_prefix,)
        program = self._program(
            "prefill_part" if before else "prefill",
            *[prefix.capacity for prefix in before],
            tokens_RS.shape[1],
            make=lambda: jax.jit(
                self._with_decoder(
                    prefill.run_next_parts if before else prefill.run_prompts, mesh=self.mesh
                ),
                donate_argnums=1 if before else (),
                out_shardings=prefix_shardings(self.mesh),
            ),
        )
        return program(params, *before, tokens_RS, length_R)

    def empty_prefix(self, capacity: int) -> Prefix:
        """A prefix of no tokens for each shard, to be continued up to `capacity` of them."""
        a, dtype = self._architecture, self._decoding.dtype
        make = self._program(
            "empty_prefix",
            capacity,
            make=lambda: jax.jit(
                lambda: prefill.empty_prefix(a, self.shards, capacity, dtype, self.mesh),
                out_shardings=prefix_shardings(self.mesh),
            ),
        )
        return make()

    # Insert

    def insert(
        self, prefix: Prefix, decode_state: DecodeState, requests: SlotRequests
    ) -> DecodeState:
        """Start K sequences from one prefill; the state passed in is consumed."""
        rows = by_shard(requests, self.shards, decode_state)
        return self._insert(prefix, decode_state, rows, decode.insert_samples, rows.slot_K.shape[1])

    def insert_rows(
        self, prefix: Prefix, decode_state: DecodeState, requests: PackedRequests
    ) -> DecodeState:
        """Start up to K sequences in each shard after its row; the state passed in is consumed."""
        data_RC, samples = requests
        insert = partial(decode.insert_packed, samples=samples)
        return self._insert(prefix, decode_state, data_RC, insert, "packed", data_RC.shape[1])

    def _insert(
        self, prefix: Prefix, state: DecodeState, requests: Any, insert: Callable, *shapes: Any
    ) -> DecodeState:
        cache, layers = self._decoding.cache, state.layers
        state = state._replace(layers=())
        prompts = [cache.prompts_of(layer) for layer in layers]
        program = self._program(
            "insert",
            len(state.active_B),
            jax.tree.structure(prompts[0]),
            tuple(x.shape for x in jax.tree.leaves(prompts[0])),
            prefix.capacity,
            *shapes,
            make=lambda: insert_program(self._decoding, insert, state, prompts),
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

    def generate(
        self, params: Any, decode_state: DecodeState, steps: int = 1, enough: int | None = None
    ) -> tuple[DecodeState, Sampled]:
        """Draw up to `steps` tokens in every slot in one dispatch; the state is consumed.

        A dispatch ends early when no slot is active, or when `enough` sequences ended in it.
        """
        program = self._program(
            "generate",
            self.num_samples,
            len(decode_state.active_B),
            sizes_of(decode_state),
            steps,
            make=lambda: jax.jit(
                self._with_decoder(decode.decode_steps, steps=steps, decoding=self._decoding),
                donate_argnums=1,
                out_shardings=(state_shardings(self.mesh, decode_state), replicated(self.mesh)),
            ),
        )
        enough = self._slots if enough is None else enough
        sets, constant = (self._vocab, self.stop_ids, self._banned_ids), self.programs.constant
        return program(
            params,
            decode_state,
            constant(("enough", enough), lambda: np.int32(enough)),
            constant(("token sets", *sets), lambda: decode.token_sets(*sets)),
        )

    # Logprobs of given tokens

    def suffix_logprobs(
        self,
        params: Any,
        decode_state: DecodeState,
        slot_rows: Int[np.ndarray, "rows"],
        trace_length_rows: Int[np.ndarray, "rows"],
        tokens_rows_A: Int[np.ndarray, "rows A"],
    ) -> Float[Array, "rows A-1"]:
        """log pi(token i + 1 | prompt, trace, tokens <= i), in nats, float32, at temperature 1.

        Row r continues the first `trace_length_rows[r]` tokens of slot `slot_rows[r]`, whose keys
        and values are read from the cache (Eq. 3's c_i for the tokens t_end y*). The state does not
        change. Padding belongs at the end of a row.
        """
        program = self._program(
            "suffix_logprobs",
            self.num_samples,
            len(decode_state.active_B),
            sizes_of(decode_state),
            tokens_rows_A.shape,
            make=lambda: jax.jit(
                self._with_decoder(score.suffix_logprobs, decoding=self._decoding),
                out_shardings=replicated(self.mesh),
            ),
        )
        return program(params, decode_state, slot_rows, trace_length_rows, tokens_rows_A)

    def prompt_logprobs(
        self, params: Any, tokens: np.ndarray, top: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """log pi(token i + 1 | tokens <= i), and the `top` most probable tokens at its position.

        For n tokens: logprobs [n - 1] in nats, ids [n - 1, top], their logprobs [n - 1, top].
        """
        tokens_S = padded(tokens)
        program = self._program(
            "prompt_logprobs",
            len(tokens_S),
            top,
            make=lambda: jax.jit(
                self._with_decoder(score.prompt_logprobs, top=top),
                out_shardings=replicated(self.mesh),
            ),
        )
        logprobs = jax.tree.map(np.asarray, program(params, tokens_S, len(tokens)))
        return tuple(x[: len(tokens) - 1] for x in logprobs)

    # State

    def init_decode_state(self, sizes: Sizes | None = None) -> DecodeState:
        """An empty state of these sizes; without them, of the largest."""
        sizes = self.largest_sizes if sizes is None else sizes
        a, B, decoding = self._architecture, self._slots, self._decoding

        def empty() -> DecodeState:
            layers = tuple(
                decoding.cache.empty(sizes, B, a.num_key_value_heads, a.head_dim, self._cache_dtype)
                for _ in range(a.num_hidden_layers)
            )
            return empty_state(layers, B, decoding.num_samples, self._vocab)

        shapes = self.num_samples, sizes
        return self._program("init", *shapes, make=lambda: init_program(self.mesh, empty))()

    def resize(self, decode_state: DecodeState, sizes: Sizes) -> DecodeState:
        """The same sequences in caches of other sizes; what does not fit is cut off.

        The state passed in is consumed.
        """
        if sizes == sizes_of(decode_state):
            return decode_state
        program = self._program(
            "resize",
            self.num_samples,
            len(decode_state.active_B),
            sizes_of(decode_state),
            sizes,
            make=lambda: resize_program(self.mesh, self._decoding.cache, decode_state, sizes),
        )
        return program(decode_state)

    def move_slots(self, decode_state: DecodeState, moves: SlotMoves) -> DecodeState:
        """The same sequences in other slots and prompt slots; the state passed in is consumed."""
        program = self._program(
            "move_slots",
            self.num_samples,
            len(decode_state.active_B),
            sizes_of(decode_state),
            len(moves.from_B),
            len(moves.from_P),
            make=lambda: move_program(self.mesh, self._decoding.cache, decode_state, moves),
        )
        return program(decode_state, moves)

    # Sizes and settings

    @property
    def largest_sizes(self) -> Sizes:
        """A prompt slot for every slot, for the longest prompt, and max_new_tokens after it."""
        prompt_tokens = self._longest_prompt if self.one_size else self.max_prefill_length
        return Sizes(self._slots, prompt_tokens, bucket(self.max_new_tokens))

    @property
    def smallest_own_tokens(self) -> int:
        """Capacity of a slot for tokens of its own at first."""
        most = self.largest_sizes.own_tokens
        return most if self.one_size else min(SMALLEST_OWN_TOKENS, most)

    def prompt_capacity(self, length: int) -> int:
        """Tokens that a prompt of `length` tokens is padded to."""
        if self.one_size and length <= self._longest_prompt:
            return self._longest_prompt
        return bucket(length)

    @property
    def max_concurrent_decodes(self) -> int:
        """Number of slots."""
        return self._slots

    @property
    def shards(self) -> int:
        """Groups of neighbouring slots; a prompt is shared within one."""
        return self._decoding.shards

    @property
    def num_samples(self) -> int:
        """Most slots that share one prompt slot."""
        return self._decoding.num_samples
