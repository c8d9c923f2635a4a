"""Rollouts drawn by JetStream's orchestrator: `rollout.driver: jetstream`."""

from collections.abc import Sequence
from queue import SimpleQueue
from typing import Any, NoReturn

import jax
import numpy as np

from nrt_jax.engine.decode_state import sample_keys
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import check_all
from nrt_jax.engine.requests import Request
from nrt_jax.engine.trace_log import make_trace
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.serving.jetstream import (
    ActiveRequest,
    DrawnToken,
    Driver,
    JetStreamEngine,
    Start,
)
from nrt_jax.types import Trace


class _Collector:
    """The tokens of one sequence; replaces JetStream's channel into an asyncio loop."""

    def __init__(self, ended: "SimpleQueue[BaseException | None]"):
        self.drawn: list[DrawnToken] = []
        self._ended = ended

    def add_result(self, drawn: list[DrawnToken]) -> None:
        """Take the token of a step, if there is one."""
        self.drawn += drawn

    def close(self) -> None:
        """Say that the sequence is complete."""
        self._ended.put(None)

    def trace(self, stop_ids: frozenset[int]) -> Trace:
        """The sequence, which is complete."""
        tokens, logprobs = zip(*self.drawn, strict=True)
        return make_trace(
            np.asarray(tokens, np.int32),
            np.asarray(logprobs, np.float32),
            stopped=tokens[-1] in stop_ids,
        )


def generate(
    engine: Engine,
    params: Any,
    requests: Sequence[Request],
    key: jax.Array,
    *,
    steps: int = 16,
) -> list[tuple[Trace, ...]]:
    """The traces of `engine.generate.generate`, drawn by JetStream's orchestrator.

    It prefills each sample by itself and decodes one step per dispatch, whatever `steps`. Raises
    InputError for a request beyond the engine's limits, and RunFailed when a thread fails.
    """
    del steps
    if jax.process_count() > 1:
        raise InputError("rollout.driver=jetstream: its threads run on one host; set it to loop")
    check_all(engine, requests)
    ended: SimpleQueue[BaseException | None] = SimpleQueue()
    driver = Driver(JetStreamEngine(engine), params, lambda _, error: ended.put(error))
    try:
        groups = [_place(driver, request, key, ended) for request in requests]
        for _ in range(sum(len(group) for group in groups)):
            error = ended.get()
            if error is not None:
                _fail(error)
    finally:
        driver.end()
    return [
        tuple(sample.trace(engine.stop_ids | request.sampling.stop_ids) for sample in group)
        for request, group in zip(requests, groups, strict=True)
    ]


def _place(
    driver: Driver, request: Request, key: jax.Array, ended: "SimpleQueue[BaseException | None]"
) -> list[_Collector]:
    """Queue every sample of a request as a sequence of its own."""
    keys_K = sample_keys(key, request.stream, np.arange(request.num_samples, dtype=np.int32))
    samples = []
    for sample_key, limit in zip(keys_K, request.limits_K.tolist(), strict=True):
        samples.append(_Collector(ended))
        driver.place_request_on_prefill_queue(
            ActiveRequest(
                max_tokens=limit,
                return_channel=samples[-1],
                prefill_content=request.prompt_tokens,
                start=Start(sample_key, limit, request.sampling),
            )
        )
    return samples


def _fail(error: BaseException) -> NoReturn:
    """Raise a thread's error as RunFailed; jax's own errors as they are, for the caller."""
    if isinstance(error, jax.errors.JaxRuntimeError):
        raise error
    said = " ".join(f"{type(error).__name__}: {error}".split())
    raise RunFailed(
        f"rollout.driver=jetstream: a thread of JetStream failed ({said}); the traceback is above; "
        "rollout.driver=loop draws the same traces without it"
    ) from error
