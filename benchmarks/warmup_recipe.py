"""What each stage of the warm-up does to a model, on held-out questions, as one table.

    .venv/bin/python -m benchmarks.warmup_recipe MODEL gsm8k/train.jsonl --out runs/warmup \
        --start-row '\n' --end-row '<|im_end|>' warmup.all.updates=24

MODEL is a Hugging Face directory of an instruct model, the data a file of questions and answers.
The model is measured before the warm-up and after each stage: the probability that it opens a
trace, what the traces look like, and log P(y*) per token directly after x, after the empty trace,
after its own trace and after another question's trace.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import jax
import numpy as np
from flax import nnx

from nrt_jax.checkpoints.token_rows import copy_token_rows, token_id
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.engine.generate import generate
from nrt_jax.engine.requests import Request
from nrt_jax.evaluation.held_out import end_name
from nrt_jax.training.batch import SftBatch, sft_batch, sft_lengths
from nrt_jax.training.packing import Lengths, Packer
from nrt_jax.training.setup import Run, packing_layout, setup
from nrt_jax.training.warmup import (
    PlannedUpdate,
    StageUpdate,
    fresh_state,
    plan_updates,
    row_metrics,
)
from nrt_jax.training.warmup_progress import open_warmup_checkpoints, save_warmup
from nrt_jax.training.warmup_texts import warmup_rows
from nrt_jax.types import TokenizedExample, Trace

BASE = """
method: nrt
data:
  source: jsonl
  template: tokenizer
  max_prompt_tokens: 256
  max_answer_tokens: 200
  max_bad_share: 0.2
rollout: {traces_per_prompt: 1, max_trace_tokens: 64, max_response_tokens: 400, slots: 32}
train: {steps: 1000, batch_prompts: 8, mini_batch_prompts: 8, micro_batch_prompts: 2}
logging: {tensorboard: false}
warmup: {train: all}
"""
KEYS = ("direct", "empty", "own", "shuffled")
"""Contexts of y*: x; x t_start t_end; x t_start z t_end; the same with another question's z."""


def main() -> None:
    parser = argparse.ArgumentParser(description="What each stage of the warm-up does to a model.")
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="a new run directory")
    parser.add_argument("--questions", type=int, default=64, help="held-out questions")
    parser.add_argument("--start-row", default=r"\n", help="token whose rows t_start copies")
    parser.add_argument("--end-row", default=r"\n", help="token whose rows t_end copies")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop then; run again to go on")
    parser.add_argument("overrides", nargs="*", help="key=value, for the config")
    args = parser.parse_intermixed_args()
    config, deadline = _config(args), time.monotonic() + 60 * args.minutes
    with setup(config) as run, closing(open_warmup_checkpoints(config)) as checkpoints:
        total = config.warmup.updates
        if run.progress.step == -total:
            _copy_rows(run, args.start_row, args.end_row)
        planned = plan_updates(config, run.policy, warmup_rows(run))
        for stage, done in _updates_left(run):
            name = "before" if not done else f"after {done} updates"
            if stage is None or done in _starts(run):
                save_warmup(checkpoints, run.progress, total)
                _report(run, name)
            if time.monotonic() > deadline:
                save_warmup(checkpoints, run.progress, total)
                print(f"stopped after update {done} of {total}; run again to go on")
                return
            if stage is not None:
                _update(run, stage, planned[done], done + 1)
    rows = [json.loads(line) for line in _stages_file(config).read_text().splitlines()]
    print("\n".join([HEADER, *map(table_row, rows)]))


def _starts(run: Run) -> list[int]:
    """The updates that are finished when each stage begins."""
    sizes = [stage.updates for stage in run.config.warmup.stages]
    return [sum(sizes[:i]) for i in range(len(sizes))]


def _updates_left(run: Run) -> Iterator[tuple[StageUpdate | None, int]]:
    """The update to make and the number of those made; at last None with all of them."""
    config, policy, progress = run.config, run.policy, run.progress
    for stage, start in zip(config.warmup.stages, _starts(run), strict=True):
        update = StageUpdate(config, policy, stage)
        while (done := config.warmup.updates + progress.step) < start + stage.updates:
            if done == start:
                progress.state = fresh_state(policy, progress.state)
            yield update, done
    yield None, config.warmup.updates


