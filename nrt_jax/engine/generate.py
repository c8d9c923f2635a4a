"""Prompts to traces: all requests through one scheduler, the same on every host.

Letters: T tokens.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from nrt_jax.engine.engine import DecoderEngine
from nrt_jax.engine.scheduler import Event, Request, Scheduler, check, first_sizes
from nrt_jax.types import SuffixLogprobs, Trace


def generate(
    engine: DecoderEngine,
    params: Any,
    requests: Sequence[Request],
    key: jax.Array,
    *,
    steps: int = 16,
) -> list[tuple[Trace, ...]]:
    """Traces of every request, in order; `steps` tokens are decoded a dispatch.

    A trace depends on (key, request.stream, copy), its request's settings and the weights alone.
    Raises InputError for a request that the engine cannot take, before anything is run.
    """
    traces, _ = _run(engine, params, requests, key, steps)
    return traces


def generate_and_score(
    engine: DecoderEngine,
    params: Any,
    requests: Sequence[Request],
    key: jax.Array,
    *,
    steps: int = 16,
) -> tuple[list[tuple[Trace, ...]], list[SuffixLogprobs]]:
    """Traces, and the logprobs of each request's suffix after them, from their keys and values."""
    assert all(request.suffix_tokens is not None and request.copies for request in requests)
    traces, (scheduler, tickets) = _run(engine, params, requests, key, steps)
    return traces, [scheduler.scores(ticket) for ticket in tickets]


def _run(
    engine: DecoderEngine, params: Any, requests: Sequence[Request], key: jax.Array, steps: int
) -> tuple[list[tuple[Trace, ...]], tuple[Scheduler, list[int]]]:
    for index, request in enumerate(requests):
        check(engine, request, f"prompt {index}")
    scheduler = Scheduler(engine, params, steps=steps, sizes=first_sizes(engine, requests))
    tickets = [scheduler.submit(request, key) for request in requests]
    events: dict[tuple[int, int], list[Event]] = {
        (ticket, copy): []
        for ticket, request in zip(tickets, requests, strict=True)
        for copy in range(request.copies)
    }
    while scheduler.busy:
        for event in scheduler.step():
            events[event.ticket, event.copy].append(event)
    traces = [
        tuple(_trace(events[ticket, copy]) for copy in range(request.copies))
        for ticket, request in zip(tickets, requests, strict=True)
    ]
    return traces, (scheduler, tickets)


def _trace(events: Sequence[Event]) -> Trace:
    """Put a sequence together, the special token that ended it apart."""
    token_T = np.concatenate([event.tokens for event in events])
    logprob_T = np.concatenate([event.logprobs for event in events])
    stopped = events[-1].finished == "stop"
    kept = len(token_T) - stopped
    return Trace(
        tokens=token_T[:kept],
        logprobs=logprob_T[:kept],
        end_token=int(token_T[-1]) if stopped else None,
        end_logprob=float(logprob_T[-1]) if stopped else 0.0,
    )
