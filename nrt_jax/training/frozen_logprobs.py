"""Logprobs that stay fixed during the updates of a step, computed before the first of them.

They are those of the weights before the first update, which are the sampling policy's unless the
rollout is stale, and of the reference policy. With one mini-batch per step and the default
objective there are none to compute: the update's own forward pass is the sampling policy's.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx
from jaxtyping import Array, Float

from nrt_jax.models.decoder import Decoder
from nrt_jax.training.batch import NrtBatch, answer_values
from nrt_jax.training.forward import (
    NrtSettings,
    baseline_logprobs,
    group_logprobs,
)


class FrozenLogprobs(NamedTuple):
    """Constants of the loss of one micro-batch; None where the objective does not need them."""

    log_c_base_PA: Float[Array, "P A"] | None = None
    log_c_PKA: Float[Array, "P K A"] | None = None
    old_PKT: Float[Array, "P K T"] | None = None
    reference_PKT: Float[Array, "P K T"] | None = None
    """Under the weights before the first step, for the KL term."""


FrozenLogprobsFn = Callable[[Any, NrtBatch], FrozenLogprobs]


def frozen_logprobs_fn(
    settings: NrtSettings, *, several_updates: bool, reference: Any | None
) -> FrozenLogprobsFn:
    """A function of (weights, micro-batch) that computes what the objective needs.

    c_base, when several updates share a rollout or the reward is the sampling policy's; c of every
    trace for `reward_policy: sampling`; log pi of z for `old_logprobs: recompute`; and log pi of z
    under the `reference` weights for a KL term. Where the weights are newer than those that drew
    the traces (`settings.stale`), c_base and c are those that the engine scored.
    """
    objective, stale = settings.objective, settings.stale
    of_sampling = objective.reward_policy == "sampling"
    wants_c = of_sampling and not stale
    wants_old = objective.old_logprobs == "recompute"
    wants_base = wants_c or (several_updates and not stale)

    @jax.jit
    @jax.named_scope("scoring")
    def under_sampling_policy(params: Any, batch: NrtBatch) -> FrozenLogprobs:
        decoder: Decoder = nnx.merge(settings.definition, params)
        if not (wants_c or wants_old):
            return FrozenLogprobs(baseline_logprobs(decoder, settings, batch))
        scored = group_logprobs(decoder, settings, batch, baselines=wants_base)
        return FrozenLogprobs(
            log_c_base_PA=scored.log_c_base_PA,
            log_c_PKA=answer_values(scored.logprob_PKT, batch.groups) if wants_c else None,
            old_PKT=scored.logprob_PKT if wants_old else None,
        )

    @jax.jit
    @jax.named_scope("scoring")
    def under_reference(params: Any, batch: NrtBatch) -> Float[Array, "P K T"]:
        decoder: Decoder = nnx.merge(settings.definition, params)
        return group_logprobs(decoder, settings, batch, baselines=False).logprob_PKT

    def frozen_logprobs(params: Any, batch: NrtBatch) -> FrozenLogprobs:
        frozen = FrozenLogprobs()
        if wants_base or wants_old:
            frozen = under_sampling_policy(params, batch)
        if stale:
            assert batch.scored is not None, "stale groups are scored when they are sampled"
            frozen = frozen._replace(
                log_c_base_PA=batch.scored.log_c_base_PA,
                log_c_PKA=batch.scored.log_c_PKA if of_sampling else None,
            )
        if reference is not None:
            frozen = frozen._replace(reference_PKT=under_reference(reference, batch))
        return frozen

    return frozen_logprobs
