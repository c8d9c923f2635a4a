"""A model of a few numbers whose traces can all be listed, with its gradients worked out by hand.

A trace is a walk over two symbols that t_end ends, or the limit of three tokens. The next token
depends on the one before; the answer's tokens depend on how often each symbol occurs in the trace.

Letters: B traces, T tokens, N tokens of the answer, V vocabulary (two symbols and t_end).
"""

from itertools import product
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

V, LIMIT, N, ANSWER_V = 3, 3, 4, 3
END, START = 2, 3
ANSWER = np.array([0, 2, 1, 0])


class Params(NamedTuple):
    transition: jax.Array
    """[V + 1, V] logits of the next token; the last row follows t_start."""
    answer: jax.Array
    """[N, 3, ANSWER_V] logits of each answer token per feature: counts of 0 and 1, constant."""


class Traces(NamedTuple):
    tokens_BT: np.ndarray
    previous_BT: np.ndarray
    mask_BT: np.ndarray
    features_BF: np.ndarray


def random_params(seed):
    rng = np.random.default_rng(seed)
    return Params(
        jnp.array(rng.normal(size=(V + 1, V))), jnp.array(0.7 * rng.normal(size=(N, 3, ANSWER_V)))
    )


def all_traces(limit=LIMIT):
    """Every trace that the model can emit, t_end included where it was emitted."""
    rows = []
    for length in range(limit + 1):
        for symbols in product(range(END), repeat=length):
            rows.append(list(symbols) + ([END] if length < limit else []))
    tokens = np.array([row + [0] * (limit - len(row)) for row in rows])
    mask = np.array([[t < len(row) for t in range(limit)] for row in rows])
    previous = np.concatenate([np.full((len(rows), 1), START), tokens[:, :-1]], axis=1)
    features = np.array([[row.count(0), row.count(1), 1] for row in rows], float)
    return Traces(tokens, previous, mask, features)


def trace_logprobs(params, traces):
    """log pi of each token of each trace, [B, T]."""
    log_pi = jax.nn.log_softmax(params.transition, axis=-1)
    return log_pi[traces.previous_BT, traces.tokens_BT]


def answer_logprobs(params, features_BF):
    """log c of each answer token after each trace, [B, N]."""
    logits_BNV = jnp.einsum("bf,nfv->bnv", features_BF, params.answer)
    return jax.nn.log_softmax(logits_BNV, axis=-1)[:, np.arange(N), ANSWER]


def trace_logprob_gradient(params, tokens, previous, mask):
    """Gradient of log pi(z | x) by hand: one-hot minus probabilities, for each token kept."""
    gradient = np.zeros(params.transition.shape)
    for token, before, keep in zip(tokens, previous, mask, strict=True):
        if keep:
            logits = np.asarray(params.transition)[before]
            gradient[before] -= np.exp(logits) / np.exp(logits).sum()
            gradient[before, token] += 1
    return gradient


def answer_logprob_gradient(params, features, n):
    """Gradient of log c_n by hand, for one trace with these features."""
    weights = np.asarray(params.answer)
    gradient = np.zeros(weights.shape)
    logits = features @ weights[n]
    error = -np.exp(logits) / np.exp(logits).sum()
    error[ANSWER[n]] += 1
    gradient[n] = np.outer(features, error)
    return gradient
