"""Slots, cache sizes and dispatches: what a caller sees does not depend on them."""

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.generation.logits_process import RepetitionPenaltyLogitsProcessor

from nrt_jax.config.mesh import MeshConfig
from nrt_jax.engine import engine as engine_module
from nrt_jax.engine import scheduler as scheduler_module
from nrt_jax.engine.decode_state import bucket, sizes_of
from nrt_jax.engine.generate import generate_and_score
from nrt_jax.engine.kv_cache import Sizes
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.engine.scheduler import Scheduler
from nrt_jax.errors import InputError
from nrt_jax.models.sharding import make_mesh, param_shardings
from tests.engine.toy import (
    LLAMA_64,
    MIXED,
    NO_STOPS,
    STOPS,
    assert_same,
    engine,
    expected_logprobs,
    ids,
    logits_after,
    logprobs,
    params,
    prompt,
    prompts,
    sample,
)

KEY = jax.random.key(0)


def sizes(scheduler):
    return sizes_of(scheduler._state)


def drain(scheduler):
    """Every sequence's tokens and how it ended, by (ticket, sample)."""
    tokens, ends = {}, {}
    while scheduler.busy:
        for event in scheduler.step():
            key = event.ticket, event.sample
            assert key not in ends, "nothing follows the end"
            assert len(event.tokens) == len(event.logprobs) > 0
            tokens.setdefault(key, []).extend(event.tokens.tolist())
            if event.finished:
                ends[key] = event.finished
    return tokens, ends


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_traces_do_not_depend_on_the_steps_of_a_dispatch(mixed_traces, steps):
    assert_same(mixed_traces, sample(engine(), params(), MIXED, steps=steps))


@pytest.mark.parametrize("samples", [1, 2])
def test_traces_do_not_depend_on_how_many_samples_share_a_prompt(mixed_traces, samples):
    assert_same(mixed_traces, sample(engine(num_samples=samples), params(), MIXED))


def test_a_prompt_in_parts_is_the_prompt():
    whole, parts = engine(), engine(prefill_chunk=16)
    requests = [
        Request(tokens, stream=i, num_samples=2, max_tokens=8)
        for i, tokens in enumerate(prompts(30, 16, 17, 32, 3, 31))
    ]
    assert_same(sample(whole, params(), requests), sample(parts, params(), requests))
    assert parts.compiled["prefill_part"] == 1, "a capacity of 32 tokens, 16 per part"


def test_a_long_prompt_lets_the_others_decode():
    """Its parts are run one a dispatch while slots are busy; results are read a dispatch late."""

    def heard(run):
        scheduler = Scheduler(run, params(), steps=1)
        first = scheduler.submit(Request(prompt(4), 0, 1, 12), KEY)
        scheduler.step()
        second = scheduler.submit(Request(prompt(32), 1, 1, 12), KEY)
        both = {first: "first", second: "second"}
        return [{both[event.ticket] for event in scheduler.step()} for _ in range(3)]

    one, two = {"first"}, {"first", "second"}
    assert heard(engine(stop_ids=NO_STOPS)) == [one, two, two]
    assert heard(engine(prefill_chunk=16, stop_ids=NO_STOPS)) == [one, one, two]


def test_prompt_slots_grow_when_stragglers_hold_them():
    """Of each group of four one sequence is long, so four prompts are under way in 16 slots."""
    run = engine(slots=16, stop_ids=NO_STOPS)
    requests = [
        Request(tokens, stream=i, num_samples=4, max_tokens=(12, 1, 2, 1))
        for i, tokens in enumerate(prompts(*[5] * 12))
    ]
    scheduler = Scheduler(run, params(), steps=1)
    for request in requests:
        scheduler.submit(request, KEY)
    assert sizes(scheduler).prompts == 4
    tokens, ends = drain(scheduler)
    assert sizes(scheduler).prompts == 16
    assert set(ends.values()) == {"length"}
    alone = engine(slots=4, stop_ids=NO_STOPS)
    for ticket, request in enumerate(requests):
        (group,) = sample(alone, params(), [request])
        assert [ids(trace) for trace in group] == [tokens[ticket, k] for k in range(4)]


