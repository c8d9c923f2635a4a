"""The rows of the warm-up: the model's own texts in the place of z, sampled before any update.

The weights before the first update write all of them. They are kept in a file of the run, so that
a run that continues needs neither these weights nor the time again.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import jax
import numpy as np

from nrt_jax import distributed
from nrt_jax.atomic_files import write_atomically
from nrt_jax.checkpoints.abstract_model import engine_model
from nrt_jax.config.run import RunConfig
from nrt_jax.data.instruction import find_instruction, instructed_prompts
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.generate import generate
from nrt_jax.engine.make import make_engine
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.evaluation.held_out import end_name
from nrt_jax.training.setup import Run
from nrt_jax.training.warmup_batch import WarmupRow
from nrt_jax.types import TokenizedExample, Trace

log = logging.getLogger(__name__)

WARMUP_STREAM = 3
"""Folded into the run's seed, beside the streams of setup.py."""
TEXTS_FILE = "warmup_texts.jsonl"


def warmup_rows(run: Run) -> list[list[WarmupRow]]:
    """The rows of each update: the first training rows, in the order of the run.

    Takes their batches, so that step 1 goes on with other rows. Every n-th row, by
    `warmup.empty_share`, has the empty trace. Texts below `warmup.min_tokens` are left out, and the
    updates share what is left evenly. Raises InputError when most texts are too short, and for a
    model that gives NaN.
    """
    warmup = run.config.warmup
    examples = _take(run.data.batches, warmup.updates * warmup.batch_prompts)
    places = [i for i in range(len(examples)) if not _is_empty(i, warmup.empty_share)]
    traces = dict(zip(places, _texts(run, [examples[i] for i in places]), strict=True))
    long_enough = {i for i in places if len(traces[i].tokens) >= warmup.min_tokens}
    kept = [i for i in range(len(examples)) if i not in traces or i in long_enough]
    if 2 * len(long_enough) < len(places) or len(kept) < warmup.updates:
        raise InputError(
            f"{run.config.run_dir / TEXTS_FILE}: {len(long_enough)} of {len(places)} texts have "
            f"warmup.min_tokens={warmup.min_tokens} tokens, and half must; in another run_dir, "
            "lower it or set another warmup.instruction, under which the model writes more"
        )
    rows = [_row(examples[i], traces.get(i)) for i in kept]
    bounds = [u * len(rows) // warmup.updates for u in range(warmup.updates + 1)]
    return [rows[start:end] for start, end in pairwise(bounds)]


def _take(batches: Iterator[list[TokenizedExample]], count: int) -> list[TokenizedExample]:
    """The next examples; the last batch may have more of them, which no one sees then."""
    examples: list[TokenizedExample] = []
    while len(examples) < count:
        examples += next(batches)
    return examples[:count]


def _is_empty(i: int, share: float) -> bool:
    """Spread the share evenly: with 0.2 every fifth row."""
    return int((i + 1) * share + 1e-9) > int(i * share + 1e-9)


def _row(example: TokenizedExample, trace: Trace | None) -> WarmupRow:
    if trace is None:
        return WarmupRow(example, np.zeros(0, np.int32), ended=False)
    return WarmupRow(example, trace.tokens, ended=trace.end_token is not None)


# --- texts ---------------------------------------------------------------------------------------


def _texts(run: Run, examples: Sequence[TokenizedExample]) -> list[Trace]:
    """A text per example: those of the file, or else sampled and written there."""
    path = run.config.run_dir / TEXTS_FILE
    if distributed.from_first("the texts of the warm-up", path.exists()):
        return _read(path, examples, run.policy.tokenizer)
    if run.progress.step > -run.config.warmup.updates:
        raise InputError(
            f"{path}: is missing, and the weights that wrote it have changed; restore it from a "
            "copy, or choose another run_dir"
        )
    log.info("warm-up: the model writes %d texts", len(examples))
    traces = sample_texts(run, examples)
    if distributed.is_first():
        _write(path, examples, traces, run.policy.tokenizer)
    return traces


def sample_texts(run: Run, examples: Sequence[TokenizedExample]) -> list[Trace]:
    """What the newest weights write under the instruction, or after x, for each example.

    The think tokens are never drawn: new rows have the probability of the token that they are
    copies of. A text is a function of the seed, its place in the order, and the weights.
    """
    config, tokenizer = run.config, run.policy.tokenizer
    warmup, rollout = config.warmup, config.rollout
    prompts = _prompts(config, tokenizer, examples)
    requests = [
        Request(
            prompt_tokens=prompt,
            stream=place,
            num_samples=warmup.texts_per_prompt,
            max_tokens=min(warmup.max_tokens, _room(example, rollout.max_response_tokens)),
            sampling=Sampling(warmup.temperature),
        )
        for place, (example, prompt) in enumerate(zip(examples, prompts, strict=True))
    ]
    # No shorter than those of the traces, so that both are padded alike.
    longest = max([config.data.max_prompt_tokens + 1, *map(len, prompts)])
    think_ids = frozenset({tokenizer.think_start_id, tokenizer.think_end_id})
    engine = make_engine(
        config,
        engine_model(config, run.policy.model),
        slots=rollout.slots,
        longest_prompt=longest,
        new_tokens=warmup.max_tokens,
        stop_ids=tokenizer.special_ids - think_ids,
        num_samples=warmup.texts_per_prompt,
        banned_ids=think_ids,
        programs=None if run.engines.traces is None else run.engines.traces.programs,
    )
    key = jax.random.fold_in(jax.random.key(config.seed), WARMUP_STREAM)
    params = run.engines.weights(run.progress).params
    groups = generate(engine, params, requests, key, steps=rollout.decode_steps)
    for example, group in zip(examples, groups, strict=True):
        if not all(np.isfinite([*trace.logprobs, trace.end_logprob]).all() for trace in group):
            raise InputError(
                f"{config.model.path or 'model.architecture'}: its logprobs are not finite (text "
                f"of row {example.example.index}); use weights without NaN or infinity, or "
                "model.dtype=float32"
            )
    return [next((t for t in group if t.end_token is not None), group[0]) for group in groups]


def _room(example: TokenizedExample, response_tokens: int) -> int:
    """Tokens that the limit leaves for z beside t_start, t_end and y*."""
    return response_tokens - len(example.after_start_tokens) - len(example.answer_tokens) - 2


def _prompts(
    config: RunConfig, tokenizer: Tokenizer, examples: Sequence[TokenizedExample]
) -> list[np.ndarray]:
    instruction = find_instruction(config.warmup.instruction, config.data, tokenizer)
    if not instruction:
        log.info("warm-up: texts continue the prompt")
        return [example.prompt_tokens for example in examples]
    log.info("warm-up: texts follow the system turn %r", instruction)
    rows = {example.example.index for example in examples}
    prompts = instructed_prompts(config.data, tokenizer, instruction, rows)
    return [prompts[example.example.index] for example in examples]


# --- file ----------------------------------------------------------------------------------------


def _write(
    path: Path, examples: Sequence[TokenizedExample], traces: Sequence[Trace], tokenizer: Tokenizer
) -> None:
    lines = [
        {
            "row": example.example.index,
            "tokens": trace.tokens.tolist(),
            "end": end_name(tokenizer, trace),
            "text": tokenizer.decode(trace.tokens.tolist()),
        }
        for example, trace in zip(examples, traces, strict=True)
    ]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_atomically(path, text.encode())


def _read(path: Path, examples: Sequence[TokenizedExample], tokenizer: Tokenizer) -> list[Trace]:
    try:
        lines = [json.loads(line) for line in path.read_bytes().split(b"\n")[:-1]]
        rows = [line["row"] for line in lines]
        traces = [_read_line(line, tokenizer) for line in lines]
    except (ValueError, KeyError, TypeError):
        rows, traces = None, []
    if rows != [example.example.index for example in examples]:
        raise InputError(
            f"{path}: does not hold a text for each row of the warm-up; restore it from a copy, or "
            "choose another run_dir"
        )
    return traces


def _read_line(line: dict, tokenizer: Tokenizer) -> Trace:
    """The text of a line; its logprobs are not kept."""
    tokens = np.asarray(line["tokens"], np.int32)
    end = None if line["end"] == "length" else tokenizer.find(line["end"])
    return Trace(tokens, np.zeros(len(tokens), np.float32), end, 0.0)
