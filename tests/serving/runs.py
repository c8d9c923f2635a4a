"""A run directory with a checkpoint of random weights, without training one."""

from pathlib import Path

import yaml

from nrt_jax.checkpoints import run_dir
from nrt_jax.checkpoints.abstract_model import abstract_model, init_params, load_tokenizer
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import init_state, state_shardings
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.training.optimizer import make_optimizer
from tests.models.tiny import mesh
from tests.training.runs import CONFIG, write_model

STEP = 3
LONGER = {
    "data": {"max_prompt_tokens": 40},
    "rollout": {"max_trace_tokens": 12, "max_response_tokens": 32},
}


def write_run(folder: Path, method: str = "nrt") -> Path:
    """A run by the name "run", with the quickstart's tokenizer."""
    directory = folder / "run"
    write_model(folder / "model")
    sections = {name: CONFIG[name] | LONGER.get(name, {}) for name in CONFIG if name != "method"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections | {"method": method}), encoding="utf-8")
    config = load_config(RunConfig, [path], [f"run_dir={directory}"])
    tokenizer = load_tokenizer(config)
    model = abstract_model(config, tokenizer, lambda _: mesh())
    params = init_params(config, model, tokenizer)
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    state = init_state(optimizer, params, state_shardings(optimizer, params, model.mesh))
    directory.mkdir()
    run_dir.prepare(config)
    checkpoints = Checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint, writable=True)
    checkpoints.save(STEP, state, {}, {})
    checkpoints.close()
    return directory