def test_the_capacity_for_own_tokens_grows_and_shrinks(monkeypatch):
    monkeypatch.setattr(engine_module, "SMALLEST_OWN_TOKENS", 32)
    run = engine(slots=4, stop_ids=NO_STOPS, max_new_tokens=120)
    long = Request(prompt(9), 0, 1, 100)
    short = [Request(tokens, 1 + i, 1, 3) for i, tokens in enumerate(prompts(*[4] * 140))]
    scheduler = Scheduler(run, params(), steps=4)
    for request in [long, *short]:
        scheduler.submit(request, KEY)
    capacities, tokens = [], {}
    while scheduler.busy:
        for event in scheduler.step():
            tokens.setdefault(event.ticket, []).extend(event.tokens.tolist())
        capacities.append(sizes(scheduler).own_tokens)
        # Tokens that the host has not read yet count too.
        slot_map, active_B = scheduler._state.slot_map, np.asarray(scheduler._state.active_B)
        assert (np.asarray(slot_map.own_length_B)[active_B] <= capacities[-1]).all()
    assert sorted(set(capacities)) == [32, 64, 128]
    assert capacities[-1] == 32
    (((trace,),), (trace_8,)) = (
        sample(run, params(), [long]),
        sample(run, params(), [long._replace(max_tokens=8)])[0],
    )
    assert tokens[0] == ids(trace)
    assert len(ids(trace)) == 100
    assert ids(trace)[:8] == ids(trace_8)
    expected = expected_logprobs(LLAMA_64, long.prompt_tokens, trace)
    np.testing.assert_allclose(logprobs(trace), expected, atol=1e-4)


@pytest.mark.slow
def test_few_sequences_move_into_few_slots(monkeypatch):
    """And back when more requests come; in 16 slots, of one device and of eight."""
    monkeypatch.setattr(scheduler_module, "SLOT_STEPS_WORTH_A_MOVE", 64)
    requests = [
        Request(tokens, i, 3, (4 if i % 3 else 80, 2, 1))
        for i, tokens in enumerate(prompts(*[5] * 6))
    ]
    options = {"stop_ids": NO_STOPS, "max_new_tokens": 80}
    alone = [sample(engine(**options), params(), [request])[0] for request in requests]
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    spread = jax.device_put(nnx.to_pure_dict(params()), param_shardings(mesh, params()))
    for run, weights, fewest in (
        (engine(slots=16, **options), params(), 1),
        (engine(slots=16, mesh=mesh, **options), spread, 4),
    ):
        scheduler = Scheduler(run, weights, steps=1)
        tokens, slots = {}, set()
        for first in (0, 3):
            for request in requests[first : first + 3]:
                scheduler.submit(request, KEY)
            while scheduler.busy:
                for event in scheduler.step():
                    tokens.setdefault((event.ticket, event.sample), []).extend(
                        event.tokens.tolist()
                    )
                slots.add(len(scheduler._table))
                assert sizes(scheduler).prompts <= len(scheduler._table), "none that no slot needs"
                if first == 0 and len(scheduler._table) == fewest:
                    break
        assert slots >= {16, 4, fewest}
        for ticket, group in enumerate(alone):
            for k, trace in enumerate(group):
                assert tokens[ticket, k] == ids(trace)


def test_each_sample_may_have_a_limit_of_its_own():
    run, limits = engine(stop_ids=NO_STOPS), (3, 12, 1, 7, 5)
    (group,) = sample(run, params(), [Request(prompt(7), 0, 5, limits)])
    (whole,) = sample(run, params(), [Request(prompt(7), 0, 5, 12)])
    assert [ids(trace) for trace in group] == [
        ids(trace)[:limit] for trace, limit in zip(whole, limits, strict=True)
    ]


