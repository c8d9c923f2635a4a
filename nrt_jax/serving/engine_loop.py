"""The one thread that owns the engine: it takes requests and sends events to asyncio.

A failure of the engine ends only the requests in it: the thread builds a new scheduler and goes on.
Where it cannot, it tries again after a pause; requests that come meanwhile fail with the next try.
Every request ends with its last event or with one error, also when the thread stops or dies.
"""

import asyncio
import contextlib
import logging
import secrets
import threading
import traceback
from collections.abc import Callable, Iterator
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np

from nrt_jax.engine.requests import Event, Request, RequestFailed, request_key
from nrt_jax.errors import InputError
from nrt_jax.serving.generation import Generation, PromptLogprobs, answer, post

log = logging.getLogger(__name__)

STOP_S = 60.0
"""Longest time in seconds to wait for an engine's current step, or its compilation."""


class EngineFailed(Exception):
    """The engine raised while it had this request; the log has the traceback."""


class EngineStopped(Exception):
    """The server ended before the request did."""


def pauses() -> Iterator[float]:
    """Seconds between tries to build an engine anew: 0.5, 1, 2, 4, and from then on 8."""
    pause = 0.5
    while True:
        yield pause
        pause = min(2 * pause, 8.0)


@runtime_checkable
class Scheduling(Protocol):
    """What the loop needs of a `engine.scheduler.Scheduler`."""

    def submit(self, request: Request, key: jax.Array) -> int: ...
    def cancel(self, ticket: int, copy: int | None = None) -> None: ...
    def step(self) -> list[Event]: ...
    @property
    def busy(self) -> bool: ...
    @property
    def slots_in_use(self) -> int: ...
    @property
    def waiting(self) -> int: ...


class _Submit(NamedTuple):
    generation: Generation
    request: Request
    seed: int


class _Cancel(NamedTuple):
    generation: Generation
    copy: int | None
    """None: all of them."""


class _ScorePrompt(NamedTuple):
    future: "asyncio.Future[PromptLogprobs]"
    request_id: str
    tokens: np.ndarray


_Message = _Submit | _Cancel | _ScorePrompt | None


