"""Supervised fine-tuning: cross-entropy of the answer after the question, no trace.

Letters: B rows, W tokens of a row, T = W - 1 predicted tokens.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from nrt_jax.models.log_probs import token_scores
from nrt_jax.objective.losses import sft_loss
from nrt_jax.objective.masked import masked_count, masked_sum
from nrt_jax.training.batch import SftBatch, sft_batch
from nrt_jax.training.run import Run, mean_over_updates
from nrt_jax.training.step import Metrics, make_update


def train_sft(run: Run) -> None:
    """Take examples, lay them out, update; the frame logs, evaluates and saves."""
    config = run.config.train
    update = make_sft_update(run)
    for _ in run.steps():
        with run.timer("data"):
            batch = sft_batch(next(run.batches))
        updates = []
        with run.timer("update"):
            for start in range(0, config.batch_prompts, config.mini_batch_prompts):
                rows = slice(start, start + config.mini_batch_prompts)
                mini = run.to_device(jax.tree.map(lambda x, rows=rows: x[rows], batch))
                run.state, metrics = update(run.state, mini)
                updates.append(metrics)
            metrics = mean_over_updates(updates)
        metrics["speed/tokens"] = float(batch.length_B.sum())
        run.finish_step(metrics)


def make_sft_update(run: Run) -> Any:
    """The jitted update of one mini-batch; loss is the mean over all its answer tokens."""
    train, model = run.config.train, run.model
    chunk_tokens = run.config.model.log_prob_chunk_tokens
    micro_count = train.mini_batch_prompts // train.micro_batch_prompts

    def loss_fn(params: Any, batch: tuple[SftBatch, Array]) -> tuple[Array, Metrics]:
        rows, answer_tokens_B = batch
        return sft_loss_of_rows(params, rows, answer_tokens_B[0], model.definition, chunk_tokens)

    update = make_update(loss_fn, run.optimizer, micro_count, run.shardings)

    @jax.jit
    def answer_tokens(rows: SftBatch) -> Float[Array, " B"]:
        total = jnp.sum(rows.length_B - rows.prompt_length_B)
        return jnp.full(rows.length_B.shape, total, jnp.float32)

    return lambda state, rows: update(state, (rows, answer_tokens(rows)))


def sft_loss_of_rows(
    params: Any,
    batch: SftBatch,
    answer_tokens: Float[Array, ""],
    definition: nnx.GraphDef,
    chunk_tokens: int,
) -> tuple[Float[Array, ""], Metrics]:
    """-sum log pi(y*_i | x, y*_<i) / answer_tokens, the count being of the whole mini-batch."""
    decoder = nnx.merge(definition, params)
    order_T = jnp.arange(batch.tokens_BW.shape[1] - 1)[None]
    positions_BT = jnp.broadcast_to(order_T, batch.tokens_BW[:, 1:].shape)
    valid_BT = order_T < batch.length_B[:, None] - 1
    segments_BT = valid_BT.astype(jnp.int32)
    hidden_BTD, _ = decoder.hidden(batch.tokens_BW[:, :-1], positions_BT, segments_BT)
    scores = token_scores(
        hidden_BTD,
        decoder.head_DV(),
        batch.tokens_BW[:, 1:],
        vocab_size=decoder.architecture.vocab_size,
        chunk_tokens=chunk_tokens,
    )
    answer_BT = valid_BT & (order_T >= batch.prompt_length_B[:, None] - 1)
    loss = masked_sum(sft_loss(scores.log_prob_BT), answer_BT) / answer_tokens
    entropy = (masked_sum(scores.entropy_BT, answer_BT), masked_count(answer_BT))
    means = jax.lax.stop_gradient({"policy/entropy": entropy})
    return loss, Metrics({"loss/sft": loss}, means, {})