def _update(run: Run, update: StageUpdate, planned: PlannedUpdate, number: int) -> None:
    start = time.perf_counter()
    run.progress.state, metrics = update(run.progress.state, planned)
    run.progress.step += 1
    values = {k: round(float(v), 3) for k, v in metrics.items() if "skipped" not in k}
    line = {"update": number, "seconds": time.perf_counter() - start}
    print(json.dumps(line | values | row_metrics(planned.rows)), flush=True)


def _stages_file(config: RunConfig) -> Path:
    return config.run_dir / "stages.jsonl"


def _config(args: argparse.Namespace) -> RunConfig:
    args.out.mkdir(parents=True, exist_ok=True)
    base = args.out.with_suffix(".yaml")
    base.write_text(BASE)
    fixed = {
        "model.path": args.model,
        "data.path": args.data,
        "data.eval_rows": args.questions,
        "evaluation.examples": args.questions,
        "run_dir": args.out,
    }
    words = [f"{key}={value}" for key, value in fixed.items()]
    return load_config(RunConfig, [base], [*words, *args.overrides])


def _copy_rows(run: Run, start: str, end: str) -> None:
    """Start the two think rows as copies of these tokens' rows."""
    tokenizer, state = run.policy.tokenizer, run.progress.state
    rows = {
        tokenizer.think_start_id: token_id(tokenizer, start, "--start-row"),
        tokenizer.think_end_id: token_id(tokenizer, end, "--end-row"),
    }
    run.progress.state = state._replace(params=copy_token_rows(state.params, rows))


# --- measurement ---------------------------------------------------------------------------------


def _report(run: Run, name: str) -> None:
    """Measure and append a row to RUN/stages.jsonl, unless it is there."""
    path, start = _stages_file(run.config), time.perf_counter()
    if path.exists() and json.dumps(name) in path.read_text():
        return
    row = {"stage": name} | measure(run)
    row["seconds"] = time.perf_counter() - start
    with path.open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(table_row(row), flush=True)


def measure(run: Run) -> dict[str, Any]:
    """Figures of the newest weights over the held-out questions, each with its standard error."""
    tokenizer, examples = run.policy.tokenizer, run.data.held_out
    think_start, think_end = tokenizer.think_start_id, tokenizer.think_end_id
    traces = _traces(run)
    shuffled = [*traces[1:], traces[0]]
    texts = {
        "direct": [(e, e.answer_tokens) for e in examples],
        "empty": [(e, _after(e, (), think_start, think_end)) for e in examples],
    }
    for key, given in (("own", traces), ("shuffled", shuffled)):
        texts[key] = [
            (e, _after(e, trace.tokens, think_start, think_end))
            for e, trace in zip(examples, given, strict=True)
        ]
    scored = _scores(run, [pair for key in KEYS for pair in texts[key]])
    by_key = {key: scored[i * len(examples) :][: len(examples)] for i, key in enumerate(KEYS)}
    answers = {
        key: [float(s[-len(e.answer_tokens) :].mean()) for e, s in zip(examples, rows, strict=True)]
        for key, rows in by_key.items()
    }
    names = [end_name(tokenizer, trace) for trace in traces]
    ends = {name: names.count(name) / len(names) for name in sorted(set(names))}
    own = np.asarray(answers["own"])
    return {
        "p_start": mean(math.exp(s[0]) for s in by_key["empty"]),
        "empty_share": mean(not len(trace.tokens) for trace in traces),
        "tokens": mean(len(trace.tokens) for trace in traces),
        "ends": ends,
        "think_end_share": ends.get(tokenizer.token(think_end), 0.0),
        "length_share": ends.get("length", 0.0),
        **{f"logprob_{key}": mean(values) for key, values in answers.items()},
        **{
            f"own_minus_{key}": _mean_and_error(own - np.asarray(answers[key]))
            for key in ("direct", "empty", "shuffled")
        },
        "texts": [tokenizer.decode(trace.tokens) for trace in traces[:4]],
    }


