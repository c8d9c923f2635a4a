"""A headless Chromium, asked over its debugging pipe: how a page is laid out."""

import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "headless_shell")
FLAGS = (
    *("--headless", "--remote-debugging-pipe", "--no-sandbox", "--disable-gpu", "--no-zygote"),
    *("--single-process", "--disable-dev-shm-usage", "--hide-scrollbars", "--mute-audio"),
)


def find_chromium() -> str | None:
    """The program that NRT_JAX_CHROMIUM names, or an installed one."""
    named = os.environ.get("NRT_JAX_CHROMIUM")
    return named or next(filter(None, map(shutil.which, NAMES)), None)


class Browser:
    """One tab, which loads nothing over the network."""

    def __init__(self, to_browser: int, from_browser: int):
        self._write, self._read = os.fdopen(to_browser, "wb", 0), os.fdopen(from_browser, "rb", 0)
        self._count, self._rest, self._session = 0, b"", None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Runtime"):
            self.call(f"{domain}.enable")
        limits = {"latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.call("Network.emulateNetworkConditions", offline=True, **limits)

    def open(self, path: Path, width: int) -> None:
        """Load a file in a window of so many pixels, and count how far its parts move."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.call(
            "Page.addScriptToEvaluateOnNewDocument",
            source="window.shift = 0; new PerformanceObserver((list) => { for (const entry of "
            "list.getEntries()) window.shift += entry.value; })"
            ".observe({type: 'layout-shift', buffered: true});",
        )
        self.call("Page.navigate", url=path.as_uri())
        while self._message().get("method") != "Page.loadEventFired":
            pass

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"]["value"]

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a command of the debugging protocol."""
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        self._write.write(json.dumps(message).encode() + b"\0")
        while (answer := self._message()).get("id") != self._count:
            pass
        assert "error" not in answer, answer
        return answer["result"]

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            chunk = self._read.read(65536)
            assert chunk, "the browser has ended"
            self._rest += chunk
        message, _, self._rest = self._rest.partition(b"\0")
        return json.loads(message)


@contextmanager
def open_browser(program: str) -> Iterator[Browser]:
    """Start the program; it reads commands from its descriptor 3 and answers on 4."""
    commands, to_browser = os.pipe()
    from_browser, answers = os.pipe()

    def place_pipes() -> None:
        # Away from 3 and 4 first, which either of them may be.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (commands, answers)]
        for descriptor, end in enumerate(ends, start=3):
            os.dup2(end, descriptor)

    process = subprocess.Popen(
        [program, *FLAGS], pass_fds=(3, 4), preexec_fn=place_pipes, stderr=subprocess.DEVNULL
    )
    os.close(commands)
    os.close(answers)
    try:
        yield Browser(to_browser, from_browser)
    finally:
        process.kill()
        process.wait()
