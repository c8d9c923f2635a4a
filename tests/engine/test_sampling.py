"""Penalty, temperature, truncation, and the logprob of what was drawn."""

import math
import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import NamedSharding
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nrt_jax.engine.decode_state import slot_sampling
from nrt_jax.engine.sampling import Sampling, fit_vocab, most_probable, sample, sampled_vocab
from nrt_jax.models.sharding import partition_spec
from tests.engine.toy import SETTINGS, assert_distributed, nucleus
from tests.models.tiny import mesh

jitted = jax.jit(sample)


def draw(logits_BV, temperature=1.0, top_p=1.0, seed=0, seen=(), **settings):
    """Tokens and logprobs of rows that share their settings, or have one each."""
    logits_BV = jnp.asarray(logits_BV, jnp.float32)
    B, V = logits_BV.shape
    columns = {"temperature": temperature, "top_p": top_p} | settings
    rows = zip(
        *(np.broadcast_to(column, (B,)).tolist() for column in columns.values()), strict=True
    )
    sampling = slot_sampling([Sampling(**dict(zip(columns, row, strict=True))) for row in rows])
    seen_BV = jnp.asarray(np.tile(np.isin(np.arange(V), list(seen)), (B, 1)))
    keys_B = jax.random.split(jax.random.key(seed), B)
    token_B, logprob_B = jitted(logits_BV, seen_BV, keys_B, jax.tree.map(jnp.asarray, sampling))
    return np.asarray(token_B), np.asarray(logprob_B)


@pytest.mark.parametrize(("temperature", "top_p"), [*SETTINGS, (1.7, 0.3)])
def test_logprob_is_that_of_the_sampled_distribution(temperature, top_p):
    logits_BV = 3 * np.random.default_rng(0).normal(size=(64, 50))
    token_B, logprob_B = draw(logits_BV, temperature, top_p)
    expected = [
        np.log(nucleus(row, temperature, top_p)[token])
        for row, token in zip(logits_BV, token_B, strict=True)
    ]
    np.testing.assert_allclose(logprob_B, expected, atol=1e-5)


@pytest.mark.parametrize(("temperature", "top_p"), [*SETTINGS, (2.0, 0.7), (1.0, 0.5)])
def test_draws_follow_the_distribution(temperature, top_p):
    logits_V = np.log([0.5, 0.12, 0.38])
    token_B, _ = draw(np.tile(logits_V, (20_000, 1)), temperature, top_p)
    assert_distributed(np.bincount(token_B, minlength=3), nucleus(logits_V, temperature, top_p))


def test_nucleus_worked_example():
    token_B, logprob_B = draw(np.tile(np.log([0.2, 0.5, 0.3]), (200, 1)), 1.0, 0.7)
    assert set(token_B) == {1, 2}
    np.testing.assert_allclose(np.exp(logprob_B), np.where(token_B == 1, 0.625, 0.375), rtol=1e-5)


def test_temperature_comes_before_the_nucleus():
    # [.5 .3 .2] at temperature 0.5 is about [.66 .24 .11], of which the first reaches 0.6 alone.
    token_B, logprob_B = draw(np.tile(np.log([0.5, 0.3, 0.2]), (200, 1)), 0.5, 0.6)
    assert set(token_B) == {0}
    np.testing.assert_allclose(logprob_B, 0, atol=1e-6)


@pytest.mark.parametrize(
    ("probabilities", "top_p", "kept"),
    [
        ([0.25, 0.5, 0.25], 0.5, {1}),
        ([0.25, 0.5, 0.25], 0.51, {0, 1}),
        ([0.25, 0.25, 0.25, 0.25], 0.5, {0, 1}),
        ([0.25, 0.5, 0.25], 1e-6, {1}),
        ([0.25, 0.5, 0.25], 1.0, {0, 1, 2}),
    ],
    ids=["reached", "just above", "ties by id", "one is left", "all"],
)
def test_who_is_in_the_nucleus(probabilities, top_p, kept):
    token_B, _ = draw(np.tile(np.log(probabilities), (300, 1)), 1.0, top_p)
    assert set(token_B) == kept


@pytest.mark.parametrize("top_p", [1.0, 0.5])
def test_temperature_zero_takes_the_best_and_scores_it_untempered(top_p):
    logits_BV = np.random.default_rng(1).normal(size=(32, 20))
    token_B, logprob_B = draw(logits_BV, 0.0, top_p)
    np.testing.assert_array_equal(token_B, logits_BV.argmax(axis=1))
    expected = [np.log(nucleus(row, 1.0, 1.0).max()) for row in logits_BV]
    np.testing.assert_allclose(logprob_B, expected, atol=1e-5)


def test_a_row_does_not_see_its_neighbours():
    logits_BV = 3 * np.random.default_rng(2).normal(size=(64, 500))
    even = np.arange(64) % 2 == 0
    plain = draw(logits_BV, 1.0, 1.0)
    mixed = draw(logits_BV, np.where(even, 1.0, 0.3), np.where(even, 1.0, 0.4))
    for one, other in zip(plain, mixed, strict=True):
        np.testing.assert_array_equal(one[even], other[even])


def test_rows_have_noise_of_their_own():
    token_B, _ = draw(np.zeros((64, 1000)), 1.0, 1.0)
    assert len(set(token_B)) > 50


