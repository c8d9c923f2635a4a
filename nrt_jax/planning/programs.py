"""The programs of a run for devices that need not be there: lowered from shapes, never run.

Letters: those of batch.py; R shards of the slots.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from nrt_jax.checkpoints.abstract_model import engine_model_on, training_definition
from nrt_jax.checkpoints.train_state import TrainState, abstract_state, state_shardings
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.run import RunConfig
from nrt_jax.engine.decode_state import state_shardings as slot_shardings
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.engine.make import make_engine
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params, batch_sharding, replicated
from nrt_jax.training.batch import NrtBatch, nrt_batch, sft_batch
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.frozen_logprobs import FrozenLogprobs, frozen_logprobs_fn
from nrt_jax.training.loss import nrt_loss
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Plan, Shape
from nrt_jax.training.sft import sft_loss_of_rows
from nrt_jax.training.update import LossFn, Total, Update, UpdateRule, zero_total
from nrt_jax.types import Example, Group, TokenizedExample, Trace

THINK_START, THINK_END = 2, 3
"""Any two tokens: a program does not depend on which."""

Lower = Callable[[], jax.stages.Lowered]
"""Lowers a program when it is asked for."""


class TrainingPrograms(NamedTuple):
    """A training step on a mesh, in shapes, and its programs not compiled."""

    params: Any
    state: TrainState
    score: Lower | None
    """Logprobs before the updates; None where the objective needs none."""
    add: Lower
    """The gradient of a micro-batch, added to the sum of others."""
    apply: Lower


class EnginePrograms(NamedTuple):
    """An engine, its weights and its state in shapes, and its programs not compiled."""

    engine: Engine
    params: Any
    state: Any
    prefill: Lower
    """Of a prompt, or of the first part of one, in each shard."""
    decode: Lower
    """Of `rollout.decode_steps` steps."""


# --- training ------------------------------------------------------------------------------------


def training_programs(
    config: RunConfig, architecture: Architecture, mesh: Mesh, shape: Shape
) -> TrainingPrograms:
    """Scoring, the gradient of a micro-batch of this shape, and the update."""
    definition = training_definition(config, architecture, mesh)
    decoder = abstract_decoder(
        architecture, vocab_multiple=config.model.vocab_multiple, dtype=config.model.dtype
    )
    params = abstract_params(mesh, decoder, jnp.float32)
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    offload = config.optimizer.offload
    shardings = state_shardings(optimizer, params, mesh, offload=offload)
    state = abstract_state(optimizer, params, shardings)
    make = _sft_step if config.method == "sft" else _nrt_step
    loss_fn, inputs, score = make(config, definition, mesh, shape, params)
    rule = UpdateRule(optimizer, shardings)
    total = _abstract_total(loss_fn, params, inputs, mesh)
    return TrainingPrograms(
        params,
        state,
        score=score,
        add=partial(Update(loss_fn, rule).add.lower, params, total, inputs),
        apply=partial(rule.apply.lower, state, total.gradient),
    )


def _nrt_step(
    config: RunConfig, definition: Any, mesh: Mesh, shape: Shape, params: Any
) -> tuple[LossFn, Any, Lower | None]:
    """The loss, its inputs in shapes, and the scoring before it."""
    settings = NrtSettings(
        definition=definition,
        objective=config.objective,
        think_start=THINK_START,
        think_end=THINK_END,
        temperature=config.rollout.temperature,
        chunk_tokens=config.model.logprob_chunk_tokens,
    )
    sequences = config.train.mini_batch_prompts * config.rollout.traces_per_prompt

    def loss_fn(params: Any, inputs: Any) -> Any:
        return nrt_loss(params, *inputs, sequences=sequences, settings=settings)

    batch = _abstract_batch(shape, config.rollout.traces_per_prompt, mesh)
    several = config.train.mini_batch_prompts < config.train.batch_prompts
    scorer = jax.jit(frozen_logprobs_fn(settings, several_updates=several, reference=None))
    scores = jax.tree.map(
        lambda leaf: leaf.update(sharding=batch_sharding(mesh)),
        jax.eval_shape(scorer, params, batch),
    )
    needed = scores != FrozenLogprobs()
    return loss_fn, (batch, scores), partial(scorer.lower, params, batch) if needed else None


def _sft_step(
    config: RunConfig, definition: Any, mesh: Mesh, shape: Shape, params: Any
) -> tuple[LossFn, Any, None]:
    del params
    batch = _with_sharding(sft_batch([], Plan(shape, packs=[])), mesh)

    def loss_fn(params: Any, inputs: Any) -> Any:
        rows, answer_tokens = inputs
        chunk = config.model.logprob_chunk_tokens
        return sft_loss_of_rows(params, rows, answer_tokens, definition, chunk)

    return loss_fn, (batch, jax.ShapeDtypeStruct((), jnp.float32)), None


def _abstract_batch(shape: Shape, traces: int, mesh: Mesh) -> NrtBatch:
    """A micro-batch of a shape, in shapes."""
    token = np.full(1, THINK_START, np.int32)
    trace = Trace(token, np.zeros(1, np.float32), None, 0.0)
    example = TokenizedExample(Example(0, "", ""), token, token)
    batch = nrt_batch(
        [Group(example, (trace,) * traces)],
        Plan(shape, packs=[]),
        think_start=THINK_START,
        think_end=THINK_END,
    )
    return _with_sharding(batch, mesh)


def _with_sharding(batch: Any, mesh: Mesh) -> Any:
    sharding = batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), batch)


def _abstract_total(loss_fn: LossFn, params: Any, inputs: Any, mesh: Mesh) -> Total:
    """The sums over no micro-batch, in shapes."""
    total = jax.eval_shape(partial(zero_total, loss_fn), params, inputs)
    everywhere = replicated(mesh)
    gradient = jax.tree.map(lambda g, p: g.update(sharding=p.sharding), total.gradient, params)
    metrics = jax.tree.map(lambda metric: metric.update(sharding=everywhere), total.metrics)
    return Total(gradient, metrics)


# --- engine --------------------------------------------------------------------------------------


def engine_programs(config: RunConfig, architecture: Architecture, mesh: Mesh) -> EnginePrograms:
    """Prefill and decoding, with caches for the longest prompts and traces of the config."""
    model = engine_model_on(config, architecture, mesh)
    rollout, longest = config.rollout, config.data.max_prompt_tokens + 1
    engine = make_engine(
        config,
        model,
        slots=rollout.slots,
        longest_prompt=longest,
        new_tokens=rollout.max_trace_tokens,
        stop_ids=frozenset({0}),
        num_samples=rollout.traces_per_prompt,
    )
    # There are no devices to copy them to.
    engine.programs.constant = _not_copied
    prompts = -(-engine.max_concurrent_decodes // engine.num_samples)
    state = _abstract_slots(engine, mesh, engine.largest_sizes._replace(prompts=prompts))
    width = min(engine.max_prefill_length, engine.prefill_chunk or engine.max_prefill_length)
    tokens_RS = jax.ShapeDtypeStruct((engine.shards, width), jnp.int32)
    length_R = jax.ShapeDtypeStruct((engine.shards,), jnp.int32)
    prefill = jax.jit(lambda params, *prompts: engine.prefill_rows(params, None, *prompts))
    decode = jax.jit(engine.generate, static_argnums=(2, 3), donate_argnums=1)
    return EnginePrograms(
        engine,
        model.target,
        state,
        prefill=partial(prefill.lower, model.target, tokens_RS, length_R),
        decode=partial(decode.lower, model.target, state, rollout.decode_steps, engine.num_samples),
    )


def _not_copied(name: Any, make: Callable[[], Any]) -> Any:
    del name
    return make()


def _abstract_slots(engine: Engine, mesh: Mesh, sizes: Sizes) -> Any:
    """A decode state of these sizes, in shapes."""
    shapes = jax.eval_shape(lambda: engine.init_decode_state(sizes))
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        shapes,
        slot_shardings(mesh, shapes),
    )
