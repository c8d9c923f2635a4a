"""What a smaller cache dtype costs in accuracy, on traces that the float32 cache wrote.

    python benchmarks/cache_dtype.py
    python benchmarks/cache_dtype.py --model DIR

Traces are sampled at temperature 1 with a float32 cache. Their tokens are then decoded again, one
at a time, with each dtype of the cache, and the distributions before every token are compared with
those of the float32 cache: |logprob of the trace's token - that with float32| in nats, and the
share of places where the most probable token is the same. Without --model the weights are random,
spread wide enough that the tokens have some 3 nats of entropy.
"""

import argparse
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float
from shapes import PEER, start_traces

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.import_format import read_params
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.decode_state import DecodeState
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.models.decoder import Decoder, abstract_decoder
from nrt_jax.models.sharding import abstract_params, make_mesh

DTYPES = ("float32", "bfloat16", "int8")
RANDOM_MODEL = PEER.model_copy(update={"initializer_range": 0.13})


class Loss(NamedTuple):
    """How far one dtype is from float32."""

    bytes_per_token: int
    """Keys and values of all layers, with the factors of int8."""
    mean_difference: float
    """|logprob difference| of the traces' tokens, nats."""
    largest_difference: float
    greedy_agreement: float
    """Share of places where the most probable token is that with float32."""
    entropy: float
    """Mean over the places, nats."""


def main() -> None:
    """Measure and print a line a dtype."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", type=Path, help="a Hugging Face directory; random without one")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--trace-tokens", type=int, default=128)
    args = parser.parse_args()
    architecture, definition, params = _model(args.model)
    rng = np.random.default_rng(0)
    shape = (args.prompts, args.prompt_tokens)
    tokens_PS = rng.integers(0, architecture.vocab_size, shape, np.int32)
    make = partial(
        Engine,
        definition,
        architecture,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        slots=args.prompts * args.samples,
        max_prompt_tokens=args.prompt_tokens,
        max_new_tokens=args.trace_tokens,
        stop_ids=frozenset(),
        num_samples=args.samples,
        attention="xla",
    )
    engines = {dtype: make(cache_dtype=jnp.dtype(dtype)) for dtype in DTYPES}
    requests = [
        Request(tokens, p, args.samples, args.trace_tokens) for p, tokens in enumerate(tokens_PS)
    ]
    traces = generate(engines["float32"], params, requests, jax.random.key(0))
    tokens_BT = np.stack([trace.tokens for group in traces for trace in group])
    for dtype, loss in measure(engines, params, tokens_PS, tokens_BT).items():
        print(
            f"{dtype:9s} {loss.bytes_per_token:6d} bytes per token  |logprob difference| mean "
            f"{loss.mean_difference:.2e} max {loss.largest_difference:.2e} nats  greedy tokens "
            f"that agree {100 * loss.greedy_agreement:6.2f} %  entropy {loss.entropy:.2f} nats"
        )


def _model(directory: Path | None) -> tuple[Architecture, nnx.GraphDef, Any]:
    if directory is None:
        definition, state = nnx.split(Decoder(RANDOM_MODEL, nnx.Rngs(0)))
        return RANDOM_MODEL, definition, nnx.to_pure_dict(state)
    architecture = read_architecture(directory)
    decoder = abstract_decoder(architecture)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = read_params(directory, abstract_params(mesh, decoder))
    return architecture, nnx.split(decoder)[0], params


def measure(
    engines: dict[str, Engine], params: Any, tokens_PS: np.ndarray, tokens_BT: np.ndarray
) -> dict[str, Loss]:
    """Every engine's loss against the one named float32, on the traces `tokens_BT`.

    Rows of `tokens_BT` are the samples of prompt 0, then those of prompt 1, and so on.
    """
    traces, greedy = len(tokens_BT) // len(tokens_PS), Sampling(temperature=0.0)
    # A greedy slot takes the token that it is given.
    states = {
        name: start_traces(engine, params, tokens_PS, traces, greedy)
        for name, engine in engines.items()
    }
    bytes_per_token = {name: _bytes_per_token(state) for name, state in states.items()}
    differences: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    agreements: dict[str, list[np.ndarray]] = {name: [] for name in engines}
    entropies = []
    for token_B in tokens_BT.T:
        exact = _distribution(states["float32"].logits_BV, token_B)
        entropies.append(exact.entropy_B)
        for name in engines:
            here = _distribution(states[name].logits_BV, token_B)
            differences[name].append(np.abs(here.logprob_B - exact.logprob_B))
            agreements[name].append(np.asarray(here.best_B == exact.best_B))
        for name, engine in engines.items():
            states[name] = _decode(engine, params, states[name], token_B)
    return {
        name: Loss(
            bytes_per_token[name],
            float(np.mean(differences[name])),
            float(np.max(differences[name])),
            float(np.mean(agreements[name])),
            float(np.mean(entropies)),
        )
        for name in engines
    }


class _Distribution(NamedTuple):
    logprob_B: Array
    best_B: Array
    entropy_B: Array


@jax.jit
def _distribution(logits_BV: Float[Array, "B V"], token_B: Array) -> _Distribution:
    log_pi_BV = jax.nn.log_softmax(logits_BV)
    return _Distribution(
        jnp.take_along_axis(log_pi_BV, token_B[:, None], axis=1)[:, 0],
        jnp.argmax(logits_BV, axis=1),
        -jnp.sum(jnp.exp(log_pi_BV) * log_pi_BV, axis=1),
    )


def _decode(engine: Engine, params: Any, state: DecodeState, token_B: np.ndarray) -> DecodeState:
    """Run a given token in every slot."""
    given_BV = jax.nn.one_hot(token_B, state.logits_BV.shape[1])
    state, _ = engine.generate(params, state._replace(logits_BV=given_BV), 1)
    return state


def _bytes_per_token(state: DecodeState) -> int:
    slots, (prompts, prompt_tokens, own_tokens) = len(state.active_B), state.layers[0].sizes
    tokens = prompts * prompt_tokens + slots * own_tokens
    return sum(x.nbytes for x in jax.tree.leaves(state.layers)) // tokens


if __name__ == "__main__":
    main()
