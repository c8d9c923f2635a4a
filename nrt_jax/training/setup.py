"""Open everything that a run needs, as small parts of which a loop takes what it uses."""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from nrt_jax import distributed
from nrt_jax.atomic_files import write_atomically
from nrt_jax.checkpoints import run_dir
from nrt_jax.checkpoints.abstract_model import (
    Model,
    abstract_model,
    engine_model,
    load_tokenizer,
)
from nrt_jax.checkpoints.fingerprint import fingerprints
from nrt_jax.checkpoints.inputs import RunInputs, read_inputs
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState, abstract_state, init_state, state_shardings
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.run import RunConfig
from nrt_jax.data.bad_rows import reasons_table, rejected_lines
from nrt_jax.data.batches import BatchIterator
from nrt_jax.data.instruction import find_instruction
from nrt_jax.data.pipeline import Dataset, load_dataset
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.make import trace_engine, trace_stop_ids
from nrt_jax.engine.programs import Programs
from nrt_jax.engine.weight_sync import EngineWeights, WeightTransfer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.held_out import Answerer, evaluation_answerer
from nrt_jax.evaluation.training_suite import TrainingSuite, training_suite
from nrt_jax.models.flops import equal_keys
from nrt_jax.models.sharding import batch_sharding, place
from nrt_jax.training.first_rows import FirstParams, first_params
from nrt_jax.training.logger import MetricsWriter, SilentWriter
from nrt_jax.training.memory import DeviceMemory
from nrt_jax.training.optimizer import make_optimizer, make_schedule
from nrt_jax.training.packing import Layout, Lengths, Packer
from nrt_jax.training.progress import Progress, restore_progress
from nrt_jax.training.trackers import wanted as wanted_trackers
from nrt_jax.training.update import UpdateRule
from nrt_jax.training.warmup_optimizer import warmup_optimizer
from nrt_jax.training.warmup_progress import restore_warmup
from nrt_jax.types import TokenizedExample

log = logging.getLogger(__name__)

SAMPLING_STREAM, EVALUATION_STREAM = 0, 1
"""Folded into the run's seed, so that rollouts and evaluations draw from different keys."""


@dataclass(frozen=True)
class Policy:
    """The model in training, and how it is updated."""

    tokenizer: Tokenizer
    model: Model
    optimizer: optax.GradientTransformation
    shardings: TrainState
    reference_params: Any | None = None
    """Weights before the first step, for a KL term; None without one."""

    @cached_property
    def update_rule(self) -> UpdateRule:
        """What applies a gradient, in the warm-up and after it."""
        return UpdateRule(self.optimizer, self.shardings)

    def to_device(self, batch: Any) -> Any:
        """Shard a batch of NumPy arrays over the mesh by prompts."""
        return place(batch, batch_sharding(self.model.mesh))


@dataclass(frozen=True)
class Data:
    """Examples to train on, examples to evaluate on, and what packs a batch."""

    batches: BatchIterator
    held_out: Sequence[TokenizedExample]
    packer: Packer


@dataclass
class Engines:
    """What samples traces and answers, and the weights that it samples with."""

    traces: Engine | None
    """None for sft, which samples none."""
    answerer: Answerer | None
    """None when no held-out examples are evaluated."""
    benchmarks: TrainingSuite | None
    """None when none are asked."""
    transfer: WeightTransfer
    _weights: EngineWeights | None = field(default=None, init=False)

    def weights(self, progress: Progress) -> EngineWeights:
        """The weights after the last finished step, transferred once per step."""
        if self._weights is None or self._weights.version != progress.step:
            # Release the previous weights first, so that there are never two copies.
            self._weights = None
            self._weights = self.transfer(progress.state.params, progress.step)
        return self._weights

    def release_weights(self) -> None:
        """Free the weights, whose copies would take memory while an update runs."""
        self._weights = None


@dataclass(frozen=True)
class Run:
    """The parts of an open run."""

    config: RunConfig
    policy: Policy
    data: Data
    engines: Engines
    progress: Progress
    checkpoints: Checkpoints
    logger: MetricsWriter | SilentWriter
    memory: DeviceMemory


@dataclass
class _Prepared:
    """What is read and built before anything is written."""

    dataset: Dataset
    inputs: RunInputs
    policy: Policy
    data: Data
    engines: Engines
    memory: DeviceMemory
    target: TrainState
    read_first: Callable[[], FirstParams]
    """Read or make the weights before the first update."""
    first: FirstParams
    """These weights where they are needed already, or none."""


