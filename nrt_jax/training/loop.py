"""`nrt-jax train`: open the run, and let the loop of its method train it."""

import logging
import time
from collections.abc import Collection

from nrt_jax.compilation import WATCH, use_cache
from nrt_jax.config.run import RunConfig
from nrt_jax.engine.generate import Generate, generate
from nrt_jax.stop import StopRequest
from nrt_jax.training.nrt import train_nrt
from nrt_jax.training.setup import setup
from nrt_jax.training.sft import train_sft

log = logging.getLogger(__name__)


def train(
    config: RunConfig,
    stop: StopRequest | None = None,
    generate: Generate = generate,
    *,
    allow_changed: Collection[str] = (),
) -> bool:
    """Train, or continue, the run of a config; `generate` drives the engine of the rollouts.

    True when the run has all its steps, False when it was stopped before.
    After every step `stop` is asked whether to end. `allow_changed` names the inputs that may be
    others than those that the run was trained on.
    """
    start = time.perf_counter()
    use_cache(config.compilation)
    WATCH.listen()
    stop = stop or StopRequest()
    with setup(config, allow_changed) as run, run.memory.explained():
        if config.method == "sft":
            train_sft(run, stop)
        else:
            train_nrt(run, stop, generate)
        complete = run.progress.step >= config.train.steps
    log.info(
        "compiled %d programs of the model and %d small ones in %.1f of %.1f s, those read from "
        "the cache included",
        WATCH.model_programs,
        WATCH.programs - WATCH.model_programs,
        WATCH.seconds,
        time.perf_counter() - start,
    )
    return complete
