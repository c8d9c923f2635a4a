"""Part a of accelerator.py: a small model on the accelerator against float32 on the CPU.

Letters: B rows, T tokens of a row, K samples per prompt.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate_and_score
from nrt_jax.engine.requests import Request
from nrt_jax.errors import InputError
from nrt_jax.models.attention_backend import FUSED, choose_backend
from nrt_jax.models.decoder import Decoder, abstract_decoder
from nrt_jax.models.sharding import make_mesh


class Sizes(NamedTuple):
    """The model, and what it runs."""

    architecture: Architecture
    row_tokens: int
    """Of rows for logits and gradients."""
    prompt_tokens: int
    trace_tokens: int


FULL = Sizes(
    Architecture(
        vocab_size=1024,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        initializer_range=0.05,
    ),
    row_tokens=512,
    prompt_tokens=100,
    trace_tokens=96,
)
TINY = Sizes(
    Architecture(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.05,
    ),
    row_tokens=24,
    prompt_tokens=12,
    trace_tokens=8,
)
ROWS, SAMPLES, SUFFIX_TOKENS, CHUNK_TOKENS = 4, 2, 8, 1024
LARGEST_ERROR = {"float32": 1e-3, "bfloat16": 5e-2}
"""Of logits and gradients: norm of the difference over the norm of the CPU's."""
LARGEST_NATS = {"float32": 1e-3, "bfloat16": 0.1}
"""Of the logprob of one token."""


def measure(sizes: Sizes) -> dict[str, Any]:
    """A row per dtype, implementation and quantity: the error, and the largest that is right."""
    device = jax.devices()[0]
    params = nnx.to_pure_dict(nnx.split(Decoder(sizes.architecture, nnx.Rngs(0)))[1])
    params = jax.tree.map(np.asarray, params)
    rows = [row for dtype in LARGEST_ERROR for row in _of_dtype(sizes, params, device, dtype)]
    return {"rows": rows, "right": all(row.get("right", True) for row in rows)}


def _of_dtype(sizes: Sizes, params: Any, device: Any, dtype: str) -> Iterator[dict[str, Any]]:
    fused = FUSED.get(device.platform)
    # Otherwise a TPU multiplies float32 in bfloat16, and a GPU in TF32.
    exact = jax.default_matmul_precision("highest") if dtype == "float32" else nullcontext()
    with exact:
        for backend in ("xla", *([fused] if fused else [])):
            yield from _training(sizes, params, device, dtype, backend)
        for attention in ("xla", "pallas"):
            yield from _decoding(sizes, params, device, dtype, attention)


def _training(
    sizes: Sizes, params: Any, device: Any, dtype: str, backend: Any
) -> Iterator[dict[str, Any]]:
    row = {"dtype": dtype, "through": backend}
    rng = np.random.default_rng(0)
    shape = (ROWS, sizes.row_tokens + 1)
    tokens_BT = rng.integers(0, sizes.architecture.vocab_size, shape, np.int32)
    try:
        name = choose_backend(backend, device.platform, sizes.architecture, dtype, sizes.row_tokens)
    except InputError as error:
        yield row | {"what": "not supported", "why": str(error)}
        return
    found = _logits_and_gradient(sizes, params, tokens_BT, device, dtype, name)
    expected = _logits_and_gradient(sizes, params, tokens_BT, _cpu(), "float32", "xla")
    for what, one, other in zip(("logits", "gradient"), found, expected, strict=True):
        difference = np.linalg.norm(one - other) / np.linalg.norm(other)
        yield row | _judged(what, difference, LARGEST_ERROR[dtype])


