"""Which shard runs which prompt: one each, of one width, and no part twice."""

import jax
import numpy as np
import pytest

from nrt_jax.engine.engine import Engine
from nrt_jax.engine.packed_requests import packed_sampling
from nrt_jax.engine.prompt_queue import PromptQueue
from nrt_jax.engine.requests import Job, Request, RequestFailed
from tests.engine.toy import prompt


class Recorder(Engine):
    """Records what it is to prefill; a prefix is the list of the prompts' tokens so far."""

    @property
    def shards(self):
        return 3

    @property
    def num_samples(self):
        return 4

    def __init__(self, chunk=None):
        self.prefill_chunk, self.one_size, self.calls, self.fails = chunk, False, [], False

    def empty_prefix(self, capacity):
        return [[] for _ in range(self.shards)]

    def prefill_rows(self, params, prefix, tokens_RS, length_R):
        if self.fails:
            raise MemoryError("no room")
        parts = [row[:n].tolist() for row, n in zip(tokens_RS, length_R, strict=True)]
        self.calls.append((tokens_RS.shape, prefix is not None))
        before = [[]] * self.shards if prefix is None else prefix
        return [a + b for a, b in zip(before, parts, strict=True)]


def queue(*jobs, chunk=None):
    """Of jobs of (tokens, samples); their tickets count from 0."""
    engine = Recorder(chunk)
    prompts = PromptQueue(engine, None)
    for ticket, (tokens, samples) in enumerate(jobs):
        prompts.add(job(ticket, tokens, samples))
    return engine, prompts


def job(ticket, tokens, samples):
    request = Request(prompt(tokens, seed=ticket), ticket, samples, 9)
    return Job(
        ticket,
        request,
        key_data=np.asarray(jax.random.key_data(jax.random.key(0))),
        limits=request.limits_K,
        stop_ids=frozenset(),
        sampling=packed_sampling(request.sampling),
    )


def ready(prompts):
    """(ticket, first sample, end) of the next row of each shard, whose prompt has run."""
    rows = [prompts.ready(shard) for shard in range(3)]
    for shard, row in enumerate(rows):
        assert row is None or row.prefix[shard] == row.job.request.prompt_tokens.tolist()
    return [None if row is None else (row.job.ticket, row.first, row.end) for row in rows]


def test_every_shard_runs_a_prompt_of_its_own():
    engine, prompts = queue((5, 4), (9, 4), (3, 4), (8, 4))
    assert prompts.run([0, 1, 2], pauses=False)
    assert ready(prompts) == [(0, 0, 4), (1, 0, 4), (2, 0, 4)]
    assert prompts.samples == 16
    assert engine.calls == [((3, 16), False)]


def test_prompts_of_one_width_run_together():
    """So that what a prompt is rounded with does not depend on its neighbours."""
    engine, prompts = queue((5, 1), (30, 1), (9, 1))
    assert prompts.run([2, 0, 1], pauses=False)
    assert ready(prompts) == [(2, 0, 1), None, (0, 0, 1)], "shards in the order asked for"
    assert prompts.run([1], pauses=False)
    assert ready(prompts)[1] == (1, 0, 1)
    assert engine.calls == [((3, 16), False), ((3, 32), False)]
    assert not prompts.run([0], pauses=False)


def test_busy_shards_take_a_prompt_ahead_while_enough_wait():
    _, prompts = queue(*[(5, 4)] * 4)
    assert prompts.samples == 16
    assert prompts.run([1], pauses=False)
    assert ready(prompts) == [(1, 0, 4), (0, 0, 4), (2, 0, 4)]
    prompts.started(prompts.ready(1), 4)
    assert prompts.samples == 12
    assert prompts.run([1], pauses=False)
    assert ready(prompts) == [(1, 0, 4), (3, 0, 4), (2, 0, 4)]


def test_many_samples_of_one_prompt_spread_over_the_shards():
    _, prompts = queue((5, 9))
    assert prompts.run([0, 1, 2], pauses=False)
    assert ready(prompts) == [(0, 0, 4), (0, 4, 8), (0, 8, 9)]


def test_long_prompts_run_in_parts_in_step():
    engine, prompts = queue((40, 1), (45, 1), (20, 1), chunk=16)
    assert not prompts.run([0, 1], pauses=True)
    prompts.remove(1)
    assert not prompts.run([0, 1], pauses=True)
    assert prompts.run([0, 1], pauses=True)
    assert ready(prompts) == [(0, 0, 1), None, None], "the second was cancelled"
    assert prompts.run([1], pauses=False)
    assert ready(prompts) == [(0, 0, 1), (2, 0, 1), None]
    assert engine.calls == [((3, 16), True)] * 5


def test_a_round_that_fails_costs_its_first_job_alone():
    engine, prompts = queue((5, 1), (6, 1))
    engine.fails = True
    with pytest.raises(RequestFailed, match="ticket 0"):
        prompts.run([0, 1], pauses=False)
    prompts.remove(0)
    assert prompts.samples == 1
    engine.fails = False
    assert prompts.run([0, 1], pauses=False)
    assert ready(prompts) == [(1, 0, 1), None, None]
