"""Small engines, and the distribution they must sample from, computed the long way round."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from scipy.stats import chisquare

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.models.sharding import make_mesh
from nrt_jax.types import Trace
from tests.models.tiny import LLAMA, architecture, decoder

LLAMA_64 = architecture(**LLAMA, vocab_size=64)
THREE_TOKENS = architecture(vocab_size=3)
STOPS = frozenset({7, 30, 60})
NO_STOPS: frozenset[int] = frozenset()
SETTINGS = [(1.0, 1.0), (0.7, 1.0), (1.0, 0.9), (0.7, 0.9)]
"""(temperature, top_p)"""

_forward = nnx.jit(lambda model, tokens: model(tokens))


def one_device() -> Mesh:
    return make_mesh(MeshConfig(), jax.devices()[:1])


def params(a: Architecture = LLAMA_64, **options: Any) -> Any:
    return nnx.split(decoder(a, **options))[1]


@cache
def engine(
    a: Architecture = LLAMA_64,
    slots: int = 4,
    *,
    num_samples: int = 4,
    max_new_tokens: int = 12,
    mesh: Mesh | None = None,
    stop_ids: frozenset[int] = STOPS,
    dtype: Any = jnp.float32,
    **options: Any,
) -> Engine:
    """Takes prompts of up to 32 tokens; shared by all tests."""
    return Engine(
        nnx.split(decoder(a, dtype=dtype))[0],
        a,
        mesh or one_device(),
        slots=slots,
        max_prompt_tokens=20,
        max_new_tokens=max_new_tokens,
        stop_ids=stop_ids,
        dtype=dtype,
        num_samples=num_samples,
        **options,
    )


def sample(
    engine: Engine,
    weights: Any,
    requests: Sequence[Request],
    *,
    seed: int = 0,
    steps: int = 5,
    **sampling: Any,
) -> list[tuple[Trace, ...]]:
    if sampling:
        requests = [request._replace(sampling=Sampling(**sampling)) for request in requests]
    return generate(engine, weights, requests, jax.random.key(seed), steps=steps)


def prompt(length: int, vocab_size: int = 64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, vocab_size, length).astype(np.int32)


def prompts(*lengths: int, vocab_size: int = 64) -> list[np.ndarray]:
    return [prompt(length, vocab_size, seed) for seed, length in enumerate(lengths)]


MIXED = [
    Request(tokens, stream=10 + index, num_samples=num_samples, max_tokens=limit)
    for index, (tokens, num_samples, limit) in enumerate(
        zip(prompts(3, 20, 16, 17, 1), [3, 1, 5, 2, 2], [12, 7, 12, 1, 9], strict=True)
    )
]
"""Prompts of both buckets, with samples and limits of their own; 13 sequences."""


def ids(trace: Trace) -> list[int]:
    """Everything that was drawn, the token that ended it included."""
    return trace.tokens.tolist() + ([] if trace.end_token is None else [trace.end_token])


def logprobs(trace: Trace) -> np.ndarray:
    """Logprobs of `ids`."""
    ended = trace.end_token is not None
    return np.append(trace.logprobs, [trace.end_logprob] if ended else [])


def nucleus(logits_V: np.ndarray, temperature: float, top_p: float) -> np.ndarray:
    """Probabilities: temper, truncate, renormalise, one token at a time in float64."""
    weights = np.exp(np.asarray(logits_V, np.float64) / temperature)
    p_V = weights / weights.sum()
    kept, total = [], 0.0
    for token in sorted(range(len(p_V)), key=lambda token: -p_V[token]):
        if total >= top_p:
            break
        kept.append(token)
        total += p_V[token]
    result = np.zeros_like(p_V)
    result[kept] = p_V[kept] / total
    return result


def logits_after(
    a: Architecture, prompt: np.ndarray, tokens: Sequence[int], **options: Any
) -> np.ndarray:
    """Logits before each of `tokens`, from one forward over the whole sequence."""
    whole = np.concatenate([prompt, tokens]).astype(np.int32)
    padded = np.zeros(-(-len(whole) // 48) * 48, np.int32)
    padded[: len(whole)] = whole
    logits = np.asarray(_forward(decoder(a, **options), jnp.asarray(padded)[None]))[0]
    return logits[len(prompt) - 1 : len(whole) - 1]


def expected_logprobs(
    a: Architecture, prompt: np.ndarray, trace: Trace, temperature: float = 1.0, top_p: float = 1.0
) -> np.ndarray:
    drawn = ids(trace)
    rows = logits_after(a, prompt, drawn)
    pairs = zip(rows, drawn, strict=True)
    return np.asarray([np.log(nucleus(row, temperature, top_p)[token]) for row, token in pairs])


def greedy(
    a: Architecture, prompt: np.ndarray, limit: int, stop_ids: frozenset[int]
) -> tuple[list[int], int | None]:
    """The most probable continuation and the stop token that ended it, one forward a token."""
    tokens: list[int] = []
    while len(tokens) < limit:
        token = int(logits_after(a, prompt, [*tokens, 0])[-1].argmax())
        if token in stop_ids:
            return tokens, token
        tokens.append(token)
    return tokens, None


def assert_same(left: Sequence[Sequence[Trace]], right: Sequence[Sequence[Trace]]) -> None:
    """The same tokens; logprobs up to the rounding of differently shaped programs."""
    for left_group, right_group in zip(left, right, strict=True):
        for one, other in zip(left_group, right_group, strict=True):
            assert ids(one) == ids(other)
            np.testing.assert_allclose(logprobs(one), logprobs(other), atol=1e-5)


def assert_distributed(counts: np.ndarray, probabilities: np.ndarray) -> None:
    """Chi-square: what cannot happen did not, the rest as often as it should."""
    possible = probabilities > 0
    assert counts[~possible].sum() == 0
    expected = probabilities[possible] / probabilities[possible].sum() * counts.sum()
    assert possible.sum() == 1 or chisquare(counts[possible], expected).pvalue > 1e-3
