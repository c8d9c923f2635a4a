"""`nrt-jax train`: open the run and hand it to its method's loop."""

from nrt_jax.training.config import RunConfig
from nrt_jax.training.nrt import train_nrt
from nrt_jax.training.run import open_run
from nrt_jax.training.sft import train_sft


def train(config: RunConfig) -> None:
    """Train, or continue, the run of a config."""
    with open_run(config) as run:
        {"nrt": train_nrt, "sft": train_sft}[config.method](run)
