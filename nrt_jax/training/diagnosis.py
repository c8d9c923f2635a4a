"""Measure whether a model can learn by NRT: its traces, its rewards, and what the answer owes to
the trace.

The logprob of the answer is measured directly after x, after the empty trace, after the model's own
traces, and after the traces of another question. A trace that says something about its question
must beat the last of these; the empty trace alone is a weak control, since any text may make the
answer's format more likely. Letters: P prompts, K traces per prompt, A answer tokens.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float

from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.evaluation.estimates import Estimate, mean_over_questions
from nrt_jax.evaluation.held_out import end_name
from nrt_jax.objective.rewards import score_log_rewards
from nrt_jax.training.answer_logprobs import Context, ContextLogprobs
from nrt_jax.training.loss_metrics import host_reward_means
from nrt_jax.types import Group, SuffixLogprobs, TokenizedExample

ScoreAnswers = Callable[
    [Any, Sequence[TokenizedExample], Sequence[Sequence[Context]]], list[list[ContextLogprobs]]
]
"""Logprobs of every example's answer after each of its contexts; `AnswerLogprobs` is one."""

SURPRISED = math.log(2)
"""Nats: a token with a probability below a half after the empty trace has a weight that counts."""


def shuffled_donors(prompts: Sequence[Sequence[int]], seed: int) -> list[int] | None:
    """For each prompt the index of another question, whose traces it gets; None if there is none.

    The distinct prompts are put in a random order by `seed`, and each takes the traces of the next:
    no prompt keeps its own, and none is used twice, except by repetitions of one prompt.
    """
    first = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(tuple(prompt), index)
    if len(first) < 2:
        return None
    distinct = list(first)
    order = [distinct[i] for i in np.random.default_rng(seed).permutation(len(distinct))]
    following = dict(zip(order, [*order[1:], order[0]], strict=True))
    return [first[following[tuple(prompt)]] for prompt in prompts]


class Scored(NamedTuple):
    """Logprobs of one question's answer, in nats."""

    direct_A: Float[np.ndarray, "A"]
    empty_A: Float[np.ndarray, "A"]
    own_KA: Float[np.ndarray, "K A"]
    shuffled_KA: Float[np.ndarray, "K A"] | None
    """After the traces of another question; None where all questions are the same."""
    entropies: Sequence[Float[np.ndarray, "T"]]
    """Of each of the own traces."""


def score_groups(
    score: ScoreAnswers, params: Any, groups: Sequence[Group], tokenizer: Tokenizer, seed: int
) -> list[Scored]:
    """Score the answers of all groups after x, the empty trace, own and other traces."""
    K = len(groups[0].traces)
    rows = score_contexts(score, params, groups, tokenizer, seed)
    return [_scored(of_question, K) for of_question in rows]


def score_contexts(
    score: ScoreAnswers, params: Any, groups: Sequence[Group], tokenizer: Tokenizer, seed: int
) -> list[list[ContextLogprobs]]:
    """Per question: y* directly after x, after the empty trace, after each of its K traces, and
    after the traces of another question where there is one.

    Equal contexts take the values of the first of them: two rows of a batch may round differently,
    and an empty trace must be neither above nor below the empty trace.
    """
    examples = [group.example for group in groups]
    donors = shuffled_donors([example.prompt_tokens.tolist() for example in examples], seed)
    nothing, end = np.zeros(0, np.int32), np.asarray([tokenizer.think_end_id], np.int32)
    contexts = []
    for p, group in enumerate(groups):
        traces = list(group.traces)
        if donors is not None:
            traces += groups[donors[p]].traces
        # t_start, and white space where the chat template writes it there.
        prompt = group.example.trace_prompt(tokenizer.think_start_id)
        start = prompt[len(group.example.prompt_tokens) :]
        after = [Context(start, trace.tokens, end) for trace in traces]
        direct, empty = Context(nothing, nothing, nothing), Context(start, nothing, end)
        contexts.append([direct, empty, *after])
    rows = score(params, examples, contexts)
    return [_first_of_equal(*of_question) for of_question in zip(contexts, rows, strict=True)]


def _first_of_equal(
    contexts: Sequence[Context], rows: Sequence[ContextLogprobs]
) -> list[ContextLogprobs]:
    first: dict[bytes, ContextLogprobs] = {}
    for context, row in zip(contexts, rows, strict=True):
        first.setdefault(context.tokens.tobytes(), row)
    of_answers = [first[context.tokens.tobytes()] for context in contexts]
    return [
        equal._replace(entropy_T=row.entropy_T) for equal, row in zip(of_answers, rows, strict=True)
    ]


