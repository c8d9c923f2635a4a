"""Logprobs of given tokens: answers after traces, and whole prompts.

Pure functions, which the engine compiles. Letters: those of decode_state.py; A tokens of a suffix.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrt_jax.engine.decode import Decoding
from nrt_jax.engine.decode_state import DecodeState, sizes_of
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder

CHUNK_TOKENS = 1024


@jax.named_scope("scoring")
def suffix_logprobs(
    decoder: Decoder,
    state: DecodeState,
    slot_rows: Int[Array, "rows"],
    trace_length_rows: Int[Array, "rows"],
    tokens_rows_A: Int[Array, "rows A"],
    decoding: Decoding,
) -> Float[Array, "rows A-1"]:
    """log pi(token i + 1 | prompt, the slot's first tokens, tokens <= i), from the slot's cache."""
    cache, slot_map = decoding.cache, state.slot_map
    layers = [cache.read(layer, slot_map, slot_rows) for layer in state.layers]
    positions, valid = cache.read_positions(slot_map, sizes_of(state), slot_rows, trace_length_rows)
    prefix = KVPrefix(
        jnp.stack([k for k, _ in layers]).astype(decoding.dtype),
        jnp.stack([v for _, v in layers]).astype(decoding.dtype),
        positions,
        valid.astype(jnp.int32),
    )
    prompt_rows = slot_map.prompt_of_slots(decoding.shards)[slot_rows]
    start_rows = slot_map.prompt_length_P[prompt_rows] + trace_length_rows
    positions_BT = start_rows[:, None] + jnp.arange(tokens_rows_A.shape[1] - 1)[None]
    hidden_BTD, _ = decoder.hidden(
        tokens_rows_A[:, :-1], positions_BT, jnp.ones_like(positions_BT), prefix
    )
    return decoder.token_logprobs(hidden_BTD, tokens_rows_A[:, 1:], CHUNK_TOKENS).logprob_BT


@jax.named_scope("scoring")
def prompt_logprobs(
    decoder: Decoder, tokens_S: Int[Array, "S"], length: Int[Array, ""], top: int
) -> tuple[Float[Array, "S"], Int[Array, "S top"], Float[Array, "S top"]]:
    """log pi(token i + 1 | tokens <= i), and ids and logprobs of the `top` most probable tokens."""
    positions_1S = jnp.arange(tokens_S.shape[0])[None]
    segments_1S = (positions_1S < length).astype(jnp.int32)
    hidden_1SD, _ = decoder.hidden(tokens_S[None], positions_1S, segments_1S)

    def at_position(hidden_D: Array, target: Array) -> tuple[Array, Array, Array]:
        log_pi_V = jax.nn.log_softmax(decoder.logits(hidden_D))
        top_logprobs, top_ids = jax.lax.top_k(log_pi_V, top)
        return log_pi_V[target], top_ids.astype(jnp.int32), top_logprobs

    rows = (hidden_1SD[0], jnp.roll(tokens_S, -1))
    return jax.lax.map(
        lambda row: at_position(*row), rows, batch_size=min(CHUNK_TOKENS, tokens_S.shape[0])
    )
