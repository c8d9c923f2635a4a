"""Start what a filled file describes, by the program that it is for."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence

from nrt_jax.errors import InputError

_BY_STDIN: dict[str, Sequence[str]] = {
    "jobset": ("kubectl", "apply", "-f", "-"),
    "slurm": ("sbatch",),
    "slurm-sweep": ("sbatch",),
    "slurm-prepare": ("sbatch",),
}
_SKY = ("sky", "jobs", "launch", "--yes")


def start(kind: str, text: str) -> int:
    """Hand the file to its program; the program's status. Scripts replace this process.

    Raises InputError where the program is not installed.
    """
    command = _BY_STDIN.get(kind) or (_SKY if kind == "sky" else ("bash",))
    if shutil.which(command[0]) is None:
        raise InputError(
            f"launch {kind}: {command[0]} is not installed; install it, or write the file with "
            "--dry-run and start it where it is"
        )
    if kind in _BY_STDIN:
        return subprocess.run(command, input=text.encode(), check=False).returncode
    if kind == "sky":
        with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            return subprocess.run([*command, file.name], check=False).returncode
    # Signals then reach the script, which passes them on.
    os.execvp("bash", ["bash", "-c", text])
