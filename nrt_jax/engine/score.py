"""Logprobs of tokens that nobody sampled: answers after traces, and prompts themselves.

Pure functions, which the engine compiles. Letters: those of decode_state.py; R rows that are
scored, S tokens before each, A tokens of a row, W = A - 1 of them with a token before.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from nrt_jax.engine.decode import Decoding
from nrt_jax.engine.decode_state import DecodeState, sizes_of
from nrt_jax.models.attention import KVPrefix
from nrt_jax.models.decoder import Decoder

CHUNK_TOKENS = 1024


def score_suffixes(
    decoder: Decoder,
    state: DecodeState,
    slot_R: Int[Array, "R"],
    trace_length_R: Int[Array, "R"],
    tokens_RA: Int[Array, "R A"],
    decoding: Decoding,
) -> Float[Array, "R W"]:
    """log pi(token i + 1 | prompt, the slot's first tokens, tokens <= i), from the slot's cache."""
    cache, places = decoding.cache, state.places
    layers = [cache.read(layer, places, slot_R) for layer in state.layers]
    positions_RS, valid_RS = cache.read_positions(places, sizes_of(state), slot_R, trace_length_R)
    prefix = KVPrefix(
        jnp.stack([k for k, _ in layers]).astype(decoding.dtype),
        jnp.stack([v for _, v in layers]).astype(decoding.dtype),
        positions_RS,
        valid_RS.astype(jnp.int32),
    )
    prompt_R = places.prompt_of_slots(decoding.shards)[slot_R]
    end_R1 = (places.prompt_length_N[prompt_R] + trace_length_R)[:, None]
    positions_RW = end_R1 + jnp.arange(tokens_RA.shape[1] - 1)[None]
    hidden_RWD, _ = decoder.hidden(
        tokens_RA[:, :-1], positions_RW, jnp.ones_like(positions_RW), prefix
    )
    return decoder.scores(hidden_RWD, tokens_RA[:, 1:], CHUNK_TOKENS).logprob_BT


def score_prompt(
    decoder: Decoder, tokens_S: Int[Array, "S"], length: Int[Array, ""], top: int
) -> tuple[Float[Array, "S"], Int[Array, "S R"], Float[Array, "S R"]]:
    """log pi(token i + 1 | tokens <= i), and the `top` most probable tokens with theirs."""
    positions_1S = jnp.arange(tokens_S.shape[0])[None]
    segments_1S = (positions_1S < length).astype(jnp.int32)
    hidden_1SD, _ = decoder.hidden(tokens_S[None], positions_1S, segments_1S)

    def score(hidden_D: Array, target: Array) -> tuple[Array, Array, Array]:
        log_pi_V = jax.nn.log_softmax(decoder.logits(hidden_D))
        top_R, id_R = jax.lax.top_k(log_pi_V, top)
        return log_pi_V[target], id_R.astype(jnp.int32), top_R

    rows = (hidden_1SD[0], jnp.roll(tokens_S, -1))
    return jax.lax.map(
        lambda row: score(*row), rows, batch_size=min(CHUNK_TOKENS, tokens_S.shape[0])
    )