def test_requests_may_come_at_any_time(mixed_traces):
    scheduler = Scheduler(engine(), params(), steps=2)
    tokens, ends, waiting = {}, {}, list(MIXED)
    while scheduler.busy or waiting:
        if waiting:
            scheduler.submit(waiting.pop(0), KEY)
        for event in scheduler.step():
            tokens.setdefault((event.ticket, event.sample), []).extend(event.tokens.tolist())
            ends[event.ticket, event.sample] = event.finished
    for ticket, group in enumerate(mixed_traces):
        for k, trace in enumerate(group):
            assert tokens[ticket, k] == ids(trace)
            assert ends[ticket, k] == ("length" if trace.end_token is None else "stop")


@pytest.mark.parametrize("after", [0, 1, 2, 3])
def test_a_cancelled_request_is_not_heard_of_and_frees_its_slots(mixed_traces, after):
    scheduler = Scheduler(engine(), params(), steps=2)
    tickets = [scheduler.submit(request, KEY) for request in MIXED]
    tokens = {}

    def hear(events):
        for event in events:
            tokens.setdefault((event.ticket, event.sample), []).extend(event.tokens.tolist())

    for _ in range(after):
        hear(scheduler.step())
    cancelled = {tickets[0], tickets[2]}
    for ticket in cancelled:
        scheduler.cancel(ticket)
        scheduler.cancel(ticket)
    heard = {key: list(drawn) for key, drawn in tokens.items() if key[0] in cancelled}
    while scheduler.busy:
        hear(scheduler.step())
    assert scheduler.slots_in_use == scheduler.waiting == 0
    assert {key: drawn for key, drawn in tokens.items() if key[0] in cancelled} == heard
    for ticket in set(tickets) - cancelled:
        for k, trace in enumerate(mixed_traces[ticket]):
            assert tokens[ticket, k] == ids(trace)


def test_one_sample_may_be_cancelled(mixed_traces):
    scheduler = Scheduler(engine(slots=16), params(), steps=2)
    tickets = [scheduler.submit(request, KEY) for request in MIXED]
    scheduler.step()
    scheduler.cancel(tickets[2], 1)
    assert scheduler.slots_in_use == sum(request.num_samples for request in MIXED) - 1
    tokens, _ = drain(scheduler)
    for ticket, group in enumerate(mixed_traces):
        for k, trace in enumerate(group):
            cancelled = (ticket, k) == (tickets[2], 1)
            assert tokens.get((ticket, k)) == (None if cancelled else ids(trace))


def test_a_request_may_stop_at_tokens_of_its_own():
    request = Request(prompt(6), stream=0, num_samples=8, max_tokens=12)
    run = engine(slots=16)
    (whole,) = sample(run, params(), [request])
    stops = frozenset({int(whole[0].tokens[2]), int(whole[1].tokens[1])})
    (group,) = sample(run, params(), [request], stop_ids=stops)
    for trace, before in zip(group, whole, strict=True):
        drawn = ids(before)
        found = [t for t, token in enumerate(drawn) if token in stops | STOPS]
        assert ids(trace) == (drawn[: found[0] + 1] if found else drawn)


def test_too_many_stops_are_refused():
    request = Request(prompt(6), 0, 1, 12, Sampling(stop_ids=frozenset(range(17))))
    with pytest.raises(InputError, match=r"^prompt: 17 stop tokens; a request takes 16$"):
        Scheduler(engine(), params()).submit(request, KEY)


def test_the_penalty_counts_the_prompt_and_what_was_written():
    request = Request(prompt(12), stream=0, num_samples=2, max_tokens=12)
    (group,) = sample(
        engine(stop_ids=NO_STOPS), params(), [request], repetition_penalty=1.5, temperature=0.7
    )
    for trace in group:
        rows = logits_after(LLAMA_64, request.prompt_tokens, ids(trace))
        for t, (row, token) in enumerate(zip(rows, ids(trace), strict=True)):
            seen = torch.tensor([[*request.prompt_tokens.tolist(), *ids(trace)[:t]]])
            scores = RepetitionPenaltyLogitsProcessor(1.5)(seen, torch.tensor(row.copy())[None])
            expected = torch.log_softmax(scores[0] / 0.7, dim=-1)[token]
            np.testing.assert_allclose(logprobs(trace)[t], expected, atol=1e-4)


