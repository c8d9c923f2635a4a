"""SIGTERM: finish the step, save and exit; the same command continues the run."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """While entered, turns SIGTERM into a request to stop.

    Before the loop calls `wait_for_the_step` there is nothing to save, and SIGTERM raises
    SystemExit(0) at once. From then on it only sets `requested`.
    """

    def __init__(self) -> None:
        self.requested = False
        self._waits = False

    def __enter__(self) -> "StopRequest":
        self._before = signal.signal(signal.SIGTERM, self._handle)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After a first SIGTERM, a second one must not kill the process while it exits.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.requested else self._before)

    def wait_for_the_step(self) -> None:
        """From now on, finish and save the current step before stopping."""
        self._waits = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._waits:
            raise SystemExit(0)
