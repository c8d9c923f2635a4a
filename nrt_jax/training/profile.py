"""Traces of single steps for xprof, with the names of the phases."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from nrt_jax import distributed
from nrt_jax.config.run import RunConfig

log = logging.getLogger(__name__)

PROFILE = "profile"
"""Folder in the run directory."""


@contextmanager
def traced(config: RunConfig, step: int) -> Iterator[None]:
    """Trace what runs inside, if `profile.steps` names the step; each process what it runs."""
    if step not in config.profile.steps:
        yield
        return
    folder = config.run_dir / PROFILE / f"step_{step}"
    if distributed.process_count() > 1:
        folder /= f"process_{distributed.process_index()}"
    options = jax.profiler.ProfileOptions()
    # Every call of Python would make a trace of gigabytes.
    options.python_tracer_level = 0
    with (
        jax.profiler.trace(folder, profiler_options=options),
        jax.profiler.StepTraceAnnotation("step", step_num=step),
    ):
        yield
    log.info("step %d: its trace is in %s; xprof %s shows it", step, folder, folder)
