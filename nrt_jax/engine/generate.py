"""Prompts to traces: all requests through one scheduler, the same on every host.

Letters: T tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float, Int

from nrt_jax.engine.engine import Engine
from nrt_jax.engine.requests import Event, Request, RequestFailed, check, first_sizes
from nrt_jax.engine.scheduler import Scheduler
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
    events: dict[tuple[int, int], list[Event]] = {
        (ticket, sample): []
        for ticket, request in zip(tickets, requests, strict=True)
        for sample in range(request.num_samples)
    }
    while scheduler.busy:
        for event in _step(scheduler):
            events[event.ticket, event.sample].append(event)
    traces = [
        tuple(_trace(events[ticket, sample]) for sample in range(request.num_samples))
        for ticket, request in zip(tickets, requests, strict=True)
    ]
    return traces, (scheduler, tickets)


def _step(scheduler: Scheduler) -> list[Event]:
    """A step in which the failure of one request is that of all."""
    try:
        return scheduler.step()
    except RequestFailed as failed:
        raise failed.__cause__ or failed from None


def _trace(events: Sequence[Event]) -> Trace:
    return make_trace(
        np.concatenate([event.tokens for event in events]),
        np.concatenate([event.logprobs for event in events]),
        stopped=events[-1].finished == "stop",
    )


def make_trace(
    token_T: Int[np.ndarray, "T"], logprob_T: Float[np.ndarray, "T"], *, stopped: bool
) -> Trace:
    """The trace of one sequence; the last token is set apart where it `stopped` the sequence."""
    kept = len(token_T) - stopped
    return Trace(
        tokens=token_T[:kept],
        logprobs=logprob_T[:kept],
        end_token=int(token_T[-1]) if stopped else None,
        end_logprob=float(logprob_T[-1]) if stopped else 0.0,
    )


def check_all(engine: Engine, requests: Sequence[Request]) -> None:
    """Raise InputError for the first request beyond the engine's limits, by its number."""
    for index, request in enumerate(requests):
        check(engine, request, f"prompt {index}")
