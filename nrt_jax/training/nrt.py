"""Native Reasoning Training: examples, traces, one jitted step, new weights (Algorithm 1)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from nrt_jax.rollout.engine import DecoderEngine
from nrt_jax.training.batch import TrainBatch
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.nrt_loss import nrt_loss
from nrt_jax.training.rollouts import make_batch, rollout_engine, rollout_metrics, sample_groups
from nrt_jax.training.run import Ahead, Run, mean_over_updates
from nrt_jax.training.scoring import make_scorer
from nrt_jax.training.step import make_update


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
            batch = make_batch(run, groups)
        with run.timer("update"):
            run.state, updates = step_functions.run_mini_batches(run, batch)
            metrics = _step_metrics(updates, mini_batches_kept(run, batch))
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
        batch = make_batch(run, groups)
        with run.timer("update"):
            # The weights of the next rollouts: the update consumes the training's.
            run.engine_weights()
            run.state, updates = step_functions.run_mini_batches(run, batch)
        last = step == run.config.train.steps
        run.ahead = None if last else _sample_ahead(run, engine, step + 1)
        with run.timer("update"):
            metrics = _step_metrics(updates, mini_batches_kept(run, batch))
        run.finish_step(metrics | rollout_metrics(run, engine, groups, step))


def _sample_ahead(run: Run, engine: DecoderEngine, step: int) -> Ahead:
    with run.timer("data"):
        position, examples = run.batches.get_state(), next(run.batches)
    with run.timer("generate"):
        return Ahead(position, sample_groups(run, engine, run.engine_weights(), examples, step))


@dataclass(frozen=True)
class StepFunctions:
    """The jitted functions of a step."""

    update: Any
    score: Any

    def run_mini_batches(self, run: Run, batch: TrainBatch) -> tuple[Any, list[dict[str, Any]]]:
        """Score what the sampling policy must judge, then one update a mini-batch."""
        train, state = run.config.train, run.state
        minis = [
            run.to_device(jax.tree.map(lambda x, rows=rows: x[rows], batch))
            for rows in _slices(train.batch_prompts, train.mini_batch_prompts)
        ]
        scored = [self.score(state.params, mini) for mini in minis]
        updates = []
        for mini, scores in zip(minis, scored, strict=True):
            state, metrics = self.update(state, (mini, scores))
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
        config.model.log_prob_chunk_tokens,
    )
    train, drops = config.train, config.rollout.drop_groups_without_spread
    micro_count = train.mini_batch_prompts // train.micro_batch_prompts
    sequences = train.mini_batch_prompts * config.rollout.traces_per_prompt

    def loss_fn(params: Any, batch: Any) -> Any:
        return nrt_loss(params, *batch, sequences=sequences, settings=settings)

    return StepFunctions(
        update=make_update(
            loss_fn,
            run.optimizer,
            micro_count,
            run.shardings,
            wanted=(lambda batch: any_kept(batch[0])) if drops else None,
        ),
        score=make_scorer(
            settings,
            micro_count,
            several_updates=train.batch_prompts > train.mini_batch_prompts,
            reference=run.reference_params,
            wanted=any_kept if drops else None,
        ),
    )


def any_kept(batch: TrainBatch) -> Bool[Array, ""]:
    """Whether a micro-batch has a group that the loss is of."""
    assert batch.kept_P is not None, "make_batch says which groups are kept"
    return jnp.any(batch.kept_P)


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def mini_batches_kept(run: Run, batch: TrainBatch) -> list[bool]:
    """Which mini-batches have a group that the loss is of."""
    train = run.config.train
    slices = _slices(train.batch_prompts, train.mini_batch_prompts)
    return [batch.kept_P is None or bool(batch.kept_P[rows].any()) for rows in slices]


def _step_metrics(updates: list[dict[str, Any]], kept: list[bool]) -> dict[str, float]:
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