@contextmanager
def setup(config: RunConfig, allow_changed: Collection[str] = ()) -> Iterator[Run]:
    """Open a run, continued from its newest checkpoint if there is one.

    Mistakes in names, data and weights are found before the run directory is made. A run continues
    over other inputs than those that it was trained on only where `allow_changed` names them.
    """
    wanted_trackers(config.logging)
    run_dir.check_alike(config)
    made = _prepare(config)
    with ExitStack() as opened:
        opened.enter_context(run_dir.locked(config.run_dir))
        distributed.log_to(config.run_dir)
        run_dir.check_config(config)
        checkpoints = opened.enter_context(closing(_open_checkpoints(config)))
        progress = restore_progress(
            checkpoints,
            made.target,
            made.data.batches,
            made.data.packer,
            made.inputs,
            allow_changed,
        ) or restore_warmup(config, made.target, made.inputs, allow_changed)
        if progress is None:
            made.first = made.read_first() if made.first.params is None else made.first
            progress = _first_progress(config, made)
            # Even the evaluation that an earlier try wrote is dropped.
            kept_up_to = progress.step - 1
        else:
            _log_continued(config, progress.step)
            kept_up_to = progress.step
        run_dir.describe(config, progress.inputs, made.first.new_rows)
        report_bad_rows(config, made.dataset)
        made.memory.log_parts()
        logger: MetricsWriter | SilentWriter = SilentWriter()
        if distributed.is_first():
            logger = opened.enter_context(_open_logger(config, kept_up_to))
        distributed.wait_for_all("the run is open")
        yield Run(
            config=config,
            policy=made.policy,
            data=made.data,
            engines=made.engines,
            progress=progress,
            checkpoints=checkpoints,
            logger=logger,
            memory=made.memory,
        )


def _prepare(config: RunConfig) -> _Prepared:
    """Read data, tokenizer and model, and build what trains and samples."""
    tokenizer = load_tokenizer(config)
    model = abstract_model(config, tokenizer)
    on_engines = engine_model(config, model)
    _check_batch_fits(config, model.mesh, on_engines.mesh)
    dataset = load_dataset(config.data, tokenizer)
    inputs = read_inputs(config, tokenizer, dataset.eval)
    inputs.check_alike()
    data = Data(
        batches=training_batches(config, dataset.train),
        held_out=dataset.eval[: config.evaluation.examples],
        packer=Packer(packing_layout(config, model)),
    )
    optimizer = _run_optimizer(config, tokenizer)
    offload = config.optimizer.offload
    shardings = state_shardings(optimizer, model.target, model.mesh, offload=offload)
    target = abstract_state(optimizer, model.target, shardings)
    memory = DeviceMemory(target)
    trace_stop_ids(config, tokenizer)
    if config.warmup.updates:
        find_instruction(config.warmup.instruction, config.data, tokenizer)
    engines = _make_engines(config, on_engines, tokenizer, dataset)
    if on_engines.mesh is not model.mesh:
        log.info("rollouts: mesh %s", dict(on_engines.mesh.shape))
    traces = None if engines.traces is None else (on_engines, engines.traces)

    def read_first() -> FirstParams:
        recorded = run_dir.recorded_new_rows(config.run_dir)
        recorded = distributed.from_first("the rows of new think tokens", recorded)
        with memory.explained():
            return first_params(config, tokenizer, model, traces, dataset.train, recorded)

    # A run that goes on needs its checkpoint alone, except for a KL term.
    saved = distributed.from_first("a checkpoint", run_dir.has_checkpoint(config.run_dir))
    goes_on = saved and not has_kl_term(config)
    first = FirstParams() if goes_on else read_first()
    return _Prepared(
        dataset=dataset,
        inputs=_with_weights(config, inputs, first.params),
        policy=Policy(
            tokenizer=tokenizer,
            model=model,
            optimizer=optimizer,
            shardings=shardings,
            reference_params=first.params if has_kl_term(config) else None,
        ),
        data=data,
        engines=engines,
        memory=memory,
        target=target,
        read_first=read_first,
        first=first,
    )


def _run_optimizer(config: RunConfig, tokenizer: Tokenizer) -> optax.GradientTransformation:
    """The optimizer of all updates of the run; states have the same structure with a warm-up."""
    updates = config.train.updates
    if not config.warmup.updates:
        return make_optimizer(config.optimizer, updates)
    tokens = tokenizer.think_start_id, tokenizer.think_end_id
    return warmup_optimizer(config.optimizer, make_schedule(config.optimizer, updates), tokens)


def training_batches(config: RunConfig, examples: Sequence[TokenizedExample]) -> BatchIterator:
    """Batches of prompts; another seed of the run reads the same data in another order."""
    seed = config.data.seed + config.seed
    data, prompts = config.data, config.train.batch_prompts
    return BatchIterator(examples, prompts, data.shuffle, seed, read_threads=data.read_threads)


