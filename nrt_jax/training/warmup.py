"""The warm-up: a phase of the run before step 1, in which the model learns to write a trace.

Its W updates are the steps -W + 1 to 0 of the run, so that evaluations, metrics and checkpoints
stand in one order: step -W is the model before any update, and step 0 the one that NRT starts from.
"""

import logging
from collections.abc import Sequence
from contextlib import closing
from itertools import accumulate
from typing import Any, NamedTuple

import jax
import numpy as np

from nrt_jax import distributed
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState, init_state
from nrt_jax.compilation import WATCH
from nrt_jax.config.run import RunConfig
from nrt_jax.config.warmup import AllStage, RowsStage
from nrt_jax.errors import RunFailed
from nrt_jax.stop import StopRequest
from nrt_jax.training.packing import Lengths, Packer, Plan
from nrt_jax.training.same_tokens import check_same_rows
from nrt_jax.training.setup import Policy, Run, packing_layout
from nrt_jax.training.steps import evaluate_run, save_run
from nrt_jax.training.update import Update
from nrt_jax.training.warmup_batch import (
    WarmupRow,
    kind_weights,
    warmup_batch,
    warmup_lengths,
    warmup_loss,
)
from nrt_jax.training.warmup_optimizer import Rates, only_rows
from nrt_jax.training.warmup_progress import (
    open_warmup_checkpoints,
    remove_warmup_checkpoints,
    save_warmup,
)
from nrt_jax.training.warmup_texts import warmup_rows

log = logging.getLogger(__name__)


class PlannedUpdate(NamedTuple):
    """The rows of one update, and how they are packed."""

    rows: list[WarmupRow]
    plans: list[Plan]


def warm_up(run: Run, stop: StopRequest) -> None:
    """Take the updates of the warm-up that are left, then save step 0; nothing where it is over.

    The model is evaluated before the first update and after the last one. After SIGTERM or Ctrl-C
    the current update is saved and is the last; the same command continues.
    """
    progress, total = run.progress, run.config.warmup.updates
    if progress.step >= 0:
        remove_warmup_checkpoints(run.config)
        return
    planned = plan_updates(run.config, run.policy, warmup_rows(run))
    if progress.step == -total:
        evaluate_run(run)
    stop.wait_for_the_step()
    with closing(open_warmup_checkpoints(run.config)) as checkpoints:
        if not _take_updates(run, planned, checkpoints, stop):
            save_warmup(checkpoints, progress, total)
            log.info(
                "stopped after update %d of %d of the warm-up; the same command continues the run",
                total + progress.step,
                total,
            )
            return
    progress.state = fresh_state(run.policy, progress.state)
    evaluate_run(run)
    save_run(run)
    run.checkpoints.wait()
    remove_warmup_checkpoints(run.config)


def _take_updates(
    run: Run, planned: Sequence[PlannedUpdate], checkpoints: Checkpoints, stop: StopRequest
) -> bool:
    """Make the updates that are left, stage by stage; False when a stop was requested."""
    progress, stages, total = run.progress, run.config.warmup.stages, len(planned)
    ends = accumulate(stage.updates for stage in stages)
    for stage, end in zip(stages, ends, strict=True):
        if progress.step >= end - total:
            continue
        update = StageUpdate(run.config, run.policy, stage, run.memory.add_program)
        if progress.step == end - stage.updates - total:
            progress.state = fresh_state(run.policy, progress.state)
        while progress.step < end - total:
            if distributed.any_of("a stop", stop.requested):
                return False
            _finish_update(run, update, planned[total + progress.step])
            due = (total + progress.step) % run.config.checkpoint.every_steps == 0
            if due and progress.step < 0:
                run.logger.sync()
                save_warmup(checkpoints, progress, total)
    return True


