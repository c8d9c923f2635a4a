"""One request: what it may ask for, its own ends, and its failure, which is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.engine.requests import Request, RequestFailed, request_key
from nrt_jax.engine.sampling import Sampling
from nrt_jax.engine.scheduler import Scheduler
from nrt_jax.errors import InputError
from tests.engine.toy import (
    LLAMA_64,
    NO_STOPS,
    STOPS,
    engine,
    ids,
    logits_after,
    logprobs,
    params,
    prompt,
    sample,
)

KEY = jax.random.key(0)


@pytest.mark.parametrize(
    ("sampling", "stream", "said"),
    [
        (Sampling(top_k=2**31), 0, "top_k 2147483648; it must be 0 to 2147483647"),
        (Sampling(top_k=-1), 0, "top_k -1; it must be"),
        (Sampling(min_tokens=2**31), 0, "min_tokens 2147483648; it must be"),
        (Sampling(), 2**31, "stream 2147483648; it must be"),
        (Sampling(), -(2**31) - 1, "stream -2147483649; it must be"),
        (Sampling(temperature=float("nan")), 0, "temperature nan; it must be a finite number"),
        (Sampling(repetition_penalty=1e39), 0, "repetition_penalty 1e.39; it must be a finite"),
    ],
)
def test_what_the_device_cannot_hold_is_refused_before_it_is_queued(sampling, stream, said):
    scheduler = Scheduler(engine(), params())
    with pytest.raises(InputError, match=f"^prompt: {said}"):
        scheduler.submit(Request(prompt(6), stream, 1, 12, sampling), KEY)
    assert not scheduler.busy


def test_seeds_of_64_bits_have_keys_of_their_own():
    assert bool(jnp.all(key_bits(7) == jax.random.key_data(jax.random.key(7))))
    seeds = [0, 7, 2**31, 2**32, 2**32 + 7, 2**63 - 1, -2, -(2**63)]
    assert len({tuple(key_bits(seed).tolist()) for seed in seeds}) == len(seeds)


def key_bits(seed: int) -> jax.Array:
    return jax.random.key_data(request_key(seed))


def test_a_request_that_cannot_be_prefilled_ends_alone():
    run = engine()
    scheduler, prefill_rows = Scheduler(run, params()), run.prefill_rows
    tickets = [scheduler.submit(Request(prompt(length), 0, 2, 9), KEY) for length in (5, 9, 5)]

    def fails(*arguments):
        if 9 in arguments[-1]:
            raise MemoryError("no room")
        return prefill_rows(*arguments)

    events, failed = [], []
    run.prefill_rows = fails
    try:
        while scheduler.busy:
            try:
                events += scheduler.step()
            except RequestFailed as failure:
                failed.append((failure.ticket, type(failure.__cause__)))
    finally:
        del run.prefill_rows
    assert failed == [(tickets[1], MemoryError)]
    finished = [event.ticket for event in events if event.finished]
    assert sorted(finished) == [tickets[0]] * 2 + [tickets[2]] * 2
    # Where all requests belong together, the error is theirs.
    run.prefill_rows = fails
    with pytest.raises(MemoryError):
        sample(run, params(), [Request(prompt(9), 0, 1, 9)])
    del run.prefill_rows


def test_ignored_stop_tokens_are_tokens_like_others():
    """The same noise as in an engine that has none, and a request's own stops still count."""
    request = Request(prompt(6), stream=3, num_samples=4, max_tokens=12)
    (expected,) = sample(engine(stop_ids=NO_STOPS), params(), [request])
    (got,) = sample(engine(), params(), [request], ignores_eos=True)
    assert [ids(trace) for trace in got] == [ids(trace) for trace in expected]
    assert any(STOPS & set(trace.tokens.tolist()) for trace in got), "nothing was ignored"
    own = frozenset({ids(expected[0])[5]})
    (got,) = sample(engine(), params(), [request], ignores_eos=True, stop_ids=own)
    assert got[0].end_token in own


def test_no_token_ends_a_sequence_before_min_tokens():
    own, least = frozenset({3, 11}), 6
    request = Request(prompt(6), stream=3, num_samples=8, max_tokens=12)
    (free,) = sample(engine(slots=16), params(), [request], stop_ids=own)
    assert any(len(ids(trace)) <= least for trace in free), "none is held back"
    (group,) = sample(engine(slots=16), params(), [request], stop_ids=own, min_tokens=least)
    for trace in group:
        drawn = ids(trace)
        assert not (STOPS | own) & set(drawn[:least])
        assert len(drawn) > least
        rows = logits_after(LLAMA_64, request.prompt_tokens, drawn).astype(np.float64)
        rows[:least, sorted(STOPS | own)] = -np.inf
        pairs = zip(rows, drawn, strict=True)
        expected = [row[token] - np.log(np.exp(row).sum()) for row, token in pairs]
        np.testing.assert_allclose(logprobs(trace), expected, atol=1e-4)
