"""A checkout of the program, whatever its modules are called: commands in, output out."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from benchmarks.golden_compare import Renames

PATIENCE_S = 3600.0


class Answer(NamedTuple):
    """What a command said."""

    status: int
    output: str
    errors: str


@dataclass(frozen=True)
class Tree:
    """A checkout, asked by its command line, with a folder for whatever it writes."""

    path: Path
    scratch: Path
    environment: dict[str, str]
    renames: Renames
    keys: frozenset[str] = frozenset()
    """Config keys that it knows."""

    def command(self, *words: str) -> list[str]:
        """A command line, its overrides in the keys of this tree."""
        pairs = (self._override(word) if _is_override(word) else word for word in words)
        return [sys.executable, "-m", "nrt_jax", *(word for word in pairs if word is not None)]

    def ask(self, *words: str) -> Answer:
        """Run a command to its end."""
        done = subprocess.run(
            self.command(*words),
            cwd=self.path,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def tell(self, *words: str) -> str:
        """The output of a command that must work."""
        status, output, errors = self.ask(*words)
        if status:
            raise SystemExit(f"{' '.join(words)} ended with status {status}:\n{errors[-4000:]}")
        return output

    @contextmanager
    def start(self, *words: str) -> Iterator[subprocess.Popen]:
        """A process that is stopped when the block is left; its log is `errors` in the scratch."""
        with (self.scratch / "errors").open("w") as errors:
            process = subprocess.Popen(
                self.command(*words),
                cwd=self.path,
                env=self.environment,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            )
            try:
                yield process
            finally:
                process.kill()
                process.wait()

    def plain(self, text: str) -> str:
        """A text without what differs between machines, trees and versions."""
        for folder, name in ((self.scratch, "<scratch>"), (self.path, "<tree>")):
            text = text.replace(str(folder), name)
        return re.sub(r"nrt_jax \d+(\.\w+)+", "nrt_jax <version>", text)

    def _override(self, word: str) -> str | None:
        """An override that this tree understands; None where its key was removed."""
        key, _, value = word.partition("=")
        if key in self.keys:
            return word
        new = self.renames.key(key)
        return None if new is None else f"{new}={value}"


def environment(tree: Path, scratch: Path, cache: Path) -> dict[str, str]:
    """One CPU device, the tree's own modules, and nothing written into the tree."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_", "PYTHON"))}
    return kept | {
        "PYTHONPATH": str(tree),
        "PYTHONPYCACHEPREFIX": str(scratch / "bytecode"),
        "PYTHONHASHSEED": "0",
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def _is_override(word: str) -> bool:
    return re.match(r"[a-z_]+(\.[a-z_0-9]+)*=", word) is not None