def _after(
    example: TokenizedExample, trace: Sequence[int] | np.ndarray, think_start: int, think_end: int
) -> np.ndarray:
    """t_start z t_end y*, and after t_start what a chat template writes there."""
    parts = ([think_start], example.after_start_tokens, trace, [think_end], example.answer_tokens)
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _traces(run: Run) -> list[Trace]:
    """A trace of each question, as the rollouts draw them."""
    rollout, tokenizer = run.config.rollout, run.policy.tokenizer
    assert run.engines.traces is not None, "nrt samples traces"
    requests = [
        Request(
            prompt_tokens=e.trace_prompt(tokenizer.think_start_id),
            stream=place,
            num_samples=1,
            max_tokens=rollout.max_trace_tokens,
        )
        for place, e in enumerate(run.data.held_out)
    ]
    params = run.engines.weights(run.progress).params
    groups = generate(run.engines.traces, params, requests, jax.random.key(1))
    return [trace for (trace,) in groups]


def _scores(run: Run, texts: Sequence[tuple[TokenizedExample, np.ndarray]]) -> list[np.ndarray]:
    """log pi of each of the tokens that follow x, in nats."""
    policy = run.policy
    continued = [TokenizedExample(e.example, e.prompt_tokens, tokens) for e, tokens in texts]
    lengths = [sft_lengths(e) for e in continued]
    longest = max(length.completions[0] for length in lengths)
    layout = packing_layout(run.config, policy.model)
    packer = Packer(layout._replace(most_shapes=2, largest=Lengths(0, (longest,), 0)))
    scores: list[np.ndarray] = [np.zeros(0)] * len(continued)
    for plan in packer.plan(lengths):
        batch = sft_batch(continued, plan)
        logprob_BW = np.asarray(
            _logprobs(
                policy.model.definition,
                run.config.model.logprob_chunk_tokens,
                run.progress.state.params,
                policy.to_device(batch),
            )
        )
        for i, pack in enumerate(plan.packs):
            for member, ((row, start),) in zip(pack.groups, pack.completion_places, strict=True):
                end = start + lengths[member].completions[0]
                answer = len(continued[member].answer_tokens)
                scores[member] = logprob_BW[i * plan.shape.rows + row, end - answer : end]
    return scores


@partial(jax.jit, static_argnums=(0, 1))
def _logprobs(definition: nnx.GraphDef, chunk_tokens: int, params: Any, batch: SftBatch) -> Any:
    decoder = nnx.merge(definition, params)
    hidden_BWD, _ = decoder.hidden(batch.inputs_BW, batch.positions_BW, batch.segments_BW)
    return decoder.token_logprobs(hidden_BWD, batch.targets_BW, chunk_tokens).logprob_BT


def _mean_and_error(values: np.ndarray) -> tuple[float, float]:
    return float(values.mean()), stdev(values.tolist()) / math.sqrt(len(values))


def table_row(row: dict[str, Any]) -> str:
    """Markdown, one row a stage."""
    other = 1 - row["think_end_share"] - row["length_share"]
    ends = f"{row['think_end_share']:.0%} / {row['length_share']:.0%} / {other:.0%}"
    logprobs = ", ".join(f"{row[f'logprob_{key}']:.2f}" for key in KEYS)
    gains = ", ".join(
        f"{row[f'own_minus_{key}'][0]:+.3f} ± {row[f'own_minus_{key}'][1]:.3f}"
        for key in ("empty", "shuffled")
    )
    return (
        f"| {row['stage']} | {row['p_start']:.2f} | {row['empty_share']:.0%} | "
        f"{row['tokens']:.0f} | {ends} | {logprobs} | {gains} |"
    )


HEADER = (
    "| stage | P(t_start given x) | empty | tokens | ended by t_end / limit / other | "
    "log P(y*) per token: direct, empty, own, shuffled | own - empty, own - shuffled |\n"
    "|---|---|---|---|---|---|---|"
)


if __name__ == "__main__":
    main()