def test_the_most_probable_tokens_are_reported():
    run = engine(top_logprobs=3, stop_ids=NO_STOPS)
    scheduler = Scheduler(run, params(), steps=4)
    scheduler.submit(Request(prompt(5), 0, 2, 9, Sampling(temperature=0.5)), KEY)
    drawn, top_ids, top = {}, {}, {}
    while scheduler.busy:
        for event in scheduler.step():
            drawn.setdefault(event.sample, []).extend(event.tokens.tolist())
            top_ids.setdefault(event.sample, []).extend(event.top_ids.tolist())
            top.setdefault(event.sample, []).extend(event.top_logprobs.tolist())
    for k in range(2):
        log_pi = jax.nn.log_softmax(logits_after(LLAMA_64, prompt(5), drawn[k]))
        order = np.argsort(-np.asarray(log_pi), axis=1)[:, :3]
        np.testing.assert_array_equal(top_ids[k], order)
        expected = np.take_along_axis(np.asarray(log_pi), order, axis=1)
        np.testing.assert_allclose(top[k], expected, atol=1e-4)


@pytest.mark.parametrize("n", [2, 16, 17, 31])
def test_prompts_are_scored(n):
    tokens = prompt(n)
    scores, top_ids, top = engine().prompt_logprobs(params(), tokens, 2)
    log_pi = np.asarray(jax.nn.log_softmax(logits_after(LLAMA_64, tokens[:1], tokens[1:])))
    assert scores.shape == (n - 1,)
    np.testing.assert_allclose(scores, log_pi[np.arange(n - 1), tokens[1:]], atol=1e-4)
    np.testing.assert_array_equal(top_ids, np.argsort(-log_pi, axis=1)[:, :2])
    np.testing.assert_allclose(top, -np.sort(-log_pi, axis=1)[:, :2], atol=1e-4)


@pytest.mark.parametrize("samples", [2, 4])
def test_suffixes_are_scored_on_the_caches(samples):
    """After traces that stopped and traces that were cut; more of them than slots."""
    suffixes = [np.asarray([9, 3, 5], np.int32), np.asarray([9, *range(20)], np.int32)]
    requests = [
        Request(tokens, i, 7, 12, suffix_tokens=suffixes[i % 2])
        for i, tokens in enumerate(prompts(5, 18, 30))
    ]
    groups, scores = generate_and_score(
        engine(num_samples=samples), params(), requests, KEY, steps=3
    )
    assert_same(groups, sample(engine(), params(), requests))
    assert {trace.end_token is None for group in groups for trace in group} == {True, False}
    for request, group, score in zip(requests, groups, scores, strict=True):
        suffix = request.suffix_tokens
        assert suffix is not None
        for trace_tokens, actual in zip(
            [*(trace.tokens for trace in group), np.zeros(0, np.int32)],
            [*score.samples_KA, score.empty_A],
            strict=True,
        ):
            before = np.concatenate([request.prompt_tokens, trace_tokens, suffix[:1]])
            log_pi = jax.nn.log_softmax(logits_after(LLAMA_64, before, suffix[1:]))
            expected = np.asarray(log_pi)[np.arange(len(suffix) - 1), suffix[1:]]
            np.testing.assert_allclose(actual, expected, atol=1e-4)


def test_nothing_is_compiled_twice():
    """Programs are bounded by the cache sizes, which are powers of two; a second run adds none."""
    run = engine(slots=8, num_samples=3, stop_ids=NO_STOPS, max_new_tokens=70)

    def go(seed):
        rng = np.random.default_rng(0)
        requests = [
            Request(prompt(int(rng.integers(1, 33))), i, int(rng.integers(1, 5)), 70)
            for i in range(6)
        ]
        sample(run, params(), requests, seed=seed, steps=4)

    go(0)
    go(1)
    before = dict(run.compiled)
    go(2)
    assert dict(run.compiled) == before
    assert run.compiled["prefill"] <= 2, "prompts of 16 and of 32 tokens"
    capacities = {bucket(n) for n in range(1, 33)}
    assert run.compiled["generate"] <= len(capacities) * len({32, 64, 128}) * 2 * 2
    assert run.largest_sizes == Sizes(8, 32, 128)
