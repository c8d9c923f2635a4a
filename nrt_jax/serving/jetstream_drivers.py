"""JetStream's driver for as long as the server lives: replaced when it fails, told to stop once.

Every request that is placed here ends: with its last token, or with one error.
"""

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Iterable
from queue import SimpleQueue
from typing import Any

from nrt_jax.serving.engine_loop import STOP_S, EngineFailed, EngineStopped, pauses
from nrt_jax.serving.jetstream import ActiveRequest, Driver, JetStreamEngine

log = logging.getLogger(__name__)


class Drivers:
    """One driver at a time; JetStream's service sees it as a driver.

    When it fails, its requests fail. A thread of its own then ends it and builds another; where
    that fails too, it tries again after a pause. Requests that come meanwhile get the new driver,
    or fail with the next try.
    """

    def __init__(self, engine: JetStreamEngine, params: Any, most: int):
        self._engine, self._params, self._most = engine, params, most
        self._lock = threading.Lock()
        self._requests: dict[int, ActiveRequest] = {}
        self._failures: SimpleQueue[Driver | None] = SimpleQueue()
        self._stopping = threading.Event()
        self.draining = False
        self._driver: Driver | None = None
        self._start_driver()
        self._supervisor = threading.Thread(target=self._supervise, name="drivers", daemon=True)
        self._supervisor.start()

    @property
    def healthy(self) -> bool:
        """Whether there is a driver."""
        return self._driver is not None

    @property
    def live(self) -> bool:
        """What the health check says: whether a new request would be taken."""
        return self.healthy and not self.draining

    @property
    def active(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def place_request_on_prefill_queue(self, request: ActiveRequest) -> None:
        """Accept a request; queue.Full when there are too many, EngineStopped after `stop`."""
        with self._lock:
            if self._stopping.is_set():
                raise EngineStopped
            if len(self._requests) >= self._most:
                raise queue.Full
            self._requests[id(request)] = request
            if self._driver is not None:
                self._driver.place_request_on_prefill_queue(request)

    def release(self, request: ActiveRequest) -> None:
        """The request has ended or its client has left: its slot is free at the next step."""
        request.max_tokens = 0
        with self._lock:
            self._requests.pop(id(request), None)

    def stop(self, seconds: float = STOP_S) -> bool:
        """End all requests and threads; whether the threads ended within `seconds`.

        The process must not exit regularly while one runs, since that aborts it.
        """
        self._stopping.set()
        deadline = time.monotonic() + seconds
        driver = self._end_requests(EngineStopped())
        self._failures.put(None)
        ended = driver is None or driver.end(seconds)
        self._supervisor.join(max(0.0, deadline - time.monotonic()))
        return ended and not self._supervisor.is_alive()

    def _failed(self, driver: Driver, _: BaseException) -> None:
        """Called in the thread that failed."""
        if driver is self._end_requests(EngineFailed("the engine failed")):
            self._failures.put(driver)

    def _end_requests(self, error: Exception) -> Driver | None:
        """Tell every request, and take the driver away."""
        with self._lock:
            requests, self._requests = self._requests, {}
            driver, self._driver = self._driver, None
        _tell(requests.values(), error)
        return driver

    # --- in the supervisor's thread ---------------------------------------------------------------

    def _supervise(self) -> None:
        while (failed := self._failures.get()) is not None:
            # First of all: there may not be memory for the states of both.
            if not failed.end():
                log.error("a thread of the failed driver has not ended after %d s", STOP_S)
            self._replace()

    def _replace(self) -> None:
        """Build a driver, again and again until it is there."""
        for pause in pauses():
            if self._stopping.is_set():
                return
            try:
                self._start_driver()
                return
            except Exception:
                log.exception("JetStream's driver cannot be built anew; next try in %g s", pause)
            self._end_requests(EngineFailed("the engine cannot be built anew"))
            self._stopping.wait(pause)

    def _start_driver(self) -> None:
        self._engine.allocate()
        # A driver that fails at once must wait until it is known as the driver.
        with self._lock:
            if self._stopping.is_set():
                return
            self._driver = Driver(self._engine, self._params, self._failed)
            for request in self._requests.values():
                self._driver.place_request_on_prefill_queue(request)


def _tell(requests: Iterable[ActiveRequest], error: Exception) -> None:
    for request in requests:
        with contextlib.suppress(RuntimeError):  # its event loop has ended
            request.return_channel.set_exception(error)
