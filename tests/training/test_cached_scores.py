"""Scores of y* that the engine reads off its cache, against the training forward."""

from collections.abc import Sequence

import jax
import numpy as np
import pytest
from flax import nnx

from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.objective import ObjectiveConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate, generate_and_score
from nrt_jax.engine.requests import Request
from nrt_jax.models.sharding import make_mesh
from nrt_jax.objective.rewards import compute_rewards, score_rewards
from nrt_jax.objective.schemes import rewards_of
from nrt_jax.training.batch import answer_mask, answer_values, group_lengths
from nrt_jax.training.forward import group_logprobs
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.types import Group, SuffixLogprobs
from tests.objective import oracle
from tests.training import worlds
from tests.training.worlds import ARCHITECTURE, EOS, THINK_END, THINK_START

DEFINITION, PARAMS = worlds.tiny_decoder()
PROMPTS, TRACES, LIMIT = 5, 8, 5
EXAMPLES = [group.example for group in worlds.random_groups(PROMPTS, 1)]


def engine(slots: int) -> Engine:
    return Engine(
        DEFINITION,
        ARCHITECTURE,
        make_mesh(MeshConfig(), jax.devices()[:1]),
        slots=slots,
        max_prompt_tokens=16,
        max_new_tokens=LIMIT,
        stop_ids=frozenset({EOS, THINK_START, THINK_END}),
        num_samples=4,
    )


def requests() -> list[Request]:
    return [
        Request(
            np.append(example.prompt_tokens, THINK_START).astype(np.int32),
            index,
            TRACES,
            LIMIT,
            suffix_tokens=np.append(THINK_END, example.answer_tokens).astype(np.int32),
        )
        for index, example in enumerate(EXAMPLES)
    ]


@pytest.fixture(scope="module")
def sampled() -> tuple[list[Group], list[SuffixLogprobs]]:
    """Fewer slots than sequences, so that slots are used again."""
    traces, scores = generate_and_score(engine(6), PARAMS, requests(), jax.random.key(0), steps=3)
    return [Group(e, t) for e, t in zip(EXAMPLES, traces, strict=True)], scores


def forward(groups: Sequence[Group]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log c, log c_base and the mask of the answers, as the loss computes them."""
    batch = worlds.batch_of(list(groups))
    settings = worlds.settings(DEFINITION)
    decoder = nnx.merge(DEFINITION, PARAMS)
    scored = group_logprobs(decoder, settings, batch, baselines=True)
    log_c_PKA, log_c_base_PA = answer_values(scored.logprob_PKT, batch.groups), scored.log_c_base_PA
    assert log_c_base_PA is not None
    # A batch has the longest groups first.
    (plan,) = Packer(Layout(PROMPTS, packing=False)).plan([group_lengths(g) for g in groups])
    back_P = np.argsort(plan.groups)
    return log_c_PKA[back_P], log_c_base_PA[back_P], answer_mask(batch.groups)[back_P]


def test_scores_equal_the_training_forward(sampled):
    groups, scores = sampled
    ends = {trace.end_token for group in groups for trace in group.traces}
    assert {THINK_END, EOS, None} <= ends, "every kind of end is among them"
    assert any(len(t.tokens) == 0 for g in groups for t in g.traces), "an empty trace too"
    log_c_PKA, log_c_base_PA, _ = forward(groups)
    for p, (group, score) in enumerate(zip(groups, scores, strict=True)):
        T = len(group.example.answer_tokens)
        assert score.samples_KA.shape == (TRACES, T)
        np.testing.assert_allclose(score.samples_KA, log_c_PKA[p, :, :T], atol=1e-4)
        np.testing.assert_allclose(score.empty_A, log_c_base_PA[p, :T], atol=1e-4)


def test_equal_traces_have_equal_scores_to_the_bit(sampled):
    groups, scores = sampled
    empty = repeated = 0
    for group, score in zip(groups, scores, strict=True):
        first = {}
        for trace, log_c_A in zip(group.traces, score.samples_KA, strict=True):
            tokens = tuple(trace.tokens.tolist())
            expected_A = score.empty_A if not tokens else first.setdefault(tokens, log_c_A)
            np.testing.assert_array_equal(log_c_A, expected_A)
            empty += not tokens
            repeated += bool(tokens) and expected_A is not log_c_A
    assert empty, "an empty trace is among them"
    assert repeated, "two traces of a group are equal"


def test_the_empty_trace_alone_can_be_scored(sampled):
    """With the same logprobs, and the same traces."""
    groups, scores = sampled
    asked = [request._replace(score_samples=False) for request in requests()]
    traces, baselines = generate_and_score(engine(6), PARAMS, asked, jax.random.key(0), steps=3)
    for group, drawn, score, baseline in zip(groups, traces, scores, baselines, strict=True):
        assert [t.tokens.tolist() for t in drawn] == [t.tokens.tolist() for t in group.traces]
        np.testing.assert_array_equal(baseline.empty_A, score.empty_A)


def test_scoring_changes_no_trace(sampled):
    groups, _ = sampled
    plain = generate(engine(4), PARAMS, requests(), jax.random.key(0))
    for group, traces in zip(groups, plain, strict=True):
        for mine, theirs in zip(group.traces, traces, strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist()
            assert mine.end_token == theirs.end_token


@pytest.mark.parametrize("scheme", ["logp", "gm", "ws_inv_p", "ws_neg_log_p"])
def test_rewards_are_those_of_the_loss(scheme, sampled):
    groups, scores = sampled
    objective = ObjectiveConfig.model_validate({"scheme": scheme, "weight_cap": 20.0})
    rewards = score_rewards(scores, objective)
    expected = compute_rewards(*forward(groups), objective)
    for mine, theirs in zip(rewards, expected[:2], strict=True):
        theirs = rewards_of(scheme, theirs)
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_rewards_are_those_of_the_oracle(sampled):
    _, scores = sampled
    rewards = score_rewards(scores, ObjectiveConfig())
    for p, score in enumerate(scores):
        base = score.empty_A.astype(float).tolist()
        for k, log_c in enumerate(score.samples_KA.astype(float).tolist()):
            expected, _ = oracle.aggregate("ws_neg_log_p", log_c, base, "sum", 1e4)
            assert rewards.reward_PK[p, k] == pytest.approx(expected, rel=1e-5)
