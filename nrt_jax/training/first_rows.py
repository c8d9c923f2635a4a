"""Choose the rows with which new think tokens start: `model.new_rows_from: auto`.

The rows decide whether there is anything to train. A copy of the end-of-sequence token says that
the turn is over, so that an instruct model ends its traces at once. Each candidate is tried on a
few rows of the training data: do traces follow t_start, and how much less probable is the answer y*
after the empty trace `t_start t_end` than directly after x? First all candidates are tried for both
tokens and then, unless the best of them is good enough, all for t_end after its t_start.

Letters: P prompts.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from nrt_jax.checkpoints.abstract_model import Model, init_params, read_params
from nrt_jax.checkpoints.token_rows import (
    MEAN_ROW,
    TEXT,
    RowNames,
    row_names,
    row_sources,
    tell_new_rows,
    with_new_rows,
)
from nrt_jax.config.model import AUTO
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate
from nrt_jax.engine.make import trace_sampling
from nrt_jax.engine.requests import Request
from nrt_jax.engine.weight_sync import WeightTransfer
from nrt_jax.errors import InputError
from nrt_jax.training.answer_logprobs import AnswerLogprobs, Context
from nrt_jax.training.forward import loss_settings
from nrt_jax.types import TokenizedExample

log = logging.getLogger(__name__)

ROWS, TRACES, TOKENS = 8, 2, 16
"""Rows of the data, traces per row, and the longest trace that a candidate is tried with."""
NON_EMPTY = 0.9
"""Share of non-empty traces beyond which a candidate is judged by the answers alone."""
SMALL_LOSS = 0.05
"""Loss of y*, in nats per token, up to which no other row is tried for t_end."""
NEW_ROWS_STREAM = 4
"""Folded into the run's seed: the trials draw from keys of their own."""


class Candidate(NamedTuple):
    """One line of the table."""

    rows: RowNames
    non_empty_share: float
    tokens: float
    """Mean length of the traces; at most 16."""
    direct: float
    """Mean log P(y* | x) per token, in nats; it depends on the rows, which take part in the
    softmax."""
    empty: float
    """Mean log P(y* | x, empty trace) per token, in nats."""

    @property
    def loss(self) -> float:
        """What the empty trace costs y*, in nats per token."""
        return self.direct - self.empty

    @property
    def rank(self) -> tuple[float, float]:
        """The largest is chosen: non-empty traces first, then the smallest loss of y*."""
        return min(self.non_empty_share, NON_EMPTY), -self.loss

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return self.rows._asdict() | {
            name: round(value, 4) for name, value in self._asdict().items() if name != "rows"
        }


class FirstParams(NamedTuple):
    """Weights before the first update; None while they are not needed."""

    params: Any | None = None
    new_rows: dict[str, Any] | None = None
    """What was chosen, and the candidates, for `versions.json`; None where nothing was chosen."""


@dataclass(frozen=True)
class Trial:
    """Tries rows with the engine of the run, whose programs are the same for all rows."""

    config: RunConfig
    tokenizer: Tokenizer
    engine: Engine
    transfer: WeightTransfer
    score: AnswerLogprobs
    examples: Sequence[TokenizedExample]

    def measure(self, base: dict[str, Any], rows: RowNames) -> Candidate:
        """What the think tokens do with these rows; InputError where the model computes NaN."""
        params = with_new_rows(base, self.tokenizer, rows)
        direct, empty = self._answers(params)
        if not math.isfinite(direct + empty):
            raise InputError(
                f"{self.config.model.path}: log P(y*|x) is {direct:g} and, after the empty trace, "
                f"{empty:g}; the weights must give finite numbers, so get the checkpoint again"
            )
        lengths = self._trace_lengths(params)
        share = sum(length > 0 for length in lengths) / len(lengths)
        tokens = float(np.mean(lengths))
        log.info("  %s, %s: %.0f %%, %.1f, %.3f, %.3f", *rows, 100 * share, tokens, direct, empty)
        return Candidate(rows, share, tokens, direct, empty)

    def _answers(self, params: dict[str, Any]) -> tuple[float, float]:
        """Mean logprob per token of y*, directly after x and after the empty trace."""
        nothing, contexts = np.zeros(0, np.int32), []
        end = np.asarray([self.tokenizer.think_end_id], np.int32)
        for example in self.examples:
            before = np.append(np.int32(self.tokenizer.think_start_id), example.after_start_tokens)
            empty = Context(before.astype(np.int32), nothing, end)
            contexts.append([Context(nothing, nothing, nothing), empty])
        scored = self.score(params, self.examples, contexts)
        direct, empty = np.asarray([[row.answer_A.mean() for row in rows] for rows in scored]).T
        return float(direct.mean()), float(empty.mean())

    def _trace_lengths(self, params: dict[str, Any]) -> list[int]:
        rollout, start = self.config.rollout, self.tokenizer.think_start_id
        sampling = trace_sampling(rollout)
        requests = [
            Request(
                prompt_tokens=example.trace_prompt(start),
                stream=example.example.index,
                num_samples=TRACES,
                max_tokens=min(TOKENS, rollout.max_trace_tokens),
                sampling=sampling,
            )
            for example in self.examples
        ]
        key = jax.random.fold_in(jax.random.key(self.config.seed), NEW_ROWS_STREAM)
        weights = self.transfer(params, 0).params
        groups = generate(self.engine, weights, requests, key, steps=rollout.decode_steps)
        return [len(trace.tokens) for group in groups for trace in group]