def _logits_and_gradient(
    sizes: Sizes, params: Any, tokens_BT: np.ndarray, device: Any, dtype: str, backend: Any
) -> tuple[np.ndarray, np.ndarray]:
    mesh = make_mesh(MeshConfig(), [device])
    decoder = abstract_decoder(
        sizes.architecture, dtype=jnp.dtype(dtype), attention=backend, mesh=mesh
    )
    definition = nnx.graphdef(decoder)

    def loss(params: Any, tokens_BT: Any) -> Any:
        decoder = nnx.merge(definition, params)
        inputs_BT, targets_BT = tokens_BT[:, :-1], tokens_BT[:, 1:]
        positions_BT = jnp.broadcast_to(jnp.arange(inputs_BT.shape[1])[None], inputs_BT.shape)
        hidden_BTD, _ = decoder.hidden(inputs_BT, positions_BT, jnp.ones_like(inputs_BT))
        scores = decoder.token_logprobs(hidden_BTD, targets_BT, CHUNK_TOKENS)
        return -jnp.mean(scores.logprob_BT), decoder.logits(hidden_BTD)

    arguments = jax.device_put((params, tokens_BT), device)
    gradient, logits = jax.jit(jax.grad(loss, has_aux=True))(*arguments)
    return np.asarray(logits), np.concatenate([np.ravel(x) for x in jax.tree.leaves(gradient)])


def _decoding(
    sizes: Sizes, params: Any, device: Any, dtype: str, attention: Any
) -> Iterator[dict[str, Any]]:
    """Traces by the engine and its scores after them, scored again on the CPU."""
    a, row = sizes.architecture, {"dtype": dtype, "through": f"decoding, {attention}"}
    rng = np.random.default_rng(1)
    draw = partial(rng.integers, 0, a.vocab_size, dtype=np.int32)
    requests = [
        Request(
            draw(size=sizes.prompt_tokens - p),
            p,
            SAMPLES,
            sizes.trace_tokens,
            suffix_tokens=draw(size=SUFFIX_TOKENS),
        )
        for p in range(ROWS)
    ]
    try:
        engine = Engine(
            nnx.graphdef(abstract_decoder(a, dtype=jnp.dtype(dtype))),
            a,
            make_mesh(MeshConfig(), [device]),
            slots=ROWS * SAMPLES,
            max_prompt_tokens=sizes.prompt_tokens,
            max_new_tokens=sizes.trace_tokens,
            stop_ids=frozenset(),
            dtype=jnp.dtype(dtype),
            attention=attention,
            num_samples=SAMPLES,
        )
    except InputError as error:
        yield row | {"what": "not supported", "why": str(error)}
        return
    weights = jax.device_put(jax.tree.map(lambda w: w.astype(dtype), params), device)
    groups, scored = generate_and_score(engine, weights, requests, jax.random.key(0))
    errors = {"traces": [0.0], "scores": [0.0]}
    for request, traces, scores in zip(requests, groups, scored, strict=True):
        suffix = request.suffix_tokens
        assert suffix is not None
        for k, trace in enumerate(traces):
            whole = np.concatenate([request.prompt_tokens, trace.tokens, suffix])
            expected = _logprobs(sizes, params, whole)
            first, end = len(request.prompt_tokens), len(whole) - len(suffix)
            errors["traces"].append(np.abs(expected[first - 1 : end - 1] - trace.logprobs).max())
            errors["scores"].append(np.abs(expected[end:] - scores.samples_KA[k]).max())
    for what, values in errors.items():
        yield row | _judged(what, max(values), LARGEST_NATS[dtype])


def _logprobs(sizes: Sizes, params: Any, tokens_T: np.ndarray) -> np.ndarray:
    """log pi(token i + 1 | tokens <= i), in float32 on the CPU."""
    # One shape for all rows: what follows a token does not change its logprobs.
    longest = sizes.prompt_tokens + sizes.trace_tokens + SUFFIX_TOKENS
    row = np.pad(tokens_T, (0, longest - len(tokens_T)))[None]
    decoder = nnx.merge(nnx.graphdef(abstract_decoder(sizes.architecture)), params)
    with jax.default_device(_cpu()):
        logprobs_TV = jax.nn.log_softmax(decoder(jnp.asarray(row))[0])
    return np.asarray(logprobs_TV)[np.arange(len(tokens_T) - 1), tokens_T[1:]]


def _cpu() -> Any:
    return jax.local_devices(backend="cpu")[0]


def _judged(what: str, error: Any, largest: float) -> dict[str, Any]:
    return {
        "what": what,
        "error": float(error),
        "largest": largest,
        "right": bool(error <= largest),
    }
