"""Clients that leave, queues that are full, an engine that fails, requests that take too long."""

import contextlib
import json
import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving.server import make_server
from tests.serving.live import Live, listening, wait_until
from tests.serving.models import DECODE_STEPS, NEW, SLOTS


@pytest.fixture
def serving(served):
    """A server of our own, with settings."""

    @contextlib.contextmanager
    def make(**settings):
        config = ServingConfig(**{"slots": SLOTS, "decode_steps": DECODE_STEPS} | settings)
        with listening(make_server(served, config)) as server:
            yield server

    return make


class Gate:
    """Holds an engine before each of its steps until it is opened."""

    def __init__(self, live: Live):
        self._open = threading.Event()
        self.steps = 0
        self.error: Exception | None = None
        """What the step raises that is held, when it is let go."""
        scheduler = live.api.engine._scheduler
        step = scheduler.step

        def held():
            self.steps += 1
            self._open.wait(60)
            if self.error is not None:
                raise self.error
            return step()

        scheduler.step = held

    def open(self) -> None:
        self._open.set()


def idle(live: Live) -> bool:
    api = live.api
    return not (
        api.engine.slots_in_use
        or api.engine.waiting
        or api.admission.running
        or api.admission.waiting
        or api.engine._tickets
    )


def start(live: Live, body: dict):
    connection = live.connect()
    connection.request("POST", "/v1/completions", json.dumps(body))
    return connection


BODY = {"model": "tiny", "prompt": ["a", "b", "c"], "max_tokens": NEW, "temperature": 0}


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_slots(serving, stream):
    with serving() as live:
        gate = Gate(live)
        connection = start(live, BODY | {"stream": stream})
        wait_until(lambda: gate.steps > 0)
        connection.close()
        wait_until(lambda: live.api.admission.running == 0)
        # The engine has not moved since: the request was given up at once.
        assert gate.steps == 1
        gate.open()
        wait_until(lambda: idle(live))
        # What was dispatched is read, and nothing more.
        assert gate.steps <= 3
        route = {"route": "/v1/completions", "status": "499"}
        assert live.metric("nrt_requests_total", **route) == 1
        assert live.complete("a", max_tokens=2).status == 200


def test_a_client_that_leaves_in_the_middle_of_a_stream(serving):
    with serving() as live:
        gate = Gate(live)
        gate.open()
        copies = 16
        connection = start(live, BODY | {"stream": True, "n": copies, "temperature": 1})
        connection.getresponse().read(10)
        connection.close()
        wait_until(lambda: idle(live))
        assert gate.steps < 3 * copies * NEW / (SLOTS * DECODE_STEPS) / 2


def test_stop_texts_free_slots(serving):
    with serving() as live:
        whole = live.complete("a", max_tokens=NEW).json["choices"][0]["text"]
        gate = Gate(live)
        gate.open()
        assert live.complete("a", max_tokens=NEW, stop=whole[0]).json["choices"][0]["text"] == ""
        wait_until(lambda: idle(live))
        assert gate.steps < NEW / DECODE_STEPS


def test_one_that_waits_and_leaves_gives_up_its_place(serving):
    with serving(max_concurrent_requests=1, queue=1) as live:
        gate = Gate(live)
        first, second = start(live, BODY), start(live, BODY)
        wait_until(lambda: live.api.admission.waiting == 1)
        assert live.complete("a").status == 429
        second.close()
        wait_until(lambda: live.api.admission.waiting == 0)
        gate.open()
        assert first.getresponse().status == 200
        first.close()


def test_a_full_queue_is_429(serving):
    with serving(max_concurrent_requests=1, queue=2) as live:
        gate = Gate(live)
        with ThreadPoolExecutor(3) as pool:
            answers = [pool.submit(live.complete, "a", max_tokens=3) for _ in range(3)]
            wait_until(lambda: live.api.admission.waiting == 2)
            refused = live.complete("a", max_tokens=3)
            assert refused.status == 429
            assert refused.error["type"] == "rate_limit_error"
            assert refused.headers["retry-after"] == "1"
            gate.open()
            assert [answer.result().status for answer in answers] == [200, 200, 200]
        assert live.complete("a", max_tokens=3).status == 200


def test_a_request_that_takes_too_long(serving):
    with serving(request_timeout_s=0.3) as live:
        gate = Gate(live)
        answer = live.complete("a")
        assert (answer.status, answer.error["code"]) == (504, "timeout")
        assert answer.error["message"] == "not answered in 0.3 s"
        gate.open()
        wait_until(lambda: idle(live))


def test_a_stream_that_takes_too_long_ends_with_an_error(serving):
    with serving() as live:
        assert live.complete("a", max_tokens=NEW).status == 200
        live.api.config = live.api.config.model_copy(update={"request_timeout_s": 2.0})
        scheduler, told = live.api.engine._scheduler, threading.Event()
        step, steps = scheduler.step, []

        def slow():
            steps.append(0)
            if len(steps) > 3:
                told.wait(60)
            return step()

        scheduler.step = slow
        text = live.complete("a", max_tokens=NEW, stream=True).text
        told.set()
        assert '"text":' in text
        assert '"code":"timeout"' in text.split("\n\n")[-2]
        assert "[DONE]" not in text
        wait_until(lambda: idle(live))


def break_next(live: Live, message: str = "boom") -> None:
    """Let the next step raise, as a device that fails would."""

    def broken():
        raise RuntimeError(message)

    # The dispatch behind an answer's last token is still to be read.
    wait_until(lambda: not live.api.engine._scheduler.busy)
    live.api.engine._scheduler.step = broken