def first_params(
    config: RunConfig,
    tokenizer: Tokenizer,
    model: Model,
    traces: tuple[Model, Engine] | None,
    examples: Sequence[TokenizedExample],
    recorded: Mapping[str, Any] | None = None,
) -> FirstParams:
    """Read or draw the weights before the first update; choose the rows of new think tokens.

    `traces` is the model as the engine of the traces holds it, and that engine; None for sft, which
    needs no such rows. Nothing is tried where `model.new_rows_from` names the rows, or where they
    were `recorded` by an earlier start of the run. Raises InputError.
    """
    named = _names_by_token(config, tokenizer)
    if config.model.path is None or traces is None or AUTO not in named:
        return FirstParams(init_params(config, model, tokenizer), None)
    base = read_params(config, model)
    if recorded is not None:
        rows = RowNames(recorded["think_start"], recorded["think_end"])
        return FirstParams(with_new_rows(base, tokenizer, rows), dict(recorded))
    on_engine, engine = traces
    score = AnswerLogprobs(
        loss_settings(config, model, tokenizer), model.mesh, config.train.micro_batch_prompts
    )
    trial = Trial(
        config=config,
        tokenizer=tokenizer,
        engine=engine,
        transfer=WeightTransfer(on_engine.target),
        score=score,
        examples=trial_examples(examples, config.seed),
    )
    names = candidate_names(tokenizer, trial.examples[0].prompt_tokens)
    log.info(
        "model.new_rows_from=auto tries rows for %s, %s: non-empty traces, their tokens (at most "
        "%d), log P(y*|x) and log P(y*|x, empty trace) per token",
        config.data.think_start,
        config.data.think_end,
        TOKENS,
    )
    best, candidates = choose(partial(trial.measure, base), names, named)
    tell_new_rows(tokenizer, best.rows)
    new_rows = best.rows._asdict() | {"candidates": [c.as_dict() for c in candidates]}
    return FirstParams(with_new_rows(base, tokenizer, best.rows), new_rows)


def trial_examples(examples: Sequence[TokenizedExample], seed: int) -> list[TokenizedExample]:
    """The shortest quarter of 32 rows drawn by the seed: a start need not wait for long answers."""
    drawn = np.random.default_rng(seed).permutation(len(examples))[: 4 * ROWS].tolist()
    rows = [examples[i] for i in drawn]
    return sorted(rows, key=lambda row: len(row.prompt_tokens) + len(row.answer_tokens))[:ROWS]


def _names_by_token(config: RunConfig, tokenizer: Tokenizer) -> RowNames:
    """Where each row comes from; a token that the checkpoint has keeps its own."""
    ids = tokenizer.think_start_id, tokenizer.think_end_id
    named = zip(ids, row_names(config.model, tokenizer), strict=True)
    return RowNames(*(n if i in tokenizer.new_ids else tokenizer.token(i) for i, n in named))


def choose(
    measure: Callable[[RowNames], Candidate], names: Sequence[str], named: RowNames
) -> tuple[Candidate, list[Candidate]]:
    """The best candidate, the first of equals, and all that were tried."""
    same = [RowNames(*(name if n == AUTO else n for n in named)) for name in names]
    tried = [measure(rows) for rows in same]
    best = max(tried, key=lambda candidate: candidate.rank)
    enough = best.non_empty_share >= NON_EMPTY and best.loss <= SMALL_LOSS
    if named == (AUTO, AUTO) and not enough:
        start = best.rows.think_start
        tried += [measure(RowNames(start, name)) for name in names if name != start]
        best = max(tried, key=lambda candidate: candidate.rank)
    return best, tried


def candidate_names(tokenizer: Tokenizer, prompt: np.ndarray) -> list[str]:
    r"""Names of the rows to try, of those that the tokenizer has.

    The line break; eos; the special token that opens the turn of the answer in this prompt; the
    text "Let's think"; the mean row.
    """
    eos = tokenizer.token(tokenizer.eos_id)
    opening = turn_opening(tokenizer, prompt.tolist())
    named = [r"\n", eos, *([] if opening is None else [tokenizer.token(opening)])]
    names = []
    for name in dict.fromkeys([*named, f"{TEXT}Let's think", MEAN_ROW]):
        try:
            row_sources(tokenizer, name)
        except InputError:
            continue
        names.append(name)
    return names


def turn_opening(tokenizer: Tokenizer, prompt: Sequence[int]) -> int | None:
    """The first special token after the prompt's last eos, or after its bos; None without one.

    bos "Question" -> None; "<|im_end|> <|im_start|> assistant" -> <|im_start|>.
    """
    if tokenizer.eos_id in prompt:
        first = len(prompt) - prompt[::-1].index(tokenizer.eos_id)
    else:
        first = int(prompt[0] == tokenizer.bos_id)
    special = (i for i in prompt[first:] if i in tokenizer.special_ids and i != tokenizer.unk_id)
    return next(special, None)
