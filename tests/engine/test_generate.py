"""From prompts to traces: what is drawn, how it is scored, when it stops, what it depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import make_mesh, param_shardings
from tests.engine.toy import (
    LLAMA_64,
    MIXED,
    NO_STOPS,
    SETTINGS,
    STOPS,
    THREE_TOKENS,
    assert_distributed,
    assert_same,
    engine,
    expected_logprobs,
    greedy,
    ids,
    logits_after,
    logprobs,
    nucleus,
    one_device,
    params,
    prompt,
    sample,
)
from tests.models.tiny import WINDOW, architecture


@pytest.mark.parametrize(("temperature", "top_p"), SETTINGS)
def test_logprobs_are_those_of_the_teacher_forced_forward(temperature, top_p):
    groups = sample(engine(), params(), MIXED, temperature=temperature, top_p=top_p)
    for request, group in zip(MIXED, groups, strict=True):
        for trace in group:
            expected = expected_logprobs(LLAMA_64, request.prompt_tokens, trace, temperature, top_p)
            np.testing.assert_allclose(logprobs(trace), expected, atol=1e-4)


@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_banned_tokens_are_never_drawn_and_the_others_share_their_probability(temperature):
    banned = frozenset(range(0, 64, 2))
    groups = sample(engine(banned_ids=banned), params(), MIXED, temperature=temperature)
    at_1 = temperature or 1.0
    for request, group in zip(MIXED, groups, strict=True):
        for trace in group:
            drawn = ids(trace)
            assert not banned & set(drawn)
            rows = logits_after(LLAMA_64, request.prompt_tokens, drawn)
            expected = [
                np.log(p_V[token] / p_V[1::2].sum())
                for p_V, token in (
                    (nucleus(r, at_1, 1.0), t) for r, t in zip(rows, drawn, strict=True)
                )
            ]
            np.testing.assert_allclose(logprobs(trace), expected, atol=1e-4)


def test_a_request_may_draw_what_the_others_are_banned_from():
    banned = frozenset(range(0, 64, 2))
    requests = [r._replace(sampling=Sampling(obeys_bans=i % 2 == 0)) for i, r in enumerate(MIXED)]
    mixed = sample(engine(banned_ids=banned), params(), requests)
    obeying = sample(engine(banned_ids=banned), params(), MIXED)
    free = sample(engine(), params(), MIXED)
    for i, group in enumerate(mixed):
        expected = free[i] if i % 2 else obeying[i]
        assert list(map(ids, group)) == list(map(ids, expected)), i


def test_sliding_window_and_a_full_cache():
    a = architecture(**WINDOW)
    full = Request(prompt(32), stream=0, num_samples=3, max_tokens=12)
    (group,) = sample(engine(a, 4, stop_ids=NO_STOPS), params(a), [full])
    for trace in group:
        assert len(trace.tokens) == 12
        expected = expected_logprobs(a, full.prompt_tokens, trace)
        np.testing.assert_allclose(logprobs(trace), expected, atol=1e-4)


def test_bfloat16_cache():
    request = Request(prompt(18), stream=0, num_samples=4, max_tokens=12)
    bf16 = engine(dtype=jnp.bfloat16)
    assert bf16.init_decode_state().layers[0].own_v_BHTd.values.dtype == jnp.bfloat16
    (group,) = sample(bf16, params(), [request])
    for trace in group:
        rows = logits_after(LLAMA_64, request.prompt_tokens, ids(trace), dtype=jnp.bfloat16)
        pairs = zip(rows, ids(trace), strict=True)
        expected = [np.log(nucleus(row, 1.0, 1.0)[token]) for row, token in pairs]
        np.testing.assert_allclose(logprobs(trace), expected, atol=0.1)


def test_the_weights_of_the_call_are_used():
    doubled = jax.tree.map(lambda w: w, params())
    doubled["head"][...] = 2 * params()["head"][...]
    request = Request(prompt(5), stream=0, num_samples=2, max_tokens=6)
    before = sample(engine(), params(), [request])
    ((trace, _),) = sample(engine(), doubled, [request])
    expected = expected_logprobs(LLAMA_64, request.prompt_tokens, trace, temperature=0.5)
    np.testing.assert_allclose(logprobs(trace), expected, atol=1e-4)
    assert_same(before, sample(engine(), params(), [request]))


def test_traces_do_not_depend_on_the_number_of_slots(mixed_traces):
    assert_same(mixed_traces, sample(engine(slots=16), params(), MIXED))


def test_traces_do_not_depend_on_the_order(mixed_traces):
    assert_same(mixed_traces, sample(engine(), params(), MIXED[::-1])[::-1])


def test_traces_do_not_depend_on_other_requests(mixed_traces):
    alone = [sample(engine(), params(), [request])[0] for request in MIXED]
    assert_same(mixed_traces, alone)


def test_a_sample_does_not_depend_on_how_many_there_are(mixed_traces):
    fewer = [request._replace(num_samples=1) for request in MIXED]
    assert_same([group[:1] for group in mixed_traces], sample(engine(), params(), fewer))


def test_every_request_gets_its_own_samples(mixed_traces):
    assert [len(group) for group in mixed_traces] == [request.num_samples for request in MIXED]
    for request, group in zip(MIXED, mixed_traces, strict=True):
        longest = int(np.max(request.max_tokens))
        assert all(1 <= len(ids(trace)) <= longest for trace in group)
        if longest > 1:
            assert len({tuple(ids(trace)) for trace in group}) == request.num_samples


def test_the_same_key_repeats_and_another_does_not(mixed_traces):
    assert_same(mixed_traces, sample(engine(), params(), MIXED))
    other = sample(engine(), params(), MIXED, seed=1)
    for group, other_group in zip(mixed_traces, other, strict=True):
        assert {tuple(ids(t)) for t in group} != {tuple(ids(t)) for t in other_group}


def test_the_stream_names_the_noise():
    requests = [Request(prompt(5), stream, num_samples=1, max_tokens=12) for stream in (4, 5, 4)]
    (first,), (other,), (again,) = sample(engine(), params(), requests)
    assert ids(first) == ids(again) != ids(other)


def test_no_two_draws_share_their_noise():
    """Under a uniform model a trace is its noise: none repeats over steps, streams and samples."""
    flat = jax.tree.map(jnp.zeros_like, params())
    run = engine(slots=16, stop_ids=NO_STOPS)
    requests = [Request(prompt(4), stream, num_samples=4, max_tokens=12) for stream in range(4)]
    rows = np.asarray(
        [
            trace.tokens
            for step in range(20)
            for group in sample(run, flat, requests, seed=step)
            for trace in group
        ]
    )
    assert rows.shape == (20 * 16, 12)
    # Not shifted either: by chance 20 of the 3200 windows of three tokens recur, half of 3200**2
    # pairs with 64**-3 each.
    windows = [tuple(row[t : t + 3]) for row in rows for t in range(10)]
    assert len(windows) - len(set(windows)) < 50
    assert len({tuple(row) for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("temperature", "top_p"),
    [
        pytest.param(*pair, marks=() if pair in ((1.0, 1.0), (0.7, 0.9)) else pytest.mark.slow)
        for pair in SETTINGS
    ],
)
def test_traces_follow_the_models_distribution(temperature, top_p):
    """First tokens, and pairs of tokens, of a model with three tokens."""
    start, a = np.asarray([1, 0, 2], np.int32), THREE_TOKENS
    toy = engine(a, 256, stop_ids=NO_STOPS)
    request = Request(start, stream=0, num_samples=4096, max_tokens=2)
    (group,) = sample(toy, params(a), [request], temperature=temperature, top_p=top_p)
    pairs = np.asarray([trace.tokens for trace in group])
    first_V = nucleus(logits_after(a, start, [0])[0], temperature, top_p)
    then_VV = np.asarray(
        [nucleus(logits_after(a, start, [v, 0])[1], temperature, top_p) for v in range(3)]
    )
    assert_distributed(np.bincount(pairs[:, 0], minlength=3), first_V)
    counts = np.bincount(pairs[:, 0] * 3 + pairs[:, 1], minlength=9)
    assert_distributed(counts, (first_V[:, None] * then_VV).ravel())


def test_a_special_token_ends_a_trace_and_is_split_off():
    request = Request(prompt(6), stream=0, num_samples=64, max_tokens=12)
    (free,) = sample(engine(slots=16, stop_ids=NO_STOPS), params(), [request])
    (group,) = sample(engine(slots=16), params(), [request])
    for trace, whole in zip(group, free, strict=True):
        stops = [t for t, token in enumerate(whole.tokens) if token in STOPS]
        kept = stops[0] if stops else 12
        assert trace.tokens.tolist() == whole.tokens[:kept].tolist()
        assert trace.tokens.dtype == np.int32
        assert trace.logprobs.dtype == np.float32
        np.testing.assert_allclose(trace.logprobs, whole.logprobs[:kept], atol=1e-5)
        assert trace.end_token == (whole.tokens[kept] if stops else None)
        expected = whole.logprobs[kept] if stops else 0.0
        np.testing.assert_allclose(trace.end_logprob, expected, atol=1e-5)
    assert {trace.end_token for trace in group} == STOPS | {None}


def test_limit_one_and_a_stop_at_the_limit():
    request = Request(prompt(6, seed=5), stream=0, num_samples=64, max_tokens=1)
    (group,) = sample(engine(slots=16), params(), [request])
    assert {(len(trace.tokens), trace.end_token in STOPS) for trace in group} == {
        (1, False),
        (0, True),
    }


def test_greedy_traces_are_the_most_probable_ones():
    groups = sample(engine(), params(), MIXED, temperature=0.0)
    for request, group in zip(MIXED, groups, strict=True):
        expected = greedy(LLAMA_64, request.prompt_tokens, request.max_tokens, STOPS)
        assert all((trace.tokens.tolist(), trace.end_token) == expected for trace in group)


def test_no_requests_and_no_samples():
    assert sample(engine(), params(), []) == []
    assert sample(engine(), params(), [MIXED[0]._replace(num_samples=0)]) == [()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt_tokens": prompt(33)}, "prompt 2: 33 tokens; the engine takes 1 to 32"),
        ({"prompt_tokens": prompt(0)}, "prompt 2: 0 tokens; the engine takes 1 to 32"),
        ({"max_tokens": 0}, "prompt 2: a limit of 0 new tokens; the engine takes 1 to 12"),
        ({"max_tokens": 13}, "prompt 2: a limit of 13 new tokens; the engine takes 1 to 12"),
    ],
)
def test_what_the_engine_cannot_take_is_refused(change, message):
    requests = [*MIXED[:2], MIXED[2]._replace(**change)]
    with pytest.raises(InputError, match=f"^{message}"):
        sample(engine(), params(), requests)


def test_padding_of_the_vocabulary_is_never_sampled():
    """Its rows would win every draw, and the traces are those of a model without it."""
    definition = nnx.graphdef(abstract_decoder(LLAMA_64, vocab_multiple=40))
    padded = nnx.to_pure_dict(params())
    padded["embedding"] = jnp.pad(padded["embedding"], ((0, 16), (0, 0)), constant_values=9.0)
    padded["head"] = jnp.pad(padded["head"], ((0, 0), (0, 16)), constant_values=9.0)
    wider = Engine(
        definition,
        LLAMA_64,
        one_device(),
        slots=4,
        max_prompt_tokens=20,
        max_new_tokens=12,
        stop_ids=STOPS,
    )
    for settings in ({"temperature": 0.0}, {"top_p": 0.9}):
        assert_same(
            sample(engine(), params(), MIXED, **settings), sample(wider, padded, MIXED, **settings)
        )


def test_eight_devices_write_what_one_writes():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(nnx.to_pure_dict(params()), param_shardings(mesh, params()))
    assert not spread["head"].is_fully_replicated
    many = engine(mesh=mesh)
    for cache in jax.tree.leaves(many.init_decode_state().layers):
        slots_and_heads = cache.sharding.shard_shape(cache.shape)[:2]
        assert slots_and_heads == (1, 1), "of 4 slots or prompts and 2 heads"
    for settings in ({"temperature": 0.0}, {"top_p": 0.9}):
        assert_same(
            sample(engine(), params(), MIXED, **settings), sample(many, spread, MIXED, **settings)
        )
