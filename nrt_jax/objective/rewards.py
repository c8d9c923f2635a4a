"""From confidences in the answer to rewards, advantages and token signals.

Letters: P prompts, K traces a prompt, B = P * K sequences, A answer tokens.
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
    """Rewards of the traces, and what follows from them; all constants to the gradient."""

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
    P, K, A = log_c_PKA.shape
    log_c_base_BA = jnp.repeat(log_c_base_PA, K, axis=0)
    mask_BA = jnp.repeat(mask_PA, K, axis=0)
    how = {"ws_normalisation": objective.ws_normalisation, "weight_cap": objective.weight_cap}
    reward_B, signal_BA = aggregate(
        objective.scheme, log_c_PKA.reshape(P * K, A), log_c_base_BA, mask_BA, **how
    )
    baseline_P, _ = aggregate(objective.scheme, log_c_base_PA, log_c_base_PA, mask_PA, **how)
    reward_PK = reward_B.reshape(P, K)
    if objective.token_signal == "fixed":
        signal_BA = mask_BA.astype(jnp.float32)
    advantage_PK = advantages(reward_PK, baseline_P, estimator=objective.estimator)
    rewards = Rewards(reward_PK, baseline_P, advantage_PK, signal_BA.reshape(P, K, A))
    return jax.lax.stop_gradient(rewards)


class GroupRewards(NamedTuple):
    """R of each trace and of the empty one, under the weights that drew them."""

    reward_PK: Float[np.ndarray, "P K"]
    baseline_P: Float[np.ndarray, " P"]


def score_rewards(scores: Sequence[SuffixLogprobs], objective: ObjectiveConfig) -> GroupRewards:
    """The rewards of groups from logprobs of y* that an engine read off its cache."""
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
    """Round up to one of four lengths an octave, 8 at least: few shapes, under 25 % of padding."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
