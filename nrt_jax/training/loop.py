"""`nrt-jax train`: open the run and hand it to its method's loop."""

from nrt_jax.config.run import RunConfig
from nrt_jax.stop import StopRequest
from nrt_jax.training.nrt import train_nrt
from nrt_jax.training.setup import open_run
from nrt_jax.training.sft import train_sft


def train(config: RunConfig, stop: StopRequest | None = None) -> None:
    """Train, or continue, the run of a config; `stop` is asked after every step."""
    with open_run(config, stop or StopRequest()) as run, run.memory.explained():
        {"nrt": train_nrt, "sft": train_sft}[config.method](run)
