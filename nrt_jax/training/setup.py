"""The frame around both loops: open everything, count steps, log, evaluate, save, stop cleanly."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from nrt_jax.checkpoints import run_dir
from nrt_jax.checkpoints.run_model import (
    Model,
    engine_model,
    init_params,
    load_tokenizer,
    open_model,
)
from nrt_jax.checkpoints.saved_groups import pack_groups, unpack_groups
from nrt_jax.checkpoints.store import Checkpoints, Restored
from nrt_jax.checkpoints.train_state import TrainState, abstract_state, init_state, state_shardings
from nrt_jax.config.run import RunConfig
from nrt_jax.data.pipeline import BatchIterator, Dataset, load_dataset
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.make import trace_stop_ids
from nrt_jax.engine.weight_sync import EngineWeights, WeightTransfer
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.evaluation.held_out import Answerer, evaluate, make_answerer
from nrt_jax.models.sharding import batch_sharding
from nrt_jax.stop import StopRequest
from nrt_jax.training.logger import MetricsWriter, PhaseTimer
from nrt_jax.training.memory import DeviceMemory
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Layout, Lengths, Packer, equal_keys
from nrt_jax.types import Group

log = logging.getLogger(__name__)

SAMPLING_STREAM, EVALUATION_STREAM = 0, 1


class Ahead(NamedTuple):
    """Rollouts of the step after the one under way."""

    data: dict[str, Any]
    """Position of the data before their examples were taken."""
    groups: list[Group]


@dataclass
class Run:
    """One run: what is fixed, what the loop changes, and the files it writes."""

    config: RunConfig
    tokenizer: Tokenizer
    dataset: Dataset
    batches: BatchIterator
    model: Model
    engine_model: Model
    """The same model on the mesh and in the dtype of the rollouts."""
    transfer: WeightTransfer
    optimizer: optax.GradientTransformation
    shardings: TrainState
    state: TrainState
    reference_params: Any | None
    """Weights that a KL term pulls towards: those before the first step; None without one."""
    answerer: Answerer | None
    packer: Packer
    memory: DeviceMemory
    checkpoints: Checkpoints
    metrics: MetricsWriter
    stop: StopRequest
    step: int = 0
    resumed: bool = False
    timer: PhaseTimer = field(default_factory=PhaseTimer)
    measured: dict[str, float] = field(default_factory=dict)
    """The metrics of this step, those of its evaluation among them."""
    ahead: Ahead | None = None
    """The next step's rollouts, where they were sampled during this one."""
    _engine_weights: EngineWeights | None = None

    def sampling_key(self, step: int) -> jax.Array:
        """Key of a step's rollouts: a function of the seed and the step alone."""
        key = jax.random.fold_in(jax.random.key(self.config.seed), SAMPLING_STREAM)
        return jax.random.fold_in(key, step)

    def engine_weights(self) -> EngineWeights:
        """The weights after the last step that is finished, brought to the engines once."""
        if self._engine_weights is None or self._engine_weights.version != self.step:
            # Those before are let go first, so that there are never two copies.
            self._engine_weights = None
            self._engine_weights = self.transfer(self.state.params, self.step)
        return self._engine_weights

    def to_device(self, batch: Any) -> Any:
        """A batch of numpy arrays, split over the mesh by prompts."""
        return jax.device_put(batch, batch_sharding(self.model.mesh))

    def steps(self) -> Iterator[int]:
        """Step numbers that are left, from 1; ends early after SIGTERM, with the state saved."""
        self.stop.wait_for_the_step()
        if not self.resumed and not self.stop.requested:
            self._evaluate()
        while self.step < self.config.train.steps and not self.stop.requested:
            yield self.step + 1
        if self.step:
            self._save()
        if self.step < self.config.train.steps:
            log.info("stopped after step %d; the same command continues the run", self.step)

    def finish_step(self, metrics: dict[str, float]) -> None:
        """Count the step, write its metrics, then evaluate and save where it is due."""
        self.step += 1
        config = self.config
        metrics = metrics | self.timer.take()
        if "speed/tokens" in metrics:
            seconds = sum(value for name, value in metrics.items() if name.startswith("time/"))
            metrics["speed/tokens_per_second"] = metrics.pop("speed/tokens") / seconds
        self.measured = metrics
        self.metrics.write(self.step, metrics)
        self._check_finite(metrics)
        self._check_best_metric(metrics, of_evaluation=False)
        last = self.step == config.train.steps
        if last or self.step % config.evaluation.every_steps == 0:
            self._evaluate()
        if last or self.step % config.checkpoint.every_steps == 0:
            self._save()

    def _check_finite(self, metrics: dict[str, float]) -> None:
        in_row = int(metrics["update/skipped_in_row"])
        if in_row >= self.config.train.max_skipped_updates:
            raise RunFailed(
                f"step {self.step}: {in_row} gradients in a row were not finite, so no update was "
                "made; lower optimizer.learning_rate, or look for the cause in metrics.jsonl"
            )

    def _evaluate(self) -> None:
        if self.answerer is None:
            return
        key = jax.random.fold_in(jax.random.key(self.config.seed), EVALUATION_STREAM)
        with self.timer("evaluate"):
            metrics, samples = evaluate(
                self.answerer,
                self.engine_weights().params,
                self.dataset.eval[: self.config.evaluation.examples],
                key,
                samples=self.config.evaluation.samples,
            )
        self.measured = self.measured | metrics
        self.metrics.write(self.step, metrics | self.timer.take())
        self.metrics.write_samples(self.step, samples)
        self._check_best_metric(metrics, of_evaluation=True)

    def _check_best_metric(self, metrics: Mapping[str, float], *, of_evaluation: bool) -> None:
        name = self.config.checkpoint.best_metric
        if name is None or name.startswith("eval/") != of_evaluation or name in metrics:
            return
        raise InputError(
            f"checkpoint.best_metric={name!r} is no metric of this run; use one of "
            f"{', '.join(sorted(metrics))}"
        )

    def _save(self) -> None:
        # Whatever a checkpoint's step has written is on the disk before the checkpoint is.
        self.metrics.sync()
        progress = {
            "step": self.step,
            "seed": self.config.seed,
            "data": self.batches.get_state(),
            "packing": self.packer.get_state(),
        }
        if self.ahead is not None:
            progress |= {"data": self.ahead.data, "groups": pack_groups(self.ahead.groups)}
        self.checkpoints.save(self.step, self.state, progress, self.measured)