@pytest.mark.parametrize("stream", [False, True])
def test_a_failure_of_the_engine_is_a_clean_500(serving, stream, caplog):
    with serving() as live:
        expected = live.complete("a").json["choices"]
        break_next(live)
        with caplog.at_level(logging.ERROR, "nrt_jax.serving"):
            answer = live.complete("a", stream=stream)
        assert answer.status == 500
        request_id = answer.headers["x-request-id"]
        assert answer.error["message"] == (
            f"internal error; the server's log has more on request {request_id}"
        )
        assert "boom" not in answer.text
        (record,) = [r for r in caplog.records if "the engine failed" in r.message]
        assert request_id in record.message
        assert "RuntimeError: boom" in caplog.text
        assert live.metric("nrt_engine_errors_total") == 1
        # The process goes on, with an engine that was built anew.
        wait_until(lambda: live.get("/health").status == 200)
        assert live.complete("a").json["choices"] == expected
        assert idle(live)


def test_every_request_of_a_failed_engine_is_told(serving):
    with serving() as live:
        gate = Gate(live)
        gate.error = RuntimeError("boom")
        engine = live.api.engine
        with ThreadPoolExecutor(6) as pool:
            answers = [pool.submit(live.complete, "a") for _ in range(6)]
            # Held in its step, the engine takes no more of them from its inbox.
            wait_until(lambda: gate.steps == 1)
            wait_until(lambda: len(engine._tickets) + engine._inbox.qsize() == 6)
            begun = len(engine._tickets)
            gate.open()
            statuses = [answer.result().status for answer in answers]
        # Those that the failed engine had not heard of yet are answered by the next one.
        assert sorted(statuses) == [200] * (6 - begun) + [500] * begun
        assert begun
        assert idle(live)


def test_a_failure_in_the_middle_of_a_stream(serving):
    with serving() as live:
        scheduler = live.api.engine._scheduler
        step, steps = scheduler.step, []

        def fails_later():
            steps.append(0)
            if len(steps) == 6:
                raise RuntimeError("boom")
            return step()

        scheduler.step = fails_later
        answer = live.complete("a", max_tokens=NEW, stream=True)
        assert answer.status == 200
        *chunks, last, _ = answer.text.split("\n\n")
        assert chunks
        error = json.loads(last.removeprefix("data: "))["error"]
        assert answer.headers["x-request-id"] in error["message"]


def test_an_engine_that_cannot_be_built_anew(serving, caplog):
    with serving() as live:
        make = live.api.engine._make_scheduler

        def fails():
            raise MemoryError("no room")

        live.api.engine._make_scheduler = fails
        break_next(live)
        assert live.complete("a").status == 500
        wait_until(lambda: not live.api.engine.healthy)
        assert live.get("/health").status == 503
        assert live.complete("a").status == 500
        live.api.engine._make_scheduler = make
        assert live.complete("a").status == 200
        assert live.get("/health").status == 200


def test_a_prompt_that_cannot_be_scored_ends_alone(serving):
    with serving() as live:
        score = live.api.engine._score

        def fails(tokens: np.ndarray):
            raise RuntimeError("boom")

        live.api.engine._score = fails
        answer = live.complete("a", echo=True, logprobs=1, max_tokens=0)
        assert answer.status == 500
        live.api.engine._score = score
        assert live.complete("a", echo=True, logprobs=1, max_tokens=0).status == 200


@pytest.mark.parametrize("where", ["submit", "prefill_rows"])
def test_a_request_that_cannot_be_prepared_ends_alone(serving, where, caplog):
    """What is under way goes on in the same engine, and gets the same tokens."""
    with serving() as live:
        engine = live.api.engine
        scheduler = engine._scheduler
        owner = scheduler if where == "submit" else scheduler._prompts._engine
        prepare = getattr(owner, where)
        expected = live.complete("a", max_tokens=NEW).json["choices"]
        gate = Gate(live)

        def fails(*args):
            length = len(args[0].prompt_tokens) if where == "submit" else max(args[-1])
            if length == 5:
                raise OverflowError("Python integer out of bounds")
            return prepare(*args)

        setattr(owner, where, fails)
        try:
            with ThreadPoolExecutor(3) as pool:
                good = [pool.submit(live.complete, "a", max_tokens=NEW) for _ in range(2)]
                wait_until(lambda: gate.steps == 1)
                bad = pool.submit(live.complete, [5] * 5, max_tokens=NEW)
                wait_until(lambda: engine._inbox.qsize() + len(engine._tickets) == 3)
                gate.open()
                answer = bad.result()
                assert [one.result().json["choices"] for one in good] == [expected] * 2
        finally:
            setattr(owner, where, prepare)
        assert answer.status == 500
        assert answer.headers["x-request-id"] in answer.error["message"]
        assert "OverflowError" in caplog.text
        assert live.metric("nrt_engine_errors_total") == 1
        assert engine._scheduler is scheduler
        wait_until(lambda: idle(live))


@pytest.mark.parametrize("healthy", [True, False])
def test_the_health_check_covers_the_engine_of_grpc(served, healthy):
    config = ServingConfig(slots=SLOTS, decode_steps=DECODE_STEPS)
    with listening(make_server(served, config, grpc_healthy=lambda: healthy)) as live:
        assert live.get("/health").status == (200 if healthy else 503)


def test_draining(serving):
    with serving() as live:
        gate = Gate(live)
        connection = start(live, BODY)
        wait_until(lambda: live.api.admission.running == 1)
        live.api.admission.draining = True
        health = live.get("/health")
        assert (health.status, health.json) == (503, {"status": "draining"})
        answer = live.complete("a")
        assert (answer.status, answer.error["code"]) == (503, "draining")
        gate.open()
        assert connection.getresponse().status == 200
        connection.close()
