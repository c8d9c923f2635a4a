"""Compiled programs: kept between processes in a cache, and counted in this one."""

import logging
import os
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import filelock
import jax

from nrt_jax import distributed
from nrt_jax.config.compilation import CompilationConfig
from nrt_jax.config.paths import user_cache

log = logging.getLogger(__name__)

_MIN_COMPILE_S = 0.1
"""Programs that compile faster are not kept: reading them would save little."""
_COMPILE = "/jax/core/compile/backend_compile_duration"
"""jax reports the start of a compilation as a scalar of this name, and its end as a duration."""
MODEL_PROGRAMS = frozenset(
    {
        "run_prompts",
        "run_next_parts",
        "insert_samples",
        "decode_steps",
        "suffix_logprobs",
        "prompt_logprobs",
        "add_micro_batch",
        "apply_update",
        "answer_logprobs",
        "under_sampling_policy",
        "under_reference",
    }
)
"""Names of the functions that run the model, its update, or the engine's state: their programs grow
with the model, and all others take a moment."""
_PROGRAM, _TIME = "-cache", "-atime"
"""Endings of jax's two files of a cached program, written in this order."""


def use_cache(config: CompilationConfig) -> None:
    """Read and keep compiled programs in the folder of the config; jax's own setting wins.

    A folder that cannot be written is reported, and everything is compiled.
    """
    if distributed.process_count() > 1:
        _find_programs_of_first()
    if config.cache == "off" or jax.config.values["jax_compilation_cache_dir"] is not None:
        return
    folder = None
    try:
        folder = user_cache() / "compiled" if config.cache == "auto" else Path(config.cache)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
        _remove_unfinished(folder)
    except (OSError, RuntimeError) as error:
        problem = getattr(error, "strerror", None) or error
        where = folder or "the user's cache folder"
        log.warning(
            "%s: %s: every start compiles anew; set compilation.cache to a folder, or to off",
            where,
            problem,
        )
        return
    # The cache saves time and nothing else: a program that it cannot read or keep is compiled.
    warnings.filterwarnings("ignore", message="Error (reading|writing) persistent compilation")
    warnings.filterwarnings("ignore", message="Cache value for key .* exceeds the maximum cache")
    jax.config.update("jax_compilation_cache_dir", str(folder))
    of_ours = {
        "jax_compilation_cache_max_size": int(config.cache_gb * 1e9),
        "jax_persistent_cache_min_compile_time_secs": _MIN_COMPILE_S,
    }
    for name, value in of_ours.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


@cache
def _find_programs_of_first() -> None:
    """Let the processes of CPUs find what process 0 compiled, which alone writes into the cache.

    jax puts into the name of a program which of its devices are the process's own, so that the
    others would look for names that nobody writes. The program is the same on all.
    """
    from jax._src import cache_key

    hash_devices = cache_key._hash_accelerator_config

    def hash_devices_alike(hashed: Any, devices: Any) -> None:
        if devices.flat[0].platform == "cpu":
            hashed.update(_devices_of_first().encode())
        else:
            hash_devices(hashed, devices)

    cache_key._hash_accelerator_config = hash_devices_alike


@cache
def _devices_of_first() -> str:
    """jax's fingerprint of the devices, and of their instructions, on process 0."""
    from jax._src.lib import xla_client

    fingerprint = xla_client.get_topology_for_devices(jax.devices()).fingerprint()
    return distributed.word_of_first("devices", str(fingerprint))


def _remove_unfinished(folder: Path) -> None:
    """Remove what a killed process wrote half: jax would fail to read or to replace it forever."""
    try:
        with filelock.FileLock(folder / ".lockfile", timeout=1):
            for program in folder.glob(f"*{_PROGRAM}"):
                name = program.name.removesuffix(_PROGRAM)
                if not program.with_name(name + _TIME).exists():
                    program.unlink()
    except filelock.Timeout:  # other processes are writing
        return


class CompileWatch:
    """What this process compiles; `on_change` is called when a program begins and when it ends."""

    def __init__(self) -> None:
        self.programs = 0
        """Programs so far, those that the cache had included."""
        self.by_name: Counter[str] = Counter()
        """The same by the name of the function."""
        self.seconds = 0.0
        """Time that they took, read from the cache or compiled."""
        self.to_come = 0
        """Further programs that are known to be needed."""
        self.compiling = False
        self.on_change: Callable[[], None] | None = None
        self._taken, self._listens = 0.0, False

    def listen(self) -> None:
        """Begin to count."""
        if not self._listens:
            jax.monitoring.register_scalar_listener(self._begin)
            jax.monitoring.register_event_duration_secs_listener(self._end)
        self._listens = True

    @property
    def model_programs(self) -> int:
        """Those of MODEL_PROGRAMS."""
        return sum(self.by_name[name] for name in MODEL_PROGRAMS)

    def take(self) -> float:
        """Seconds since the last call."""
        seconds = self.seconds - self._taken
        self._taken = self.seconds
        return seconds

    def _begin(self, event: str, _time: float | int, **_: object) -> None:
        if event == _COMPILE:
            self._change(compiling=True)

    def _end(self, event: str, seconds: float | int, fun_name: str = "", **_: object) -> None:
        if event == _COMPILE:
            self.programs += 1
            # jax says jit(name).
            self.by_name[fun_name.removeprefix("jit(").removesuffix(")")] += 1
            self.seconds += seconds
            self._change(compiling=False)

    def _change(self, *, compiling: bool) -> None:
        self.compiling = compiling
        if self.on_change is not None:
            self.on_change()


WATCH = CompileWatch()
"""Of this process, which has one compiler."""
