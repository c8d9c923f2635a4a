"""Native Reasoning Training: examples, traces, one jitted step, new weights (Algorithm 1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from nrt_jax.evaluation.exact_match import end_name
from nrt_jax.records import Group, TokenizedExample
from nrt_jax.rollout.engine import DecoderEngine
from nrt_jax.rollout.generate import generate
from nrt_jax.rollout.sampler import Sampling
from nrt_jax.rollout.scheduler import Request
from nrt_jax.training.batch import TrainBatch, nrt_batch
from nrt_jax.training.engines import trace_engine
from nrt_jax.training.forward import NrtSettings
from nrt_jax.training.nrt_loss import nrt_loss
from nrt_jax.training.run import Run, mean_over_updates
from nrt_jax.training.scoring import make_scorer
from nrt_jax.training.step import make_update


def train_nrt(run: Run) -> None:
    """Take examples, sample K traces each, build the batch, update; the frame logs and saves."""
    tokenizer = run.tokenizer
    engine = _rollout_engine(run)
    step_functions = make_step_functions(run)
    for step in run.steps():
        with run.timer("data"):
            examples = next(run.batches)
        with run.timer("generate"):
            groups = sample_groups(run, engine, examples, run.sampling_key(step))
            batch = nrt_batch(
                groups, think_start=tokenizer.think_start_id, think_end=tokenizer.think_end_id
            )
        with run.timer("update"):
            run.state, updates = step_functions.run_mini_batches(run, batch)
            metrics = _step_metrics(updates)
        run.finish_step(metrics | _trace_metrics(run, groups))


def _rollout_engine(run: Run) -> DecoderEngine:
    """The engine that evaluation samples traces with, so that its programs are compiled once."""
    if run.answerer is not None and run.answerer.trace_engine is not None:
        return run.answerer.trace_engine
    return trace_engine(run.config, run.model, run.tokenizer)


def sample_groups(
    run: Run, engine: DecoderEngine, examples: Sequence[TokenizedExample], key: jax.Array
) -> list[Group]:
    """K traces of every example under the current weights; a long answer leaves room for itself."""
    rollout, tokenizer = run.config.rollout, run.tokenizer
    sampling = Sampling(temperature=rollout.temperature, top_p=rollout.top_p)
    requests = [
        Request(
            np.append(example.prompt_tokens, tokenizer.think_start_id).astype(np.int32),
            example.example.index,
            rollout.traces_per_prompt,
            _trace_limit(run, example),
            sampling,
        )
        for example in examples
    ]
    traces = generate(engine, run.state.params, requests, key)
    return [Group(example, group) for example, group in zip(examples, traces, strict=True)]


def _trace_limit(run: Run, example: TokenizedExample) -> int:
    """Tokens that z may have so that t_start, z, t_end and y* fit the response."""
    rollout = run.config.rollout
    room = rollout.max_response_tokens - len(example.answer_tokens) - 2
    return min(rollout.max_trace_tokens, room)


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
    train = config.train
    micro_count = train.mini_batch_prompts // train.micro_batch_prompts
    sequences = train.mini_batch_prompts * config.rollout.traces_per_prompt

    def loss_fn(params: Any, batch: Any) -> Any:
        return nrt_loss(params, *batch, sequences=sequences, settings=settings)

    return StepFunctions(
        update=make_update(loss_fn, run.optimizer, micro_count, run.shardings),
        score=make_scorer(
            settings,
            micro_count,
            several_updates=train.batch_prompts > train.mini_batch_prompts,
            reference=run.reference_params,
        ),
    )


def _slices(total: int, size: int) -> list[slice]:
    return [slice(start, start + size) for start in range(0, total, size)]


def _step_metrics(updates: list[dict[str, Any]]) -> dict[str, float]:
    """Means over the updates; the mismatch is that of the first, before the weights moved."""
    metrics = mean_over_updates(updates)
    first = mean_over_updates(updates[:1])
    return metrics | {name: first[name] for name in first if name.startswith("mismatch/")}


def _trace_metrics(run: Run, groups: Sequence[Group]) -> dict[str, float]:
    """Length and endings of the traces."""
    traces = [trace for group in groups for trace in group.traces]
    lengths = np.asarray([len(trace.tokens) for trace in traces])
    names = [end_name(run.tokenizer, trace) for trace in traces]
    think_end = run.tokenizer.token(run.tokenizer.think_end_id)
    other = sum(name not in (think_end, "length") for name in names)
    prompt_tokens = sum(len(group.example.prompt_tokens) for group in groups)
    answer_tokens = sum(len(group.example.answer_tokens) for group in groups)
    per_group = run.config.rollout.traces_per_prompt
    return {
        "trace/tokens": float(lengths.mean()),
        "trace/tokens_max": float(lengths.max()),
        "trace/end_think_end_share": names.count(think_end) / len(names),
        "trace/end_length_share": names.count("length") / len(names),
        "trace/end_other_share": other / len(names),
        "speed/tokens": float(lengths.sum() + prompt_tokens + per_group * answer_tokens),
    }