def _scored(rows: Sequence[ContextLogprobs], K: int) -> Scored:
    direct_A, empty_A, *after = [row.answer_A for row in rows]
    return Scored(
        direct_A=direct_A,
        empty_A=empty_A,
        own_KA=np.stack(after[:K]),
        shuffled_KA=np.stack(after[K:]) if after[K:] else None,
        entropies=[row.entropy_T for row in rows[2 : 2 + K]],
    )


# --- figures -------------------------------------------------------------------------------------

Figures = dict[str, Estimate]
"""Every figure by its name."""


def trace_figures(groups: Sequence[Group], tokenizer: Tokenizer) -> Figures:
    """How long the traces are and what ended them."""
    traces = [trace for group in groups for trace in group.traces]
    ends = [end_name(tokenizer, trace) for trace in traces]
    think_end = tokenizer.token(tokenizer.think_end_id)
    lengths = np.asarray([len(trace.tokens) for trace in traces])
    empty = lengths == 0
    other = np.asarray([end not in (think_end, "length") for end in ends])
    figures = {
        "trace/empty_share": empty.mean(),
        "trace/empty_other_share": (empty & other).mean(),
        "trace/end_think_end_share": ends.count(think_end) / len(ends),
        "trace/end_other_share": other.mean(),
        "trace/end_length_share": ends.count("length") / len(ends),
        "trace/tokens": lengths.mean(),
        "trace/median_tokens": np.median(lengths),
    }
    return {name: Estimate(float(value)) for name, value in figures.items()}


def answer_figures(scored: Sequence[Scored], objective: ObjectiveConfig) -> Figures:
    """Entropy, rewards, logprobs of the answers in nats per token, and whose the weights are."""
    entropies = np.concatenate([entropy for of_p in scored for entropy in of_p.entropies])
    figures = {"trace/entropy": Estimate(float(entropies.mean()) if len(entropies) else 0.0)}
    figures |= reward_figures(scored, objective)
    by_context = logprobs_by_question(scored)
    differences = [("empty", "direct"), ("own", "empty")]
    if "shuffled" in by_context:
        differences += [("shuffled", "empty"), ("own", "shuffled")]
    for name, values in by_context.items():
        figures[f"logprob/{name}"] = mean_over_questions(values)
    for name, other in differences:
        gain = np.asarray(by_context[name]) - np.asarray(by_context[other])
        figures[f"logprob/{name}_minus_{other}"] = mean_over_questions(gain.tolist())
    return figures | {"weight/format_share": Estimate(format_weight_share(scored))}


def logprobs_by_question(scored: Sequence[Scored]) -> dict[str, list[float]]:
    """Mean logprob of each question's answer after each context, over tokens and traces, in nats.

    "shuffled" is left out where all questions are the same.
    """
    by_context = {
        "direct": [float(of_p.direct_A.mean()) for of_p in scored],
        "empty": [float(of_p.empty_A.mean()) for of_p in scored],
        "own": [float(of_p.own_KA.mean()) for of_p in scored],
    }
    shuffled = [float(p.shuffled_KA.mean()) for p in scored if p.shuffled_KA is not None]
    return by_context | ({"shuffled": shuffled} if shuffled else {})


def reward_figures(scored: Sequence[Scored], objective: ObjectiveConfig) -> Figures:
    """Share of groups with zero std, and of traces whose reward is above the empty trace's.

    A single trace per prompt has no std to speak of, and gives no share of such groups.
    """
    suffixes = [SuffixLogprobs(of_p.own_KA, of_p.empty_A) for of_p in scored]
    rewards, every = score_log_rewards(suffixes, objective), np.ones(len(scored), bool)
    means = host_reward_means(rewards.reward_PK, rewards.baseline_P, every, objective=objective)
    means = jax.device_get(means)
    several = rewards.reward_PK.shape[1] > 1
    names = ["reward/above_baseline_share", *(["reward/zero_std_share"] if several else [])]
    return {name: Estimate(float(means[name][0] / means[name][1])) for name in names}


def format_weight_share(scored: Sequence[Scored]) -> float:
    """Share of the answer tokens whose weight is due to the format.

    The weighted schemes weigh a token by its surprise s = -log c_base after the empty trace. With
    d, its surprise directly after x, the weight is due to the format, and not to the difficulty of
    the token, where s > log 2 and d < s / 2: more than half of the surprise appears only with the
    empty pair of think tokens.
    """
    surprise = -np.concatenate([of_p.empty_A for of_p in scored])
    direct = -np.concatenate([of_p.direct_A for of_p in scored])
    return float(((surprise > SURPRISED) & (direct < surprise / 2)).mean())