def _finish_update(run: Run, update: "StageUpdate", planned: PlannedUpdate) -> None:
    """Make one update, count it, and write its metrics."""
    progress, logger = run.progress, run.logger
    number, rows = run.config.warmup.updates + progress.step + 1, planned.rows
    examples, traces = [row.example for row in rows], [row.trace for row in rows]
    check_same_rows(f"warm-up update {number}", examples, traces)
    with logger.timer("warmup"):
        progress.state, metrics = update(progress.state, planned)
        metrics = {name: float(value) for name, value in jax.device_get(metrics).items()}
    progress.step += 1
    row = {"warmup/update": number} | metrics | row_metrics(planned.rows)
    times, compile_s = logger.timer.take(), WATCH.take()
    row |= times | {"time/compile_s": compile_s}
    logger.write(progress.step, row | logger.of_life(sum(times.values()) - compile_s))
    in_row, most = int(metrics["warmup/skipped_in_row"]), run.config.train.max_skipped_updates
    if in_row >= most:
        raise RunFailed(
            f"warm-up update {number}: {in_row} gradients in a row were not finite, so no update "
            "was made; lower the learning rates of warmup.rows and warmup.all, or look for the "
            "cause in metrics.jsonl"
        )


class StageUpdate:
    """The update of a stage, compiled at its first call."""

    def __init__(
        self,
        config: RunConfig,
        policy: Policy,
        stage: RowsStage | AllStage,
        on_compiled: Any = None,
    ):
        tokenizer = policy.tokenizer
        self._think = {
            "think_start": tokenizer.think_start_id,
            "think_end": tokenizer.think_end_id,
        }
        self._policy, self._weight_of_kind = policy, kind_weights(config.warmup, stage)
        if isinstance(stage, AllStage):
            rates, trained = Rates(stage.rows_learning_rate, stage.learning_rate), lambda p: p
        else:
            rates, trained = Rates(stage.learning_rate, 0.0), only_rows

        def loss_fn(params: Any, batch: Any) -> Any:
            rows, weights, total = batch
            chunk_tokens = config.model.logprob_chunk_tokens
            definition = policy.model.definition
            return warmup_loss(trained(params), rows, weights, total, definition, chunk_tokens)

        self._update = Update(loss_fn, policy.update_rule, on_compiled, rates=rates.as_arrays())

    def __call__(
        self, state: TrainState, planned: PlannedUpdate
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state after the update, which consumes the one before, and its metrics."""
        weights = self._weight_of_kind
        total = np.float32(sum(weights[row.kinds].sum() for row in planned.rows))
        batches = [
            (
                self._policy.to_device(warmup_batch(planned.rows, plan, **self._think)),
                weights,
                total,
            )
            for plan in planned.plans
        ]
        state, metrics = self._update(state, batches)
        del metrics["loss/total"]
        return state, {name.replace("update/", "warmup/"): value for name, value in metrics.items()}


def plan_updates(
    config: RunConfig, policy: Policy, updates: Sequence[list[WarmupRow]]
) -> list[PlannedUpdate]:
    """Pack the rows of every update, in one shape: each is a program per stage."""
    lengths = [[warmup_lengths(row) for row in rows] for rows in updates]
    longest = [max(row.completions[0] for row in rows) for rows in lengths]
    layout = packing_layout(config, policy.model)
    packer = Packer(layout._replace(most_shapes=1, largest=Lengths(0, (max(longest),), 0)))
    plans = map(packer.plan, lengths)
    return [PlannedUpdate(rows, plan) for rows, plan in zip(updates, plans, strict=True)]


def fresh_state(policy: Policy, state: TrainState) -> TrainState:
    """The weights with moments and counters of 0; the state passed in is consumed."""
    params = state.params
    # Free the old moments first, so that there are never two copies.
    jax.tree.map(lambda leaf: leaf.delete(), state.opt_state)
    return init_state(policy.optimizer, params, policy.shardings)


def row_metrics(rows: Sequence[WarmupRow]) -> dict[str, float]:
    """Texts and answers of an update; `answer_tokens` is what SFT would count as seen."""
    traces = [row for row in rows if len(row.trace)]
    count = max(len(traces), 1)
    return {
        "warmup/rows": float(len(rows)),
        "warmup/answer_tokens": float(sum(len(row.example.answer_tokens) for row in rows)),
        "warmup/trace_tokens": sum(len(row.trace) for row in traces) / count,
        "warmup/end_share": sum(row.ended for row in traces) / count,
        "warmup/empty_share": 1 - len(traces) / len(rows),
    }