def packing_layout(config: RunConfig, model: Model) -> Layout:
    """What bounds the shapes of the run's batches."""
    return layout_on(config, model.architecture, model.mesh.shape)


def layout_on(config: RunConfig, architecture: Architecture, sizes: Mapping[str, int]) -> Layout:
    """The same on a mesh of these sizes."""
    train, data = config.train, config.data
    answer = data.max_answer_tokens
    if config.method == "sft":
        largest = Lengths(0, (data.max_prompt_tokens + answer - 1,), 0)
    else:
        completion = config.rollout.max_response_tokens - 1
        completions = (completion,) * config.rollout.traces_per_prompt
        largest = Lengths(data.max_prompt_tokens, completions, answer + 1)
    return Layout(
        train.micro_batch_prompts,
        shards=sizes["data"] * sizes["fsdp"],
        sequence_shards=sizes["context"],
        equal_keys=equal_keys(architecture),
        packing=train.packing,
        most_shapes=train.batch_shapes,
        largest=largest,
    )


def has_kl_term(config: RunConfig) -> bool:
    """Whether the run keeps the weights from before its first step as a reference."""
    return config.method == "nrt" and config.objective.kl_coefficient > 0


def _with_weights(config: RunConfig, inputs: RunInputs, params: Any | None) -> RunInputs:
    """The digests of what the run reads, also of the weights if every start reads them."""
    if params is None or config.model.path is None or not has_kl_term(config):
        return inputs
    return inputs.with_weights(fingerprints(params))


def _first_progress(config: RunConfig, made: _Prepared) -> Progress:
    """The state before the first update."""
    policy, params = made.policy, made.first.params
    with made.memory.explained():
        if policy.reference_params is not None:
            # The first update consumes its weights, and the reference must outlive it.
            params = jax.tree.map(jnp.copy, params)
        state = init_state(policy.optimizer, params, policy.shardings)
        return Progress(state, made.inputs, step=-config.warmup.updates)


def _make_engines(
    config: RunConfig, model: Model, tokenizer: Tokenizer, dataset: Dataset
) -> Engines:
    # Engines of training, warm-up and evaluation share the programs that fit them.
    programs = Programs(model.mesh)
    answerer = evaluation_answerer(config, model, tokenizer, dataset, programs)
    traces = None
    if config.method == "nrt":
        traces = trace_engine(config, model, tokenizer, programs=programs)
    transfer = WeightTransfer(model.target, outlives_update=config.rollout.staleness > 0)
    benchmarks = training_suite(config, model, tokenizer, programs)
    return Engines(traces=traces, answerer=answerer, benchmarks=benchmarks, transfer=transfer)


def _open_checkpoints(config: RunConfig) -> Checkpoints:
    directory = config.run_dir / run_dir.CHECKPOINTS
    return Checkpoints(directory, config.checkpoint, writable=True)


def _open_logger(config: RunConfig, step: int) -> MetricsWriter:
    """Metrics after `step`."""
    return MetricsWriter(
        config.run_dir,
        config.logging,
        after=step,
        total=config.train.steps,
        resolved=config.model_dump(mode="json"),
    )


def _check_batch_fits(config: RunConfig, mesh: Mesh, engine_mesh: Mesh) -> None:
    for name, size, shape in (
        ("train.micro_batch_prompts", config.train.micro_batch_prompts, mesh.shape),
        ("rollout.slots", config.rollout.slots, engine_mesh.shape),
    ):
        shards = shape["data"] * shape["fsdp"]
        if size % shards:
            raise InputError(
                f"{name}={size} does not divide over mesh data*fsdp={shards}; use a multiple of "
                f"{shards}"
            )


def _log_continued(config: RunConfig, step: int) -> None:
    if step >= config.train.steps:
        log.info("%s is complete, with %d steps", config.run_dir, step)
    elif step < 0:
        done = config.warmup.updates + step
        log.info("continuing %s from update %d of its warm-up", config.run_dir, done)
    else:
        log.info("continuing %s from step %d", config.run_dir, step)


def report_bad_rows(config: RunConfig, dataset: Dataset) -> None:
    """Log the reasons for which rows are left out, and name the rows in the run directory.

    Process 0 writes.
    """
    path = config.run_dir / run_dir.REJECTED_FILE
    if distributed.is_first():
        path.unlink(missing_ok=True)
        if dataset.rejected:
            write_atomically(path, rejected_lines(dataset.rejected))
    if dataset.bad_rows:
        named = f", those that could not be used in {path}" if dataset.rejected else ""
        log.warning("data: %d rows left out%s", sum(dataset.bad_rows.values()), named)
    for line in reasons_table(dataset.bad_rows):
        log.warning("data: %s", line)
