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
from jaxtyping import Array, Bool, Float, Int

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.objective.advantages import advantages
from nrt_jax.objective.schemes import (
    LogRewardAndSignal,
    aggregate,
    rewards_of,
    spread_over_traces,
)
from nrt_jax.types import SuffixLogprobs


class Rewards(NamedTuple):
    """Rewards, advantages and token signals of the traces; constants to the gradient."""

    log_reward_PK: Float[Array, "P K"]
    """log R, or R itself in a scheme whose R may be negative, as `aggregate` gives it."""
    log_baseline_P: Float[Array, " P"]
    """The same of the empty trace."""
    advantage_PK: Float[Array, "P K"]
    token_signal_PKA: Float[Array, "P K A"]


def compute_rewards(
    log_c_PKA: Float[Array, "P K A"],
    log_c_base_PA: Float[Array, "P A"],
    mask_PA: Bool[Array, "P A"],
    objective: ObjectiveConfig,
) -> Rewards:
    """R, R_base, A and S from the answer's confidences (Eq. 6, 9, 10; Table 1)."""
    spread_PA = spread_over_traces(log_c_PKA, mask_PA)

    def reward_and_signal(log_c_PA: Float[Array, "P A"]) -> LogRewardAndSignal:
        return aggregate(
            objective.scheme,
            log_c_PA,
            log_c_base_PA,
            mask_PA,
            ws_normalisation=objective.ws_normalisation,
            weight_cap=objective.weight_cap,
            spread_BT=spread_PA,
        )

    # The empty trace goes with the others, so that log c equal to its own give the same reward.
    every_PKA = jnp.concatenate([log_c_base_PA[:, None], log_c_PKA], axis=1)
    over_traces = jax.vmap(reward_and_signal, in_axes=1, out_axes=1)
    log_reward_PK, signal_PKA = over_traces(every_PKA)
    log_baseline_P, log_reward_PK = log_reward_PK[:, 0], log_reward_PK[:, 1:]
    signal_PKA = signal_PKA[:, 1:]
    advantage_PK = advantages(
        log_reward_PK,
        log_baseline_P,
        estimator=objective.estimator,
        logs=SCHEMES[objective.scheme].positive,
    )
    if objective.token_signal == "fixed":
        signal_PKA = jnp.broadcast_to(mask_PA[:, None], signal_PKA.shape).astype(jnp.float32)
    return jax.lax.stop_gradient(Rewards(log_reward_PK, log_baseline_P, advantage_PK, signal_PKA))


def of_equal_traces(
    log_c_PKA: Float[Array, "P K A"],
    log_c_base_PA: Float[Array, "P A"],
    source_PK: Int[Array, "P K"],
) -> Float[Array, "P K A"]:
    """log c of the trace that stands for each one: see `reward_sources`."""
    every_PKA = jnp.concatenate([log_c_base_PA[:, None], log_c_PKA], axis=1)
    return jnp.take_along_axis(every_PKA, source_PK[:, :, None], axis=1)


class GroupRewards(NamedTuple):
    """R of each trace and of the empty trace, or their logarithms."""

    reward_PK: Float[np.ndarray, "P K"]
    baseline_P: Float[np.ndarray, " P"]


def score_rewards(scores: Sequence[SuffixLogprobs], objective: ObjectiveConfig) -> GroupRewards:
    """R of groups, from logprobs of y* after each trace and after the empty trace."""
    rewards = score_log_rewards(scores, objective)
    return GroupRewards(*(np.asarray(_rewards_of(objective.scheme, x)) for x in rewards))


def score_log_rewards(scores: Sequence[SuffixLogprobs], objective: ObjectiveConfig) -> GroupRewards:
    """log R of groups, or R itself, as `aggregate` gives it."""
    lengths_P = np.asarray([len(score.empty_A) for score in scores])
    P, K, A = len(scores), len(scores[0].samples_KA), padded_length(int(lengths_P.max()))
    log_c_PKA = np.zeros((P, K, A), np.float32)
    log_c_base_PA = np.zeros((P, A), np.float32)
    for p, score in enumerate(scores):
        log_c_PKA[p, :, : lengths_P[p]] = score.samples_KA
        log_c_base_PA[p, : lengths_P[p]] = score.empty_A
    mask_PA = np.arange(A)[None] < lengths_P[:, None]
    rewards = _compute_rewards(log_c_PKA, log_c_base_PA, mask_PA, objective=objective)
    return GroupRewards(np.asarray(rewards.log_reward_PK), np.asarray(rewards.log_baseline_P))


_rewards_of = partial(jax.jit, static_argnames="scheme")(rewards_of)
_compute_rewards = partial(jax.jit, static_argnames="objective")(compute_rewards)


def padded_length(length: int) -> int:
    """Round up to one of four lengths per octave, at least 8: few shapes, under 25 % of padding."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
