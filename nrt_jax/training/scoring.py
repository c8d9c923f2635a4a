"""What the sampling policy must judge before the first update of a step.

With one mini-batch a step and the default objective nothing has to: the update's own forward pass
sees the sampling policy.
"""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jaxtyping import Array

from nrt_jax.models.decoder import Decoder
from nrt_jax.training.batch import TrainBatch, at_answer
from nrt_jax.training.forward import (
    NrtSettings,
    Prompts,
    SamplingScores,
    run_prompts,
    score_baseline,
    score_branches,
)

Scorer = Callable[[Any, TrainBatch], SamplingScores]


def make_scorer(settings: NrtSettings, *, several_updates: bool, reference: Any | None) -> Scorer:
    """A function of (weights, micro-batch) that scores what the objective asks for.

    c_base once a prompt when several updates share a rollout or the reward is the sampling
    policy's; c of every trace for `reward_policy: sampling`; log pi of z for
    `old_logprobs: recompute`; and log pi of z under the `reference` weights for a KL term.
    """
    objective = settings.objective
    wants_c = objective.reward_policy == "sampling"
    wants_old = objective.old_logprobs == "recompute"
    wants_base = several_updates or wants_c

    def score_traces(decoder: Decoder, prompts: Prompts, batch: TrainBatch) -> Array:
        logprob_BT = score_branches(decoder, settings, prompts, batch).logprob_BT
        return logprob_BT.reshape(batch.groups.sampler_logprob_PKT.shape)

    @jax.jit
    def score_sampling(params: Any, batch: TrainBatch) -> SamplingScores:
        decoder = nnx.merge(settings.definition, params)
        prompts = run_prompts(decoder, batch)
        scores = SamplingScores()
        if wants_base:
            log_c_base_PA = score_baseline(decoder, settings, prompts, batch)
            log_c_base_PA = log_c_base_PA.reshape(batch.groups.answer_PA.shape)
            scores = scores._replace(log_c_base_PA=log_c_base_PA)
        if wants_c or wants_old:
            logprob_PKT = score_traces(decoder, prompts, batch)
            log_c_PKA = jax.vmap(at_answer)(logprob_PKT, batch.groups) if wants_c else None
            old_PKT = logprob_PKT if wants_old else None
            scores = scores._replace(log_c_PKA=log_c_PKA, old_logprob_PKT=old_PKT)
        return scores

    @jax.jit
    def score_reference(params: Any, batch: TrainBatch) -> Array:
        decoder = nnx.merge(settings.definition, params)
        return score_traces(decoder, run_prompts(decoder, batch), batch)

    nothing = not (wants_base or wants_old)

    def score(params: Any, batch: TrainBatch) -> SamplingScores:
        scores = SamplingScores() if nothing else score_sampling(params, batch)
        if reference is None:
            return scores
        return scores._replace(ref_logprob_PKT=score_reference(reference, batch))

    return score
