"""Score the reference answers of held-out questions at an evaluation: does the trace help?

The logprob of y* after the model's own trace is compared with that after the empty trace
(`eval/trace_gain`). Any text between x and y* may make the answer's format more likely, so the same
is done with another question's trace (`eval/shuffled_gain`): a trace that says something about its
question must gain more.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.data.detokenizer import Detokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.evaluation.held_out import Evaluated
from nrt_jax.evaluation.reference_log import ReferenceRow
from nrt_jax.objective.schemes import WS_SCHEMES, ws_weights
from nrt_jax.training.answer_logprobs import AnswerLogprobs, Context, ContextLogprobs
from nrt_jax.training.diagnosis import ScoreAnswers, score_contexts
from nrt_jax.training.forward import loss_settings
from nrt_jax.training.setup import Run
from nrt_jax.types import Group, TokenizedExample


def score_references(run: Run, evaluated: Evaluated) -> tuple[dict[str, float], list[ReferenceRow]]:
    """Metrics and rows of the first `evaluation.reference_rows` questions, under the weights of the
    last finished step; nothing where none are asked for."""
    config, policy = run.config, run.policy
    examples = run.data.held_out[: config.evaluation.reference_rows]
    if not examples:
        return {}, []
    settings = loss_settings(config, policy.model, policy.tokenizer)
    score = AnswerLogprobs(settings, policy.model.mesh, config.train.micro_batch_prompts)
    params = run.progress.state.params
    contexts = answer_contexts(score, params, examples, evaluated, policy.tokenizer, config.seed)
    rows = reference_rows(examples, evaluated, contexts, policy.tokenizer, config.objective)
    return gains(rows), rows


def answer_contexts(
    score: ScoreAnswers,
    params: Any,
    examples: Sequence[TokenizedExample],
    evaluated: Evaluated,
    tokenizer: Tokenizer,
    seed: int,
) -> list[list[ContextLogprobs]]:
    """Logprobs of each answer directly after x; where there are traces also after the empty trace,
    the own one, and another question's if there is one."""
    nothing = np.zeros(0, np.int32)
    groups = [
        Group(example, (trace,))
        for example, trace in zip(examples, evaluated.traces, strict=False)
        if trace is not None
    ]
    if groups:
        return score_contexts(score, params, groups, tokenizer, seed)
    return score(params, examples, [[Context(nothing, nothing, nothing)]] * len(examples))


def reference_rows(
    examples: Sequence[TokenizedExample],
    evaluated: Evaluated,
    contexts: Sequence[Sequence[ContextLogprobs]],
    tokenizer: Tokenizer,
    objective: ObjectiveConfig,
) -> list[ReferenceRow]:
    """The rows of the log."""
    weights: Sequence[Any] = [None] * len(examples)
    reasons = len(contexts[0]) > 1
    if reasons and objective.scheme in WS_SCHEMES:
        weights = answer_weights([of_row[1].answer_A for of_row in contexts], objective)
    records = evaluated.records[: len(examples)]
    return [
        ReferenceRow(
            row=example.example.index,
            source=example.example.source,
            question=example.example.user_text or example.example.question,
            reference=record["reference"],
            trace=record["trace"],
            trace_end=record["trace_end"],
            answer=record["answer"],
            correct=record["correct"],
            tokens=example.answer_tokens.tolist(),
            texts=token_texts(tokenizer, example.prompt_tokens, example.answer_tokens),
            logprobs=of_row[2 if reasons else 0].answer_A,
            entropies=of_row[2 if reasons else 0].answer_entropy_A,
            direct_logprobs=of_row[0].answer_A,
            empty_logprobs=of_row[1].answer_A if reasons else None,
            shuffled_logprobs=of_row[3].answer_A if len(of_row) > 3 else None,
            weights=weights_A,
        )
        for example, record, of_row, weights_A in zip(
            examples, records, contexts, weights, strict=True
        )
    ]


def gains(rows: Sequence[ReferenceRow]) -> dict[str, float]:
    """log P(y*|x, z) - log P(y*|x, empty trace), in nats per token, as the mean over questions."""
    found = {}
    by_name = {
        "eval/trace_gain": [row.own_gain for row in rows],
        "eval/shuffled_gain": [row.shuffled_gain for row in rows],
    }
    for name, values in by_name.items():
        if known := [value for value in values if value is not None]:
            found[name] = float(np.mean(known))
    return found


def answer_weights(
    log_c_base: Sequence[Float[np.ndarray, "A"]], objective: ObjectiveConfig
) -> list[Float[np.ndarray, "A"]]:
    """w of the weighted scheme for every token of each answer."""
    lengths = [len(row) for row in log_c_base]
    padded_BT = np.zeros((len(lengths), max(lengths)), np.float32)
    for row_T, log_c_base_A in zip(padded_BT, log_c_base, strict=True):
        row_T[: len(log_c_base_A)] = log_c_base_A
    mask_BT = np.arange(padded_BT.shape[1])[None] < np.asarray(lengths)[:, None]
    weight_BT, _ = ws_weights(
        objective.scheme,
        padded_BT,
        mask_BT,
        ws_normalisation=objective.ws_normalisation,
        weight_cap=objective.weight_cap,
    )
    of_rows = zip(np.asarray(weight_BT), lengths, strict=True)
    return [weight_T[:length] for weight_T, length in of_rows]


def token_texts(tokenizer: Tokenizer, prompt: np.ndarray, answer: np.ndarray) -> list[str]:
    """The text of each token of y*; of a character that several tokens spell, the last has it, and
    the token that ends y* has its name."""
    detokenizer, texts = Detokenizer(tokenizer, prompt), []
    settled = [detokenizer.settle(token) for token in answer[:-1]]
    for text, starts in [*settled, detokenizer.settle_rest()]:
        ends = [*starts[1:], len(text)]
        texts += [text[start:end] for start, end in zip(starts, ends, strict=bool(starts))]
    return [*texts, tokenizer.token(answer[-1])]
