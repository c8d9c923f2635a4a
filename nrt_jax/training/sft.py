"""Supervised fine-tuning: cross-entropy of the answer after the question, no trace.

Letters: those of batch.py; D model dim.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.objective.losses import sft_loss
from nrt_jax.objective.masked import masked_count, masked_sum
from nrt_jax.stop import StopRequest
from nrt_jax.training.batch import SftBatch, sft_batch, sft_lengths
from nrt_jax.training.packing import packing_metrics
from nrt_jax.training.same_tokens import check_same_rows
from nrt_jax.training.setup import Run
from nrt_jax.training.steps import finish_step, mean_over_updates, steps
from nrt_jax.training.update import Metrics, Update


def train_sft(run: Run, stop: StopRequest) -> None:
    """Take examples, build the batch, update; log, evaluate and save."""
    config, progress, packer = run.config.train, run.progress, run.data.packer
    timer = run.logger.timer
    update = make_sft_update(run)
    for step in steps(run, stop):
        with timer("data"):
            examples = next(run.data.batches)
            check_same_rows(f"step {step}", examples)
            minis = [
                examples[start : start + config.mini_batch_prompts]
                for start in range(0, config.batch_prompts, config.mini_batch_prompts)
            ]
            plans = [packer.plan([sft_lengths(e) for e in mini]) for mini in minis]
        updates = []
        run.engines.release_weights()
        with timer("update"):
            for mini, of_mini in zip(minis, plans, strict=True):
                batches = [run.policy.to_device(sft_batch(mini, plan)) for plan in of_mini]
                answer_tokens = sum(len(example.answer_tokens) for example in mini)
                progress.state, metrics = update(progress.state, batches, answer_tokens)
                updates.append(metrics)
            metrics = mean_over_updates(updates)
        prompt_tokens = sum(len(e.prompt_tokens) for e in examples)
        answer_tokens = sum(len(e.answer_tokens) for e in examples)
        metrics["data/answer_tokens"] = float(answer_tokens)
        metrics |= packing_metrics([plan for of_mini in plans for plan in of_mini], packer)
        finish_step(run, metrics | {"speed/tokens": float(prompt_tokens + answer_tokens)})


def make_sft_update(run: Run) -> Callable[..., Any]:
    """An update from one mini-batch, whose loss is the mean over all its answer tokens."""
    policy, chunk_tokens = run.policy, run.config.model.logprob_chunk_tokens

    def loss_fn(params: Any, batch: tuple[SftBatch, Array]) -> tuple[Array, Metrics]:
        return sft_loss_of_rows(params, *batch, policy.model.definition, chunk_tokens)

    update = Update(loss_fn, policy.update_rule, run.memory.add_program)

    def update_mini_batch(state: TrainState, batches: list[SftBatch], answer_tokens: int) -> Any:
        total = np.float32(answer_tokens)
        return update(state, [(batch, total) for batch in batches])

    return update_mini_batch


def sft_loss_of_rows(
    params: Any,
    batch: SftBatch,
    answer_tokens: Float[Array, ""],
    definition: nnx.GraphDef,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Metrics]:
    """-sum log pi(y*_i | x, y*_<i) / answer_tokens, the number of those of the mini-batch."""
    decoder = nnx.merge(definition, params)
    hidden_BWD, _ = decoder.hidden(batch.inputs_BW, batch.positions_BW, batch.segments_BW)
    scores = decoder.token_logprobs(hidden_BWD, batch.targets_BW, chunk_tokens)
    loss = masked_sum(sft_loss(scores.logprob_BT), batch.answer_BW) / answer_tokens
    entropy = (masked_sum(scores.entropy_BT, batch.answer_BW), masked_count(batch.answer_BW))
    means = jax.lax.stop_gradient({"policy/entropy": entropy})
    return loss, Metrics({"loss/sft": loss}, means, {})
