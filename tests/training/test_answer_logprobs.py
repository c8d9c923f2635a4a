"""Answers after any context, against one plain forward pass per sequence."""

import dataclasses

import jax
import numpy as np
import pytest

from nrt_jax.config.mesh import MeshConfig, parse_mesh
from nrt_jax.models.sharding import make_mesh
from nrt_jax.training import answer_logprobs
from nrt_jax.training.answer_logprobs import AnswerLogprobs, Context
from tests.training import worlds
from tests.training.plain_loss import Policy, log_softmax
from tests.training.worlds import THINK_END, THINK_START

DEFINITION, PARAMS = worlds.tiny_decoder()
POLICY = Policy(DEFINITION, PARAMS, THINK_START, THINK_END)
TEMPERATURE = 0.7


def scorer(prompts: int, mesh=None) -> AnswerLogprobs:
    mesh = mesh or make_mesh(MeshConfig(), jax.devices()[:1])
    return AnswerLogprobs(worlds.settings(DEFINITION, temperature=TEMPERATURE), mesh, prompts)


def ids(*tokens: int) -> np.ndarray:
    return np.asarray(tokens, np.int32)


def examples_and_contexts():
    """Ragged prompts, one of a single token; no context, an empty trace, and two traces."""
    groups = worlds.random_groups(5, 2)
    examples = [group.example for group in groups]
    examples[3] = dataclasses.replace(examples[3], prompt_tokens=ids(7))
    contexts = []
    for group in groups:
        traces = [trace.tokens for trace in group.traces]
        after = [Context(ids(THINK_START), z, ids(THINK_END)) for z in (ids(), *traces)]
        contexts.append([Context(ids(), ids(), ids()), *after])
    return examples, contexts


def expected(example, context) -> tuple[list[float], list[float]]:
    """Logprobs of y* and entropies of z, token by token."""
    before = [*example.prompt_tokens, *context.tokens]
    logits = POLICY._logits(ids(*before, *example.answer_tokens))
    plain, tempered = log_softmax(logits), log_softmax(logits / TEMPERATURE)
    answer = [plain[len(before) - 1 + i, token] for i, token in enumerate(example.answer_tokens)]
    first = len(example.prompt_tokens) + len(context.before) - 1
    of_trace = tempered[first : first + len(context.trace)]
    return answer, [-float(np.exp(row) @ row) for row in of_trace]


@pytest.mark.parametrize("shortest", [1, 256])
def test_every_answer_after_every_context(shortest, monkeypatch):
    """One pack holds all; in short rows several do, in micro-batches the last of which is not full,
    and contexts of one prompt are in more than one pack."""
    monkeypatch.setattr(answer_logprobs, "SHORTEST_ROW", shortest)
    examples, contexts = examples_and_contexts()
    scored = scorer(2)(PARAMS, examples, contexts)
    entropies = 0
    for example, of_example, rows in zip(examples, contexts, scored, strict=True):
        for context, row in zip(of_example, rows, strict=True):
            answer, entropy = expected(example, context)
            np.testing.assert_allclose(row.answer_A, answer, rtol=1e-4, atol=1e-5)
            np.testing.assert_allclose(row.entropy_T, entropy, rtol=1e-4, atol=1e-5)
            entropies += len(entropy)
    assert entropies > 10


def test_one_shape_compiles_one_program():
    examples, contexts = examples_and_contexts()
    answer_logprobs.answer_logprobs.clear_cache()
    scorer(2)(PARAMS, examples[:2], contexts[:2])
    scorer(2)(PARAMS, examples, contexts)
    assert answer_logprobs.answer_logprobs._cache_size() == 1


def test_rows_are_split_over_a_mesh():
    examples, contexts = examples_and_contexts()
    mesh = make_mesh(parse_mesh("data=2,fsdp=2,context=2"), jax.devices())
    definition, params = worlds.tiny_decoder(mesh=mesh)
    settings = worlds.settings(definition, temperature=TEMPERATURE)
    on_mesh = AnswerLogprobs(settings, mesh, 4)(params, examples, contexts)
    alone = scorer(5)(PARAMS, examples, contexts)
    for rows, same in zip(on_mesh, alone, strict=True):
        for row, other in zip(rows, same, strict=True):
            np.testing.assert_allclose(row.answer_A, other.answer_A, rtol=1e-4, atol=1e-5)
