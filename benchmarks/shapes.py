"""Models of the sizes that the benchmarks take, and their traces started side by side.

Letters: P prompts, S prompt tokens, K traces that share a prompt slot.
"""

from typing import Any

import jax
import numpy as np

from nrt_jax.config.architecture import Architecture
from nrt_jax.engine.decode_state import DecodeState, SlotRequests, bucket, padded, slot_sampling
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.engine.sampling import Sampling

PEER = Architecture(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=1024,
    num_hidden_layers=6,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=32,
)
"""That of the comparison with other systems."""
LLAMA_1B = Architecture(
    vocab_size=128256,
    hidden_size=2048,
    intermediate_size=8192,
    num_hidden_layers=16,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=64,
    tie_word_embeddings=True,
)
"""That of Llama-3.2-1B."""


def start_traces(
    engine: Engine, params: Any, tokens_PS: np.ndarray, traces: int, sampling: Sampling
) -> DecodeState:
    """All slots after their prompts, `traces` of each, in full prompt slots.

    The traces of prompt 0 have the first slots. Each may get the engine's `max_new_tokens`.
    """
    (P, S), K = tokens_PS.shape, engine.num_samples
    assert traces % K == 0, "prompt slots are full"
    prompt_slots = traces // K
    state = engine.init_decode_state(
        Sizes(P * prompt_slots, bucket(S), bucket(engine.max_new_tokens))
    )
    for p, tokens_S in enumerate(tokens_PS):
        prefix = engine.prefill(params=params, padded_tokens=padded(tokens_S), true_length=S)
        for prompt_slot in range(p * prompt_slots, (p + 1) * prompt_slots):
            requests = SlotRequests(
                slot_K=prompt_slot * K + np.arange(K, dtype=np.int32),
                row_K=np.arange(K, dtype=np.int32),
                prompt=prompt_slot,
                key_K=jax.random.split(jax.random.key(prompt_slot), K),
                limit_K=np.full(K, engine.max_new_tokens, np.int32),
                sampling=slot_sampling([sampling] * K),
            )
            state = engine.insert(prefix, state, requests)
    return state
