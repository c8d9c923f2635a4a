"""From confidences in the answer to rewards, advantages and token signals.

`compute_rewards` is that of the loss, `score_rewards` the same for logprobs that an engine read off
its cache. Letters: P prompts, K traces per prompt, A answer tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.objective.advantages import advantages
from nrt_jax.objective.schemes import aggregate
from nrt_jax.types import SuffixLogprobs


class Rewards(NamedTuple):
    """Rewards, advantages and token signals of the traces; constants to the gradient."""

    reward_PK: Float[Array, "P K"]
    baseline_P: Float[Array, " P"]
    advantage_PK: Float[Array, "P K"]
    token_signal_PKA: Float[Array, "P K A"]


def compute_rewards(
    log_c_PKA: Float[Array, "P K A"],
    log_c_base_PA: Float[Array, "P A"],
    mask_PA: Bool[Array, "P A"],
    objective: ObjectiveConfig,
) -> Rewards:
    """R, R_base, A and S from the answer's confidences (Eq. 6, 9, 10; Table 1)."""
    reward_and_signal = partial(
        aggregate,
        objective.scheme,
        ws_normalisation=objective.ws_normalisation,
        weight_cap=objective.weight_cap,
    )
    over_traces = jax.vmap(reward_and_signal, in_axes=(1, None, None), out_axes=1)
    reward_PK, signal_PKA = over_traces(log_c_PKA, log_c_base_PA, mask_PA)
    baseline_P, _ = reward_and_signal(log_c_base_PA, log_c_base_PA, mask_PA)
    advantage_PK = advantages(reward_PK, baseline_P, estimator=objective.estimator)
    if objective.token_signal == "fixed":
        signal_PKA = jnp.broadcast_to(mask_PA[:, None], signal_PKA.shape).astype(jnp.float32)
    return jax.lax.stop_gradient(Rewards(reward_PK, baseline_P, advantage_PK, signal_PKA))


class GroupRewards(NamedTuple):
    """R of each trace and of the empty trace, under the weights that drew the traces."""

    reward_PK: Float[np.ndarray, "P K"]
    baseline_P: Float[np.ndarray, " P"]


def score_rewards(scores: Sequence[SuffixLogprobs], objective: ObjectiveConfig) -> GroupRewards:
    """The rewards of groups, from logprobs of y* after each trace and after the empty trace."""
    lengths_P = np.asarray([len(score.empty_A) for score in scores])
    P, K, A = len(scores), len(scores[0].samples_KA), padded_length(int(lengths_P.max()))
    log_c_PKA = np.zeros((P, K, A), np.float32)
    log_c_base_PA = np.zeros((P, A), np.float32)
    for p, score in enumerate(scores):
        log_c_PKA[p, :, : lengths_P[p]] = score.samples_KA
        log_c_base_PA[p, : lengths_P[p]] = score.empty_A
    mask_PA = np.arange(A)[None] < lengths_P[:, None]
    rewards = _compute_rewards(log_c_PKA, log_c_base_PA, mask_PA, objective=objective)
    return GroupRewards(np.asarray(rewards.reward_PK), np.asarray(rewards.baseline_P))


_compute_rewards = partial(jax.jit, static_argnames="objective")(compute_rewards)


def padded_length(length: int) -> int:
    """Round up to one of four lengths per octave, at least 8: few shapes, under 25 % of padding."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
