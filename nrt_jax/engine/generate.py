"""Prompts to traces: all requests through one scheduler, the same on every host.

Letters: T tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax

from nrt_jax.engine.engine import Engine
from nrt_jax.engine.requests import Read, Request, RequestFailed, check, first_sizes
from nrt_jax.engine.scheduler import Scheduler
from nrt_jax.engine.slot_table import SequenceId
from nrt_jax.engine.trace_log import TraceLog
from nrt_jax.types import SuffixLogprobs, Trace


@runtime_checkable
class Generate(Protocol):
    """A rollout driver: what draws the traces of a step; `generate` is one."""

    def __call__(
        self,
        engine: Engine,
        params: Any,
        requests: Sequence[Request],
        key: jax.Array,
        *,
        steps: int = 16,
    ) -> list[tuple[Trace, ...]]: ...


def generate(
    engine: Engine,
    params: Any,
    requests: Sequence[Request],
    key: jax.Array,
    *,
    steps: int = 16,
) -> list[tuple[Trace, ...]]:
    """Traces of every request, in order; a dispatch decodes `steps` tokens per slot.

    A trace depends on (key, request.stream, sample), its request's settings and the weights alone.
    Raises InputError for a request beyond the engine's limits, before anything is run.
    """
    traces, _ = _run(engine, params, requests, key, steps)
    return traces


def generate_and_score(
    engine: Engine,
    params: Any,
    requests: Sequence[Request],
    key: jax.Array,
    *,
    steps: int = 16,
) -> tuple[list[tuple[Trace, ...]], list[SuffixLogprobs]]:
    """Traces, and the logprobs of each request's suffix after them, from the cached keys.

    Those after equal traces are equal to the bit.
    """
    assert all(request.suffix_tokens is not None and request.num_samples for request in requests)
    traces, (scheduler, tickets) = _run(engine, params, requests, key, steps)
    logprobs = [scheduler.suffix_logprobs(ticket) for ticket in tickets]
    return traces, [s.of_equal_traces(t) for s, t in zip(logprobs, traces, strict=True)]


def _run(
    engine: Engine, params: Any, requests: Sequence[Request], key: jax.Array, steps: int
) -> tuple[list[tuple[Trace, ...]], tuple[Scheduler, list[int]]]:
    check_all(engine, requests)
    scheduler = Scheduler(engine, params, steps=steps, sizes=first_sizes(engine, requests))
    tickets = [scheduler.submit(request, key) for request in requests]
    log, traces = TraceLog(), {}
    while scheduler.busy:
        read = advance(scheduler)
        if read is not None:
            traces |= log.add(read)
    groups = [
        tuple(traces[SequenceId(ticket, sample)] for sample in range(request.num_samples))
        for ticket, request in zip(tickets, requests, strict=True)
    ]
    return groups, (scheduler, tickets)


def advance(scheduler: Scheduler) -> Read | None:
    """A step in which the failure of one request is that of all."""
    try:
        return scheduler.advance()
    except RequestFailed as failed:
        raise failed.__cause__ or failed from None


def check_all(engine: Engine, requests: Sequence[Request]) -> None:
    """Raise InputError for the first request beyond the engine's limits, by its number."""
    for index, request in enumerate(requests):
        check(engine, request, f"prompt {index}")