class EngineLoop:
    """Runs a scheduler in a thread of its own, from `start` to `stop`.

    `make_scheduler` gives a new scheduler, `score` the fields of a prompt's `PromptLogprobs`. The
    thread calls both, except for the first scheduler. `on_failure` is called once per failure of
    the engine.
    """

    def __init__(
        self,
        make_scheduler: Callable[[], Scheduling],
        score: Callable[[np.ndarray], tuple[Any, Any, Any]],
        *,
        seed: int = 0,
        on_failure: Callable[[], object] = lambda: None,
    ):
        self._make_scheduler, self._score = make_scheduler, score
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._scheduler: Scheduling | None = make_scheduler()
        self._running: dict[int, Generation] = {}
        """By the ticket of the current scheduler."""
        self._copies_left: dict[int, set[int]] = {}
        self._tickets: dict[Generation, int | None] = {}
        """Of every request that a failure must end; None before it has a ticket."""
        self._draws = np.random.default_rng(seed)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._stopping, self._ended = threading.Event(), False
        self._on_failure = on_failure
        self.slots_in_use = self.waiting = 0
        """Sequences that are decoded, and that wait for a slot."""

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self, seconds: float | None = None) -> bool:
        """End the thread after the current step; running requests end with EngineStopped.

        Waits for it, up to `seconds` if given, and returns whether it has ended.
        """
        self._stopping.set()
        self._inbox.put(None)
        if self._thread.ident is not None:
            self._thread.join(seconds)
        return not self._thread.is_alive()

    @property
    def healthy(self) -> bool:
        """Whether the thread runs and has an engine."""
        return self._thread.is_alive() and not self._ended and self._scheduler is not None

    def submit(self, request: Request, seed: int | None, request_id: str) -> Generation:
        """Start a request, with a random seed if none is given. Called on a thread of asyncio."""
        if seed is None:
            seed = int(self._draws.integers(2**31))
        generation = Generation(self, request.num_samples, request_id)
        self._send(_Submit(generation, request, seed))
        return generation

    def cancel(self, generation: Generation, copy: int | None = None) -> None:
        """Free a request's slots, or one copy's, at the next step."""
        self._send(_Cancel(generation, copy))

    async def score(self, tokens: np.ndarray, request_id: str) -> PromptLogprobs:
        """Logprobs of a prompt's tokens, each given those before it."""
        future: asyncio.Future[PromptLogprobs] = asyncio.get_running_loop().create_future()
        self._send(_ScorePrompt(future, request_id, tokens))
        return await future

    def _send(self, message: "_Submit | _Cancel | _ScorePrompt") -> None:
        self._inbox.put(message)
        if self._ended:
            # Nobody else reads the inbox any more.
            self._fail_inbox(EngineStopped())

    # --- in the thread ----------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._stopping.is_set():
                try:
                    self._turn()
                except Exception as error:
                    self._recover(error)
        finally:
            self._ended = True
            self._fail_all(EngineStopped())
            self._fail_inbox(EngineStopped())

    def _turn(self) -> None:
        """Read the inbox, waiting for a message if the engine is idle; then run one step."""
        scheduler = self._scheduler
        assert scheduler is not None
        idle = not scheduler.busy
        while idle or not self._inbox.empty():
            message = self._inbox.get()
            idle = False
            if message is None:
                return
            self._handle(message, scheduler)
            if isinstance(message, _ScorePrompt):
                break  # step between prompts to score, which may be long
        events: list[Event] = []
        try:
            events = scheduler.step() if scheduler.busy else []
        except RequestFailed as failed:
            self._end_failed(failed)
        # Before the events: a client with its last token must find its slot free.
        self.slots_in_use, self.waiting = scheduler.slots_in_use, scheduler.waiting
        self._fan_out(events)

    def _end_failed(self, failed: RequestFailed) -> None:
        """A request that cannot be prepared ends alone."""
        generation, cause = self._running.get(failed.ticket), failed.__cause__
        if generation is not None and isinstance(cause, Exception):
            self._end(generation)
            post({generation: [self._failure(cause, generation)]})

    def _failure(self, error: Exception, generation: Generation) -> Exception:
        """What the request is told of an error in its preparation; the log has one of ours."""
        if isinstance(error, InputError):
            return error
        log.error("request %s cannot be prepared", generation.request_id, exc_info=error)
        self._on_failure()
        return EngineFailed(type(error).__name__)

    def _handle(self, message: "_Submit | _Cancel | _ScorePrompt", scheduler: Scheduling) -> None:
        match message:
            case _Submit():
                self._start(message, scheduler)
            case _Cancel(generation, None):
                ticket = self._end(generation)
                if ticket is not None:
                    scheduler.cancel(ticket)
            case _Cancel(generation, copy):
                ticket = self._tickets.get(generation)
                if ticket is not None:
                    scheduler.cancel(ticket, copy)
                    self._count(generation, ticket, copy)
            case _ScorePrompt():
                self._answer_score(message)

    def _start(self, message: _Submit, scheduler: Scheduling) -> None:
        """Submit a request; a failure ends only this one, since it has not begun."""
        generation, request, seed = message
        try:
            ticket = scheduler.submit(request, request_key(seed))
        except Exception as error:
            post({generation: [self._failure(error, generation)]})
            if isinstance(error, jax.errors.JaxRuntimeError):
                raise  # the device failed, not the request
            return
        self._tickets[generation], self._running[ticket] = ticket, generation
        self._copies_left[ticket] = set(range(request.num_samples))

    def _end(self, generation: Generation) -> int | None:
        """Remove a request, if it is still there, and return its ticket."""
        ticket = self._tickets.pop(generation, None)
        if ticket is not None:
            del self._running[ticket], self._copies_left[ticket]
        return ticket

    def _count(self, generation: Generation, ticket: int, copy: int) -> None:
        self._copies_left[ticket].discard(copy)
        if not self._copies_left[ticket]:
            self._end(generation)

    def _answer_score(self, message: _ScorePrompt) -> None:
        """Score a prompt; a failure ends only this request, since scoring shares no state."""
        future, request_id, tokens = message
        if future.cancelled():
            return
        result: PromptLogprobs | Exception
        try:
            result = PromptLogprobs(*map(np.asarray, self._score(tokens)))
        except InputError as error:
            result = error
        except Exception as error:
            log.exception("scoring the prompt of request %s failed", request_id)
            self._on_failure()
            result = EngineFailed(f"{type(error).__name__}")
        answer(future, result)

    def _fan_out(self, events: list[Event]) -> None:
        """Deliver a step's events, with one call into each asyncio loop."""
        posts: dict[Generation, list[Event | Exception]] = {}
        for event in events:
            generation = self._running.get(event.ticket)
            if generation is None:
                continue  # cancelled
            posts.setdefault(generation, []).append(event)
            if event.finished is not None:
                self._count(generation, event.ticket, event.sample)
        post(posts)

    def _recover(self, error: Exception) -> None:
        """Fail every request, and build a new scheduler, again and again until it is there."""
        names = ", ".join(generation.request_id for generation in self._tickets) or "none"
        log.error("the engine failed; requests that end with it: %s", names, exc_info=error)
        self._on_failure()
        # Drop the old one first: there may not be memory for both. Frames of the traceback hold it.
        self._scheduler = None
        traceback.clear_frames(error.__traceback__)
        self._fail_all(EngineFailed("the engine failed"))
        for pause in pauses():
            try:
                self._scheduler = self._make_scheduler()
                return
            except Exception:
                log.exception("the engine cannot be built anew; next try in %g s", pause)
            self._fail_inbox(EngineFailed("the engine cannot be built anew"))
            if self._stopping.wait(pause):
                return

    def _fail_all(self, error: Exception) -> None:
        """End every request that the scheduler has."""
        failed = list(self._tickets)
        self._running, self._copies_left, self._tickets = {}, {}, {}
        self.slots_in_use = self.waiting = 0
        post({generation: [error] for generation in failed})

    def _fail_inbox(self, error: Exception) -> None:
        """End every request that the scheduler does not have yet."""
        with contextlib.suppress(Empty):
            while True:
                match self._inbox.get_nowait():
                    case _Submit(generation):
                        post({generation: [error]})
                    case _ScorePrompt(future):
                        answer(future, error)


def new_id(prefix: str) -> str:
    """A unique name of a request."""
    return f"{prefix}-{secrets.token_hex(12)}"
