"""Native Reasoning Training: examples, traces, one jitted step, new weights (Algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from nrt_jax.engine.engine import DecoderEngine
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.packing import Packer, packing_metrics
from nrt_jax.training.rollouts import (
    MiniBatch,
    make_batches,
    rollout_engine,
    rollout_metrics,
    sample_groups,
)
from nrt_jax.training.scoring import Scorer, make_scorer
from nrt_jax.training.setup import Ahead, Run, mean_over_updates
from nrt_jax.training.update import Update


def train_nrt(run: Run) -> None:
    """Take examples, sample K traces each, build the batch, update; the frame logs and saves."""
    engine, step_functions = rollout_engine(run), make_step_functions(run)
    if run.config.rollout.staleness:
        return _train_one_ahead(run, engine, step_functions)
    for step in run.steps():
        with run.timer("data"):
            examples = next(run.batches)
        with run.timer("generate"):
            groups = sample_groups(run, engine, run.engine_weights(), examples, step)
            batches = make_batches(run, groups)
        with run.timer("update"):
            run.state, updates = step_functions.run_mini_batches(run, batches)
            metrics = _step_metrics(updates, batches, run.packer)
        run.finish_step(metrics | rollout_metrics(run, engine, groups, step))


def _train_one_ahead(run: Run, engine: DecoderEngine, step_functions: "StepFunctions") -> None:
    """The same, but the next step's rollouts are driven while this step's update runs.

    jax dispatches the update and returns at once. The rollouts follow it on the same devices, or
    run beside it on devices of their own; its metrics are read when they are done.
    """
    for step in run.steps():
        # Of this step: the first, or one that follows what was the run's last.
        run.ahead = run.ahead or _sample_ahead(run, engine, step)
        groups = run.ahead.groups
        batches = make_batches(run, groups)
        with run.timer("update"):
            # The weights of the next rollouts: the update consumes the training's.
            run.engine_weights()
            run.state, updates = step_functions.run_mini_batches(run, batches)
        last = step == run.config.train.steps
        run.ahead = None if last else _sample_ahead(run, engine, step + 1)
        with run.timer("update"):
            metrics = _step_metrics(updates, batches, run.packer)
        run.finish_step(metrics | rollout_metrics(run, engine, groups, step))


def _sample_ahead(run: Run, engine: DecoderEngine, step: int) -> Ahead:
    with run.timer("data"):
        position, examples = run.batches.get_state(), next(run.batches)
    with run.timer("generate"):
        return Ahead(position, sample_groups(run, engine, run.engine_weights(), examples, step))


@dataclass(frozen=True)
class StepFunctions:
    """The jitted functions of a step."""

    update: Update
    score: Scorer

    def run_mini_batches(
        self, run: Run, batches: Sequence[MiniBatch]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Score what the sampling policy must judge, then one update a mini-batch."""
        state = run.state
        minis = [[run.to_device(micro) for micro in mini.micro_batches] for mini in batches]
        scored = [[self.score(state.params, micro) for micro in mini] for mini in minis]
        updates = []
        for mini, scores in zip(minis, scored, strict=True):
            state, metrics = self.update(state, list(zip(mini, scores, strict=True)))
            updates.append(metrics)
        return state, updates


def make_step_functions(run: Run) -> StepFunctions:
    """Compile-ready update and scoring for the run's sizes."""
    config = run.config
    settings = NrtSettings(
        run.model.definition,
        config.objective,
        run.tokenizer.think_start_id,
        run.tokenizer.think_end_id,
        config.rollout.temperature,
        config.model.logprob_chunk_tokens,
    )
    train = config.train
    sequences = train.mini_batch_prompts * config.rollout.traces_per_prompt

    def loss_fn(params: Any, batch: Any) -> Any:
        return nrt_loss(params, *batch, sequences=sequences, settings=settings)

    return StepFunctions(
        update=Update(loss_fn, run.optimizer, run.shardings, run.memory.add_program),
        score=make_scorer(
            settings,
            several_updates=train.batch_prompts > train.mini_batch_prompts,
            reference=run.reference_params,
        ),
    )


def _step_metrics(
    updates: list[dict[str, Any]], batches: Sequence[MiniBatch], packer: Packer
) -> dict[str, float]:
    """Those of the updates, and how well the groups filled their rows."""
    plans = [plan for mini in batches for plan in mini.plans]
    return _mean_metrics(updates, [mini.kept for mini in batches]) | packing_metrics(plans, packer)


def _mean_metrics(updates: list[dict[str, Any]], kept: list[bool]) -> dict[str, float]:
    """Means over the updates; the mismatch is that of the first, before the weights moved.

    An update without any group has a loss and a gradient of 0, and nothing to say of the policy.
    """
    metrics = mean_over_updates(updates)
    telling = [update for update, any_group in zip(updates, kept, strict=True) if any_group]
    telling = telling or updates
    policy, first = mean_over_updates(telling), mean_over_updates(telling[:1])
    of_all = ("loss/", "update/")
    metrics |= {name: policy[name] for name in policy if not name.startswith(of_all)}
    return metrics | {name: first[name] for name in first if name.startswith("mismatch/")}