def test_extreme_logits_stay_finite():
    logits_BV = np.asarray([[1e4, -1e4, 0.0], [-np.inf, 0.0, -1e30], [-1e4, -1e4, -1e4]])
    for temperature, top_p in [(1.0, 1.0), (0.01, 0.9), (0.0, 0.9)]:
        token_B, logprob_B = draw(logits_BV, temperature, top_p)
        assert list(token_B[:2]) == [0, 1]
        assert np.isfinite(logprob_B).all()


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 7},
        {"min_p": 0.2},
        {"repetition_penalty": 1.4},
        {"repetition_penalty": 0.7, "temperature": 0.8},
        {"top_k": 9, "top_p": 0.8, "min_p": 0.1, "repetition_penalty": 1.2, "temperature": 1.3},
    ],
    ids=str,
)
def test_the_distribution_is_that_of_transformers(settings):
    """Which tokens are kept, and the logprob of each that is drawn."""
    logits_V = 2 * np.random.default_rng(3).normal(size=40)
    seen = [1, 5, 6, 20, 33]
    chain = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    scores = torch.tensor(logits_V, dtype=torch.float32)[None]
    for name, processor in chain.items():
        if name in settings:
            scores = processor(settings[name])(torch.tensor([seen]), scores)
    expected_V = torch.log_softmax(scores[0], dim=-1).numpy()
    token_B, logprob_B = draw(np.tile(logits_V, (4000, 1)), seen=seen, **settings)
    np.testing.assert_allclose(logprob_B, expected_V[token_B], atol=1e-5)
    assert_distributed(np.bincount(token_B, minlength=40), np.exp(expected_V.astype(np.float64)))


def test_rare_tokens_are_drawn_as_often_as_they_should_be():
    """Of 40,000 entries, all but one share a probability of 1 in 25."""
    V, B = 40_000, 1_000
    p_V = np.full(V, 0.04 / (V - 1))
    p_V[123] = 0.96
    token_B, logprob_B = draw(np.tile(np.log(p_V), (B, 1)))
    rare_B = token_B != 123
    assert 15 <= rare_B.sum() <= 70, "40 are expected, and 6.2 is their standard deviation"
    assert len(set(token_B[rare_B])) > 0.9 * rare_B.sum()
    np.testing.assert_allclose(logprob_B, np.log(p_V)[token_B], atol=1e-4)


def test_what_has_no_probability_is_never_drawn():
    """Whole blocks of the vocabulary, and single entries of a block, also at either end."""
    logits_V = np.full(700, -np.inf)
    possible = [130, 131, 255, 256, 390, 511, 640]
    logits_V[possible] = [0.0, -3.0, 1.0, 0.5, -1.0, 2.0, -6.0]
    token_B, _ = draw(np.tile(logits_V, (20_000, 1)))
    assert_distributed(np.bincount(token_B, minlength=700), nucleus(logits_V, 1.0, 1.0))


def test_most_probable_tokens_are_those_of_the_softmax():
    logits_BV = np.random.default_rng(4).normal(size=(5, 300)).astype(np.float32)
    id_BR, logprob_BR = most_probable(jnp.asarray(logits_BV), 4)
    log_pi_BV = logits_BV - np.log(np.exp(logits_BV.astype(np.float64)).sum(1, keepdims=True))
    expected_BR = np.argsort(-log_pi_BV, axis=1)[:, :4]
    np.testing.assert_array_equal(id_BR, expected_BR)
    np.testing.assert_allclose(logprob_BR, np.take_along_axis(log_pi_BV, expected_BR, 1), atol=1e-5)


def test_a_sharded_vocabulary_draws_the_same_and_is_not_gathered():
    """The devices exchange sums of blocks and one block per row."""
    rng, on, V = np.random.default_rng(0), mesh(data=2, tensor=4), 1000
    logits_BV = jnp.asarray(rng.normal(size=(8, V)), jnp.float32)
    seen_BV, keys_B = jnp.zeros((8, V), bool), jax.random.split(jax.random.key(0), 8)
    sampling = slot_sampling([Sampling(), Sampling(temperature=0.5)] * 4)
    expected = jax.jit(sample)(logits_BV, seen_BV, keys_B, sampling)
    size = sampled_vocab(V, on)
    assert size == 1024
    vocab = NamedSharding(on, partition_spec(("batch", "vocab")))
    wide = jax.device_put(fit_vocab(logits_BV, size), vocab)
    seen_BV = jax.device_put(jnp.zeros((8, size), bool), vocab)
    program = jax.jit(partial(sample, mesh=on)).lower(wide, seen_BV, keys_B, sampling).compile()
    token_B, logprob_B = program(wide, seen_BV, keys_B, sampling)
    np.testing.assert_array_equal(token_B, expected[0])
    np.testing.assert_allclose(logprob_B, expected[1], atol=1e-5)
    # Truncation alone, in a conditional's computations, sorts whole rows.
    entry = program.as_text().split("ENTRY")[1]
    gathered = re.findall(r"= \w+\[([\d,]+)\]\S* all-gather\(", entry)
    assert all(math.prod(map(int, dims.split(","))) < 8 * size / 4 for dims in gathered), gathered
