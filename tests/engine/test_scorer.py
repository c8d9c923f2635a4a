"""Logprobs of continuations against those of whole sequences, for every way to share prefixes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.engine.scorer import Continuation, PrefixGroup, Scorer, share_prefixes
from tests.engine.toy import LLAMA_64, one_device, params, prompt
from tests.models.tiny import decoder, mesh


def of(prompt_tokens, *tokens: int) -> Continuation:
    return Continuation(np.asarray(prompt_tokens, np.int32), np.asarray(tokens, np.int32))


SHOTS = prompt(20, seed=5).tolist()
ALIKE = [of([*SHOTS, 1, 2], 3, 4, 5), of([*SHOTS, 1, 2], 6), of([*SHOTS, 7], 8, 9)]
APART = [of(prompt(17, seed=s), *tokens) for s in (1, 2) for tokens in ((3,), (4, 5), (6, 7, 8))]
SHORT = [of([5], 6, 7), of([8], 9)]
EVERY = [of([5], token) for token in range(64)]


def whole_sequences(weights, continuations) -> list[tuple[float, bool]]:
    """Each from its whole sequence, which padding follows."""
    model = nnx.merge(nnx.split(decoder(LLAMA_64))[0], weights)
    sequences = [np.concatenate(continuation) for continuation in continuations]
    rows = np.stack([np.pad(tokens, (0, 32 - len(tokens))) for tokens in sequences])
    log_pi = np.asarray(jax.nn.log_softmax(model(jnp.asarray(rows))))
    scored = []
    for log_pi_TV, (prompt_tokens, tokens) in zip(log_pi, continuations, strict=True):
        at = len(prompt_tokens) - 1 + np.arange(len(tokens))
        greedy = log_pi_TV[at].argmax(-1) == tokens
        scored.append((float(log_pi_TV[at, tokens].sum()), bool(greedy.all())))
    return scored


@pytest.mark.parametrize("devices", [1, 2])
def test_scores_are_those_of_whole_sequences(devices):
    weights, on = params(), one_device() if devices == 1 else mesh(data=2)
    scorer = Scorer(nnx.split(decoder(LLAMA_64))[0], on)
    for continuations in (ALIKE, APART, EVERY):
        scored = dict(scorer.score(weights, continuations))
        expected = whole_sequences(weights, continuations)
        assert sorted(scored) == list(range(len(continuations)))
        for i, (logprob, is_greedy) in enumerate(expected):
            assert scored[i].logprob == pytest.approx(logprob, abs=1e-4)
            assert scored[i].is_greedy == is_greedy
    assert sum(scored[i].is_greedy for i in scored) == 1, "one token is the most probable"


def test_shots_are_run_once_and_long_prompts_once_each():
    assert share_prefixes(ALIKE) == [PrefixGroup([0, 1, 2], 20)]
    assert share_prefixes(APART) == [PrefixGroup([0, 1, 2], 16), PrefixGroup([3, 4, 5], 16)]
    assert share_prefixes(SHORT) == [PrefixGroup([0, 1], 0)]


def test_the_last_token_of_a_prompt_is_not_shared():
    """Its output scores the first token of each continuation."""
    assert share_prefixes([of([1, 2, 3], 4), of([1, 2, 3], 5)]) == [PrefixGroup([0, 1], 2)]
    assert share_prefixes([of([1, 2], 4), of([1, 2, 3], 5)]) == [PrefixGroup([0, 1], 1)]
