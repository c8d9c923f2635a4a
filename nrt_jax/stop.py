"""SIGTERM: a clean end that the same command continues from."""

import signal
from types import FrameType, TracebackType


class StopRequest:
    """Turns SIGTERM into a request while it is entered; the process is never cut off by it.

    Until the loop asks for signals to wait, there is nothing to save and SystemExit(0) ends the
    program at once; from then on the signal is remembered in `requested`.
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
        # A second signal must not turn the clean end that the first one asked for into a kill.
        signal.signal(signal.SIGTERM, signal.SIG_IGN if self.requested else self._before)

    def wait_for_the_step(self) -> None:
        """From here on the step under way is finished and saved first."""
        self._waits = True

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.requested = True
        if not self._waits:
            raise SystemExit(0)
