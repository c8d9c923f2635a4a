"""Around the steps of both methods: count them, log, evaluate, save, and stop cleanly."""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from nrt_jax import distributed
from nrt_jax.compilation import WATCH
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.evaluation.held_out import evaluate
from nrt_jax.evaluation.reference_log import ReferenceRow
from nrt_jax.stop import StopRequest
from nrt_jax.training.profile import traced
from nrt_jax.training.progress import save_progress
from nrt_jax.training.reference_scores import score_references
from nrt_jax.training.setup import EVALUATION_STREAM, Run

log = logging.getLogger(__name__)


def steps(run: Run, stop: StopRequest) -> Iterator[int]:
    """Yield the numbers of the remaining steps, from 1, and save after the last of them.

    A new run is evaluated before its first step, unless its warm-up did so; after a stop in the
    warm-up there are no steps. After SIGTERM or Ctrl-C to any process the current step is the last
    of all; before the first step there is nothing to save, and they end the run at once.
    """
    config, progress = run.config, run.progress
    last = config.train.steps
    if progress.step < 0:
        return
    if not progress.step and not config.warmup.updates:
        evaluate_run(run)
    stop.wait_for_the_step()
    while progress.step < last and not distributed.any_of("a stop", stop.requested):
        with traced(config, progress.step + 1):
            yield progress.step + 1
    if progress.step:
        save_run(run)
    if progress.step < last:
        log.info("stopped after step %d; %s", progress.step, _next_time(progress.step))


def _next_time(step: int) -> str:
    if not step:
        return "nothing is saved yet, and the same command starts the run anew"
    return "the same command continues the run"


def finish_step(run: Run, metrics: Mapping[str, float]) -> None:
    """Count the step, write its metrics, then evaluate and save if it is due.

    `speed/tokens`, the tokens of the step, becomes `speed/tokens_per_second`.
    """
    config, progress, logger = run.config, run.progress, run.logger
    progress.step += 1
    # Those of the step are of the weights before its update: no checkpoint is the best by them.
    progress.metrics = {}
    times = logger.timer.take()
    row = {**metrics, **times}
    row["speed/tokens_per_second"] = row.pop("speed/tokens") / sum(times.values())
    row["time/compile_s"] = WATCH.take()
    row |= logger.of_life(sum(times.values()) - row["time/compile_s"])
    row["speed/programs"] = float(WATCH.model_programs)
    row["speed/small_programs"] = float(WATCH.programs - WATCH.model_programs)
    logger.write(progress.step, row)
    _check_finite(progress.step, metrics, config.train.max_skipped_updates)
    last = progress.step == config.train.steps
    if last or progress.step % config.evaluation.every_steps == 0:
        evaluate_run(run)
    if last or progress.step % config.checkpoint.every_steps == 0:
        save_run(run)


def mean_over_updates(updates: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of a step from those of its updates: the mean; of maxima and counts the largest.

    Device scalars are fetched together, which waits for the updates.
    """
    rows = [{name: float(value) for name, value in row.items()} for row in jax.device_get(updates)]
    merged = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    merged |= {n: max(row[n] for row in rows) for n in rows[0] if n.endswith("_max")}
    merged["update/skipped"] = rows[-1]["update/skipped"]
    merged["update/skipped_in_row"] = max(row["update/skipped_in_row"] for row in rows)
    return merged


def evaluate_run(run: Run) -> None:
    """Evaluate the newest weights, and write what came out; nothing where nothing is asked."""
    config, progress, logger = run.config, run.progress, run.logger
    answerer, benchmarks = run.engines.answerer, run.engines.benchmarks
    if answerer is None and benchmarks is None:
        return
    metrics: dict[str, float] = {}
    samples: list[dict[str, Any]] = []
    references: list[ReferenceRow] = []
    with logger.timer("evaluate"):
        params = run.engines.weights(progress).params
        if answerer is not None:
            key = jax.random.fold_in(jax.random.key(config.seed), EVALUATION_STREAM)
            evaluated = evaluate(answerer, params, run.data.held_out, key)
            samples = evaluated.records[: config.evaluation.samples]
            of_references, references = score_references(run, evaluated)
            metrics = evaluated.metrics | of_references
        if benchmarks is not None:
            metrics |= benchmarks.evaluate(params, progress.step)
    progress.metrics = metrics
    logger.write(progress.step, metrics | logger.timer.take() | {"time/compile_s": WATCH.take()})
    logger.write_samples(progress.step, samples)
    logger.write_references(progress.step, references)
    _check_best_metric(config.checkpoint.best_metric, metrics)


def save_run(run: Run) -> None:
    """Save a checkpoint of the last finished step, unless there is one."""
    # The lines of a checkpoint's step must be on the disk before the checkpoint is.
    run.logger.sync()
    save_progress(run.checkpoints, run.progress, run.data.batches, run.data.packer)


def _check_finite(step: int, metrics: Mapping[str, float], most_skipped: int) -> None:
    in_row = int(metrics["update/skipped_in_row"])
    if in_row >= most_skipped:
        raise RunFailed(
            f"step {step}: {in_row} gradients in a row were not finite, so no update was made; "
            "lower optimizer.learning_rate, or look for the cause in metrics.jsonl"
        )


def _check_best_metric(name: str | None, metrics: Mapping[str, float]) -> None:
    if name is None or name in metrics:
        return
    raise InputError(
        f"checkpoint.best_metric={name!r} is no metric of this run's evaluation; use one of "
        f"{', '.join(sorted(metrics))}"
    )
