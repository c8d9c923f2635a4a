"""The one check of a decoder against transformers: logits, probabilities, gradients."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from scipy.special import log_softmax

from nrt_jax.checkpoints.hf_config import read_architecture
from tests.models.references import Reference
from tests.models.tiny import read

LOGITS, NATS, GRADIENTS = 1e-4, 1e-6, 1e-4


class Errors(NamedTuple):
    """How far the probabilities of a decoder are from a reference."""

    logits: float
    """Largest difference of a logit."""
    kl: float
    """Largest KL(reference || decoder) of a position, in nats, computed in float64."""


@partial(jax.jit, static_argnums=0)
def _logits(definition: nnx.GraphDef, params: dict, ids: jax.Array) -> jax.Array:
    return nnx.merge(definition, nnx.State(params))(ids)


@partial(jax.jit, static_argnums=0)
def _gradients(definition: nnx.GraphDef, params: dict, ids: jax.Array) -> dict:
    """Of the mean log-likelihood of `ids`."""

    def log_likelihood(params: dict) -> jax.Array:
        log_pi = jax.nn.log_softmax(nnx.merge(definition, nnx.State(params))(ids[:, :-1]))
        return jnp.mean(jnp.take_along_axis(log_pi, ids[:, 1:, None], axis=-1))

    return jax.grad(log_likelihood)(params)


def kl_divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || decoder) at each position, in nats and float64."""
    log_p = log_softmax(np.asarray(reference, np.float64), axis=-1)
    log_q = log_softmax(np.asarray(logits, np.float64), axis=-1)
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def compare_logits(logits: Any, reference: np.ndarray) -> Errors:
    """The largest errors of `logits_BTV`."""
    kl = kl_divergence(reference, logits)
    return Errors(float(np.abs(logits - reference).max()), float(kl.max()))


def compare_gradients(gradients: dict, expected: dict) -> dict[str, float]:
    """The largest error in the gradient of each weight, in units of the largest value in it."""
    actual = dict(jax.tree_util.tree_leaves_with_path(jax.device_get(gradients)))
    return {
        jax.tree_util.keystr(path): float(np.abs(actual[path] - leaf).max() / np.abs(leaf).max())
        for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(expected))
    }


def measure(
    definition: nnx.GraphDef, params: dict, reference: Reference
) -> tuple[Errors, dict[str, float]]:
    """Errors of a decoder on the ids of the reference, in value and gradient."""
    ids = jnp.asarray(reference.ids)
    expected = read(reference.gradients, read_architecture(reference.directory))
    return (
        compare_logits(_logits(definition, params, ids), reference.logits),
        compare_gradients(_gradients(definition, params, ids), expected),
    )


def assert_close_logits(logits: Any, reference: np.ndarray) -> None:
    """Logits to 1e-4, KL to 1e-6 nats at every position."""
    errors = compare_logits(logits, reference)
    assert errors.logits <= LOGITS, f"logits: off by {errors.logits}"
    assert errors.kl <= NATS, f"KL: off by {errors.kl} nats"


def assert_parity(definition: nnx.GraphDef, params: dict, reference: Reference) -> None:
    """Logits and the gradient of every weight to 1e-4, KL to 1e-6 nats at every position."""
    ids = jnp.asarray(reference.ids)
    assert_close_logits(_logits(definition, params, ids), reference.logits)
    expected = read(reference.gradients, read_architecture(reference.directory))
    gradients = _gradients(definition, params, ids)
    for name, error in compare_gradients(gradients, expected).items():
        assert error <= GRADIENTS, f"gradient of {name}: off by {error} of its largest value"
    assert jax.tree.structure(gradients) == jax.tree.structure(expected)
