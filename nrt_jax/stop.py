"""SIGTERM and Ctrl-C: a run finishes its step and saves; a second Ctrl-C leaves at once."""

import ctypes
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from types import FrameType, TracebackType

log = logging.getLogger(__name__)

_AGAIN_S = 0.05
"""Until an ignored exception is raised again: the collection that ignored it is over then."""
INTERRUPTED = 128 + signal.SIGINT
"""Exit status after Ctrl-C, by which a shell script tells it from a success."""


def _disregard(number: int, frame: FrameType | None) -> None:
    """A handler that does nothing; unlike SIG_IGN it lets signals reach the pipe of Interrupts."""


class Interrupts:
    """While entered, Ctrl-C raises KeyboardInterrupt, and a second one ends the process at once.

    Python runs signal handlers between its own instructions, so a program that compiles or computes
    outside of Python would delay them by minutes. The second Ctrl-C is seen by a thread that reads
    the numbers of arriving signals from a pipe. It exits without another line of Python, so nothing
    can turn the exit into a traceback.
    """

    def __init__(self) -> None:
        self.seen = False
        """Whether Ctrl-C came. A library may have turned KeyboardInterrupt into another error."""
        self.at_first: Callable[[], str | None] = lambda: None
        """What to log at the first Ctrl-C; None for nothing."""
        self.at_leaving: Callable[[], str] = lambda: ""
        """What the last line says after "interrupted"."""

    def __enter__(self) -> "Interrupts":
        self._before = signal.getsignal(signal.SIGINT)
        on_main_thread = threading.current_thread() is threading.main_thread()
        self._active = on_main_thread and self._before not in (signal.SIG_IGN, None)
        if self._active:
            read_end, self._write_end = os.pipe()
            os.set_blocking(self._write_end, False)
            threading.Thread(target=self._watch, args=(read_end,), daemon=True).start()
            self._wakeup_before = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
            signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self.seen:
            # The process exits, and a second Ctrl-C may still cut that short.
            signal.signal(signal.SIGINT, _disregard)
        elif self._active:
            signal.signal(signal.SIGINT, self._before)
            signal.set_wakeup_fd(self._wakeup_before)
            os.close(self._write_end)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.seen = True
        raise KeyboardInterrupt

    def _watch(self, read_end: int) -> None:
        """Read the numbers of signals until the pipe is closed."""
        presses = 0
        with os.fdopen(read_end, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] != signal.SIGINT:
                    continue
                presses += 1
                if presses > 1:
                    self._leave()
                if text := self.at_first():
                    log.info("%s", text)

    def _leave(self) -> None:
        try:
            more = self.at_leaving()
            sys.stderr.write(f"\nnrt-jax: error: interrupted{more and '; '}{more}\n")
            sys.stderr.flush()
        finally:
            os._exit(INTERRUPTED)


class StopRequest:
    """While entered, turns SIGTERM and Ctrl-C into a request to stop.

    Before the loop calls `wait_for_the_step` there is nothing to save: SIGTERM raises SystemExit(0)
    at once, or with another status, Ctrl-C KeyboardInterrupt. From then on both only set
    `requested`.
    """

    def __init__(self, status: int = 0) -> None:
        self._status = status
        self.requested = False
        self.interrupted = False
        """Whether it was Ctrl-C that asked to stop."""
        self._waits = False

    def __enter__(self) -> "StopRequest":
        self._hook_before, sys.unraisablehook = sys.unraisablehook, self._raise_again
        self._before = {signal.SIGTERM: signal.signal(signal.SIGTERM, self._handle)}
        if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
            self._before[signal.SIGINT] = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        sys.unraisablehook = self._hook_before
        # After a first signal, another one must not kill the process while it exits.
        after = {signal.SIGTERM: signal.SIG_IGN, signal.SIGINT: _disregard}
        for number, before in self._before.items():
            signal.signal(number, after[number] if self.requested else before)

    def wait_for_the_step(self) -> None:
        """From now on, finish and save the current step before stopping."""
        self._waits = True

    def plan(self) -> str | None:
        """What a first Ctrl-C leads to; None where it ends the process at once."""
        if not self._waits:
            return None
        return "Ctrl-C: finishing the step and saving; Ctrl-C again leaves at once"

    def _raise_again(self, ignored: "sys.UnraisableHookArgs") -> None:
        if not isinstance(ignored.exc_value, SystemExit | KeyboardInterrupt):
            self._hook_before(ignored)
            return
        again = threading.Timer(_AGAIN_S, self._raise_in_main_thread, [ignored.exc_type])
        again.daemon = True
        again.start()

    def _raise_in_main_thread(self, kind: type[BaseException]) -> None:
        if not self._waits:
            main = ctypes.c_ulong(threading.main_thread().ident or 0)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(main, ctypes.py_object(kind))

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        self.interrupted = self.interrupted or number == signal.SIGINT
        if self._waits:
            return
        if number == signal.SIGTERM:
            raise SystemExit(self._status)
        before = self._before[signal.SIGINT]
        if callable(before):
            before(number, frame)
        raise KeyboardInterrupt
