"""`nrt-jax diagnose`: the diagnosis of a config before it is trained, or of any model."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nrt_jax.checkpoints.abstract_model import (
    Model,
    abstract_model,
    engine_model,
    load_tokenizer,
)
from nrt_jax.checkpoints.open import open_model
from nrt_jax.checkpoints.train_state import state_shardings
from nrt_jax.config.run import RunConfig
from nrt_jax.data.pipeline import Dataset, load_dataset
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.make import trace_engine
from nrt_jax.engine.weight_sync import WeightTransfer
from nrt_jax.errors import InputError
from nrt_jax.evaluation.held_out import check_has_questions
from nrt_jax.training.answer_logprobs import AnswerLogprobs
from nrt_jax.training.first_rows import first_params
from nrt_jax.training.forward import loss_settings
from nrt_jax.training.health import Diagnosis
from nrt_jax.training.nrt import make_step_functions
from nrt_jax.training.optimizer import make_optimizer
from nrt_jax.training.packing import Packer
from nrt_jax.training.rollouts import Sampler, make_batches
from nrt_jax.training.run_health import diagnose
from nrt_jax.training.setup import Policy, has_kl_term, packing_layout, training_batches
from nrt_jax.types import Group, TokenizedExample

log = logging.getLogger(__name__)

ROWS = 32
"""Held-out rows that a model is asked by default."""


def diagnose_config(config: RunConfig, rows: int | None = None) -> Diagnosis:
    """What a run of the config would measure on its first batch, or the same on held-out rows.

    Nothing is written. On held-out rows the gradient is not measured. Raises InputError.
    """
    _check_reasons(config, "this config")
    tokenizer = load_tokenizer(config)
    model = abstract_model(config, tokenizer)
    on_engine = engine_model(config, model)
    dataset = load_dataset(config.data, tokenizer)
    if rows is None:
        name, examples = "the first batch", next(training_batches(config, dataset.train))
    else:
        name, examples = "held-out rows", _held_out(dataset, rows)
    config = _for_rows(config, len(examples) if rows else config.train.diagnosis_prompts)
    traces = on_engine, trace_engine(config, on_engine, tokenizer)
    params, _ = first_params(config, tokenizer, model, traces, dataset.train)
    groups = _sample(config, *traces, tokenizer, params, examples)
    shares = None if rows else _gradient_shares(config, model, tokenizer, params, groups)
    settings = loss_settings(config, model, tokenizer)
    score = AnswerLogprobs(settings, model.mesh, config.train.micro_batch_prompts)
    return diagnose(name, groups, config, tokenizer, score, params, shares)


def diagnose_model(path: Path, overrides: Sequence[str], rows: int | None = None) -> Diagnosis:
    """The figures of a run, one of its checkpoints or any directory, on held-out rows.

    A directory takes its data from the overrides. Raises InputError.
    """
    check_has_questions(path, overrides)
    opened = open_model(path, overrides)
    _check_reasons(opened.config, str(path))
    mesh, tokenizer = opened.model.mesh, opened.tokenizer
    shards = mesh.shape["data"] * mesh.shape["fsdp"]
    examples = _held_out(load_dataset(opened.config.data, tokenizer), rows or ROWS)
    config = _on_any_devices(_for_rows(opened.config, len(examples)), shards)
    engine = trace_engine(config, opened.model, tokenizer)
    groups = _sample(config, opened.model, engine, tokenizer, opened.params, examples)
    score = AnswerLogprobs(
        loss_settings(config, opened.model, tokenizer),
        mesh,
        math.lcm(config.train.micro_batch_prompts, shards),
    )
    name = f"{opened.name} ({opened.description}), held-out rows"
    return diagnose(name, groups, config, tokenizer, score, opened.params)


def _check_reasons(config: RunConfig, what: str) -> None:
    if config.method != "nrt":
        raise InputError(
            f"method {config.method}: {what} samples no traces, so there is nothing to diagnose; "
            "name one of method nrt"
        )


def _held_out(dataset: Dataset, rows: int) -> list[TokenizedExample]:
    if not dataset.eval:
        raise InputError(
            "data.eval_rows=0: there are no held-out rows to diagnose; set data.eval_rows or "
            "data.eval_path"
        )
    if len(dataset.eval) < rows:
        log.warning("%d held-out rows, not %d: there are no more", len(dataset.eval), rows)
    return dataset.eval[:rows]


def _for_rows(config: RunConfig, prompts: int) -> RunConfig:
    """The config with so many prompts to score, and with the rollouts' own loop."""
    train = config.train.model_copy(
        update={"diagnosis_prompts": prompts or config.train.batch_prompts}
    )
    # Both drivers draw the same traces, and the loop needs no other package.
    rollout = config.rollout.model_copy(update={"driver": "loop"})
    return config.model_copy(update={"train": train, "rollout": rollout})


def _on_any_devices(config: RunConfig, shards: int) -> RunConfig:
    """The config for weights as they were read, independent of the devices of the rollouts."""
    slots = -(-config.rollout.slots // shards) * shards
    update = {"slots": slots, "dtype": None, "cache_dtype": None, "mesh": None, "devices": None}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=update)})


def _sample(
    config: RunConfig,
    on_engine: Model,
    engine: Engine,
    tokenizer: Tokenizer,
    params: Any,
    examples: Sequence[TokenizedExample],
) -> list[Group]:
    """The traces that the first step of a run would draw."""
    sampler = Sampler(config, tokenizer, engine)
    return sampler.sample(WeightTransfer(on_engine.target)(params, 0), examples, step=1)


def _gradient_shares(
    config: RunConfig, model: Model, tokenizer: Tokenizer, params: Any, groups: Sequence[Group]
) -> dict[str, float]:
    """Each term's share of the gradient on the first micro-batch of the run."""
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    offload = config.optimizer.offload
    policy = Policy(
        tokenizer=tokenizer,
        model=model,
        optimizer=optimizer,
        shardings=state_shardings(optimizer, model.target, model.mesh, offload=offload),
        reference_params=params if has_kl_term(config) else None,
    )
    packer = Packer(packing_layout(config, model))
    micro = make_batches(groups, packer, config, tokenizer)[0].micro_batches[0]
    functions = make_step_functions(config, policy)
    return functions.gradient_shares(params, policy.to_device(micro))