@contextmanager
def open_run(config: RunConfig, stop: StopRequest) -> Iterator[Run]:
    """Everything a loop needs, continued from the newest checkpoint where there is one."""
    tokenizer = load_tokenizer(config)
    model = open_model(config, tokenizer)
    on_engine = engine_model(config, model)
    _check_batch_fits(config, model.mesh, on_engine.mesh)
    dataset = load_dataset(config.data, tokenizer)
    batches = BatchIterator(
        dataset.train,
        config.train.batch_prompts,
        config.data.shuffle,
        # Another seed of the run reads the same data in another order.
        config.data.seed + config.seed,
    )
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    shardings = state_shardings(
        optimizer, model.target, model.mesh, offload=config.optimizer.offload
    )
    wants_reference = config.method == "nrt" and config.objective.kl_coefficient > 0
    # A mistake in names or weights is found before the run directory is made.
    trace_stop_ids(config, tokenizer)
    target = abstract_state(optimizer, model.target, shardings)
    memory, params = DeviceMemory(target), None
    if wants_reference or not run_dir.has_checkpoint(config.run_dir):
        with memory.explained():
            params = init_params(config, model, tokenizer)
    with ExitStack() as opened:
        opened.enter_context(run_dir.locked(config.run_dir))
        run_dir.prepare(config)
        checkpoints = opened.enter_context(
            closing(
                Checkpoints(config.run_dir / run_dir.CHECKPOINTS, config.checkpoint, writable=True)
            )
        )
        restored = _restore(checkpoints, target, batches, config)
        packer = Packer(packing_layout(config, model))
        if restored is not None:
            packer.set_state(restored.progress["packing"])
        step, state = (None, None) if restored is None else (restored.step, restored.state)
        if state is None:
            if params is None:
                params = init_params(config, model, tokenizer)
            # The first update consumes its weights, so the reference needs a copy of its own.
            own = jax.tree.map(jnp.copy, params) if wants_reference else params
            with memory.explained():
                state = init_state(optimizer, own, shardings)
        _report_bad_rows(dataset)
        memory.tell()
        yield Run(
            config,
            tokenizer,
            dataset,
            batches,
            model,
            on_engine,
            WeightTransfer(on_engine.target, outlives_update=config.rollout.staleness > 0),
            optimizer,
            shardings,
            state,
            params if wants_reference else None,
            make_answerer(config, on_engine, tokenizer, dataset),
            packer,
            memory,
            checkpoints,
            opened.enter_context(closing(_open_metrics(config, step))),
            stop,
            step=step or 0,
            resumed=step is not None,
            ahead=None if restored is None else _restore_ahead(restored, batches),
        )


