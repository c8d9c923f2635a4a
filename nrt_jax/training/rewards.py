"""From confidences in the answer to rewards, advantages and token signals.

Letters: P prompts, K traces a prompt, B = P * K sequences, A answer tokens.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from nrt_jax.objective.advantages import advantages
from nrt_jax.objective.aggregation import aggregate
from nrt_jax.objective.config import ObjectiveConfig
from nrt_jax.training.batch import TrainBatch, answer_mask


class Rewards(NamedTuple):
    """Rewards of the traces, and what follows from them; all constants to the gradient."""

    reward_PK: Float[Array, "P K"]
    baseline_P: Float[Array, " P"]
    advantage_PK: Float[Array, "P K"]
    token_signal_PKA: Float[Array, "P K A"]


def compute_rewards(
    log_c_PKA: Float[Array, "P K A"],
    log_c_base_PA: Float[Array, "P A"],
    batch: TrainBatch,
    objective: ObjectiveConfig,
) -> Rewards:
    """R, R_base, A and S from the answer's confidences (Eq. 6, 9, 10; Table 1)."""
    P, K, A = log_c_PKA.shape
    mask_PA = answer_mask(batch)
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
