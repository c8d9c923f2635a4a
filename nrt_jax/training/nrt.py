"""Native Reasoning Training: examples, traces, one jitted step, new weights (Algorithm 1)."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax

from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.config.run import RunConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.engine.generate import Generate
from nrt_jax.stop import StopRequest
from nrt_jax.training.batch import NrtBatch
from nrt_jax.training.forward import loss_settings
from nrt_jax.training.frozen_logprobs import FrozenLogprobsFn, frozen_logprobs_fn
from nrt_jax.training.loss import ALL_TERMS, TermWeights, nrt_loss, terms_of
from nrt_jax.training.packing import Packer, packing_metrics
from nrt_jax.training.progress import Prefetched
from nrt_jax.training.rollout_rows import log_rollouts
from nrt_jax.training.rollouts import MiniBatch, Sampler, make_batches, rollout_metrics
from nrt_jax.training.run_health import CollapseWatch, check_health, look_for_collapse
from nrt_jax.training.same_tokens import check_same_groups
from nrt_jax.training.setup import Policy, Run
from nrt_jax.training.steps import finish_step, mean_over_updates, steps
from nrt_jax.training.update import Update
from nrt_jax.training.warmup import warm_up
from nrt_jax.training.warmup_optimizer import SCHEDULED

log = logging.getLogger(__name__)


def train_nrt(run: Run, stop: StopRequest, generate: Generate) -> None:
    """Take examples, sample K traces of each, build the batch, update; log, evaluate and save.

    With `rollout.staleness` the groups of the next step are sampled while the update runs, with the
    weights from before it. jax dispatches an update and returns at once, so the rollouts follow it
    on the same devices, or run beside it on devices of their own; its metrics are read afterwards.
    """
    config, progress, timer = run.config, run.progress, run.logger.timer
    assert run.engines.traces is not None, "nrt samples traces"
    sampler = Sampler(config, run.policy.tokenizer, run.engines.traces, generate)
    watch = CollapseWatch.of_run(config.run_dir)
    functions = make_step_functions(config, run.policy, run.memory.add_program)
    warned = False
    warm_up(run, stop)
    for step in steps(run, stop):
        # Prefetched in the step before or restored with the checkpoint, otherwise sampled now.
        groups = (progress.prefetched or _sample(run, sampler, step)).groups
        with timer("batch"):
            check_same_groups(f"step {step}", groups)
            batches = make_batches(groups, run.data.packer, config, run.policy.tokenizer)
        with timer("update"):
            # The update consumes the weights; the engines take theirs before it.
            weights_metrics = run.engines.weights(progress).metrics
            if not config.rollout.staleness:
                run.engines.release_weights()
            minis = [run.policy.to_device(mini.micro_batches) for mini in batches]
        health = check_health(
            run,
            step,
            groups,
            partial(functions.gradient_shares, progress.state.params, minis[0][0]),
        )
        with timer("update"):
            progress.state, updates, of_traces = functions.run_mini_batches(progress.state, minis)
        prefetches = config.rollout.staleness > 0 and step < config.train.steps
        progress.prefetched = _sample(run, sampler, step + 1) if prefetches else None
        with timer("update"):
            metrics = _step_metrics(updates, batches, run.data.packer)
        metrics |= rollout_metrics(sampler, groups, step) | health
        if config.logging.rollouts:
            log_rollouts(run, step, groups, batches, of_traces)
        warned = warned or _warn_of_zero_signals(step, metrics, config.objective.scheme)
        finish_step(run, metrics | dict(weights_metrics))
        look_for_collapse(run, watch, metrics)


def _sample(run: Run, sampler: Sampler, step: int) -> Prefetched:
    """Take the examples of a step, and sample their traces with the newest weights."""
    batches, timer = run.data.batches, run.logger.timer
    with timer("data"):
        position, examples = batches.get_state(), next(batches)
    with timer("generate"):
        weights = run.engines.weights(run.progress)
        return Prefetched(position, sampler.sample(weights, examples, step))


@dataclass(frozen=True)
class StepFunctions:
    """The jitted functions of a step."""

    update: Update
    frozen_logprobs: FrozenLogprobsFn
    terms: Sequence[str]
    """Names of the terms of the loss."""

    def run_mini_batches(
        self, state: TrainState, minis: Sequence[Sequence[NrtBatch]]
    ) -> tuple[TrainState, list[dict[str, Any]], list[list[Any]]]:
        """Compute the frozen logprobs of all mini-batches, then make one update per mini-batch.

        Gives the metrics of each update, and the values of traces of each of its micro-batches.
        """
        frozen = [[self.frozen_logprobs(state.params, micro) for micro in mini] for mini in minis]
        updates, of_traces = [], []
        for mini, logprobs in zip(minis, frozen, strict=True):
            micro_batches = [
                (micro, of_micro, ALL_TERMS) for micro, of_micro in zip(mini, logprobs, strict=True)
            ]
            state, metrics, of_mini = self.update.with_traces(state, micro_batches)
            updates.append(metrics)
            of_traces.append(of_mini)
        return state, updates, of_traces

    def gradient_shares(self, params: Any, micro: NrtBatch) -> dict[str, float]:
        """Norm of each term's gradient over the sum of these norms, on one micro-batch.

        It costs a forward and a backward pass per term. All are 0 where no term has a gradient.
        """
        frozen = self.frozen_logprobs(params, micro)
        norms = {
            name: float(self.update.gradient_norm(params, (micro, frozen, TermWeights.only(name))))
            for name in self.terms
        }
        total = sum(norms.values()) or 1.0
        return {f"gradient/{name}_share": norm / total for name, norm in norms.items()}


def make_step_functions(
    config: RunConfig,
    policy: Policy,
    on_compiled: Callable[[str, jax.stages.Compiled], None] | None = None,
) -> StepFunctions:
    """Update and frozen logprobs for the sizes of the run, compiled at their first call."""
    settings = loss_settings(config, policy.model, policy.tokenizer)
    train = config.train
    sequences = train.mini_batch_prompts * config.rollout.traces_per_prompt

    def loss_fn(params: Any, batch: Any) -> Any:
        return nrt_loss(params, *batch, sequences=sequences, settings=settings)

    return StepFunctions(
        update=Update(
            loss_fn,
            policy.update_rule,
            on_compiled,
            rates=SCHEDULED if config.warmup.updates else None,
        ),
        frozen_logprobs=frozen_logprobs_fn(
            settings,
            several_updates=train.batch_prompts > train.mini_batch_prompts,
            reference=policy.reference_params,
        ),
        terms=terms_of(config.objective),
    )


def _warn_of_zero_signals(step: int, metrics: Mapping[str, float], scheme: str) -> bool:
    """Warn, and return True, where token signals of 0 keep answers from being trained."""
    share = metrics["reward/zero_signal_share"]
    # Weights leave out tokens that the empty trace, or every trace, is sure of, as they should.
    weighs = SCHEMES[scheme].weighted or SCHEMES[scheme].spread
    if share == 0 or (weighs and share < 1):
        return False
    log.warning(
        "step %d: the token signal of %.3g %% of the answer tokens is 0 in float32, so the loss "
        "does not train them (objective.scheme=%s; reward/zero_signal_share); set "
        "objective.token_signal=fixed, or choose another scheme",
        step,
        100 * share,
        scheme,
    )
    return True


def _step_metrics(
    updates: list[dict[str, Any]], batches: Sequence[MiniBatch], packer: Packer
) -> dict[str, float]:
    """Metrics of the updates, and how well the groups fill their rows."""
    plans = [plan for mini in batches for plan in mini.plans]
    return _mean_metrics(updates, [mini.kept for mini in batches]) | packing_metrics(plans, packer)


def _mean_metrics(updates: list[dict[str, Any]], kept: list[bool]) -> dict[str, float]:
    """Means over the updates; `mismatch/` of the first, before the weights changed.

    An update without any group has a loss and a gradient of 0. It counts in their means, and in
    no other.
    """
    metrics = mean_over_updates(updates)
    with_groups = [update for update, any_group in zip(updates, kept, strict=True) if any_group]
    with_groups = with_groups or updates
    policy, first = mean_over_updates(with_groups), mean_over_updates(with_groups[:1])
    of_all = ("loss/", "update/")
    metrics |= {name: policy[name] for name in policy if not name.startswith(of_all)}
    return metrics | {name: first[name] for name in first if name.startswith("mismatch/")}