def packing_layout(config: RunConfig, model: Model) -> Layout:
    """What bounds the shapes of the run's batches."""
    train, data, sizes = config.train, config.data, model.mesh.shape
    answer = data.max_answer_tokens
    if config.method == "sft":
        largest = Lengths(0, (data.max_prompt_tokens + answer - 1,), 0)
    else:
        branch = config.rollout.max_response_tokens - 1
        branches = (branch,) * config.rollout.traces_per_prompt
        largest = Lengths(data.max_prompt_tokens, branches, answer + 1)
    return Layout(
        train.micro_batch_prompts,
        shards=sizes["data"] * sizes["fsdp"],
        sequence_shards=sizes["context"],
        equal_keys=equal_keys(model.architecture),
        packing=train.packing,
        most_shapes=train.batch_shapes,
        largest=largest,
    )


def _restore(
    checkpoints: Checkpoints, target: TrainState, batches: BatchIterator, config: RunConfig
) -> Restored | None:
    """The newest checkpoint, and the data where it was then; None without one."""
    restored = checkpoints.restore_newest(target)
    if restored is None:
        return None
    batches.set_state(restored.progress["data"])
    checkpoints.remove_after(restored.step)
    if restored.step >= config.train.steps:
        log.info("%s is complete, with %d steps", config.run_dir, restored.step)
    else:
        log.info("continuing %s from step %d", config.run_dir, restored.step)
    return restored


def _restore_ahead(restored: Restored, batches: BatchIterator) -> Ahead | None:
    """The rollouts that were sampled ahead, with their examples, which are taken once more."""
    progress = restored.progress
    if "groups" not in progress:
        return None
    return Ahead(progress["data"], unpack_groups(progress["groups"], next(batches)))


def _open_metrics(config: RunConfig, step: int | None) -> MetricsWriter:
    """The run's metrics after `step`; None starts over, without the lines of an earlier try."""
    after = -1 if step is None else step
    resolved = config.model_dump(mode="json")
    return MetricsWriter(config.run_dir, config.logging, after, config.train.steps, resolved)


def to_floats(metrics: dict[str, Any]) -> dict[str, float]:
    """Device scalars as Python floats, fetched together."""
    return {name: float(value) for name, value in jax.device_get(metrics).items()}


def mean_over_updates(updates: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics of a step from those of its mini-batches: the mean, or of counts the most."""
    rows = [to_floats(update) for update in updates]
    merged = {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
    merged |= {n: max(row[n] for row in rows) for n in rows[0] if n.endswith("_max")}
    merged["update/skipped"] = rows[-1]["update/skipped"]
    merged["update/skipped_in_row"] = max(row["update/skipped_in_row"] for row in rows)
    return merged


def _check_batch_fits(config: RunConfig, mesh: Mesh, engine_mesh: Mesh) -> None:
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    if config.train.micro_batch_prompts % shards:
        raise InputError(
            f"train.micro_batch_prompts={config.train.micro_batch_prompts} does not divide over "
            f"mesh data*fsdp={shards}; use a multiple of {shards}"
        )
    shards = engine_mesh.shape["data"] * engine_mesh.shape["fsdp"]
    if config.rollout.slots % shards:
        raise InputError(
            f"rollout.slots={config.rollout.slots} does not divide over mesh data*fsdp={shards}; "
            f"use a multiple of {shards}"
        )


def _report_bad_rows(dataset: Dataset) -> None:
    for reason, count in sorted(dataset.bad_rows.items()):
        log.warning("data: %d rows left out: %s", count, reason)
