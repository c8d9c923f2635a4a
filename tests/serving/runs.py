"""Directories that hold a model of random weights: a run with a checkpoint, a chat model."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import yaml
from flax import nnx

from nrt_jax.checkpoints import hf_weights, run_dir
from nrt_jax.checkpoints.abstract_model import abstract_model, init_params, load_tokenizer
from nrt_jax.checkpoints.inputs import RunInputs
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import init_state, state_shardings
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.models.decoder import Decoder
from nrt_jax.training.optimizer import make_optimizer
from tests.data.made_tokenizers import write_made_tokenizer
from tests.models.tiny import architecture, mesh
from tests.training.runs import CONFIG, write_model

STEP = 3
LONGER = {
    "data": {"max_prompt_tokens": 40},
    "rollout": {"max_trace_tokens": 12, "max_response_tokens": 32},
}


def write_chat_model(
    directory: Path,
    template: str | None = None,
    *,
    kind: str = "llama3",
    think: tuple[str, str] | None = None,
    **changes: Any,
) -> Path:
    """A Hugging Face directory with a made tokenizer, and what is given of template and names."""
    made = write_made_tokenizer(kind, directory.with_name(f"{directory.name}_tokenizer"))
    backend = tokenizers.Tokenizer.from_file(str(made / "tokenizer.json"))

    def add_tokenizer(folder: Path) -> None:
        if think is None:
            shutil.copytree(made, folder, dirs_exist_ok=True)
        else:
            Tokenizer.load(made, *think).copy_to(folder)
        if template is not None:
            (folder / "chat_template.jinja").write_text(template)

    small = architecture(vocab_size=backend.get_vocab_size(), **changes)
    params = nnx.to_pure_dict(nnx.split(Decoder(small, nnx.Rngs(0)))[1])
    hf_weights.write_directory(directory, small, params, add_files=add_tokenizer)
    return directory


def write_run(
    folder: Path, method: str = "nrt", model: Path | None = None, overrides: Sequence[str] = ()
) -> Path:
    """A run by the name "run", of the model or of a small one with the quickstart's tokenizer."""
    directory = folder / "run"
    if model is None:
        write_model(folder / "model")
    else:
        overrides = [f"model.path={model}", f"data.tokenizer={model}", *overrides]
    sections = {name: CONFIG[name] | LONGER.get(name, {}) for name in CONFIG if name != "method"}
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(sections | {"method": method}), encoding="utf-8")
    config = load_config(RunConfig, [path], [f"run_dir={directory}", *overrides])
    tokenizer = load_tokenizer(config)
    abstract = abstract_model(config, tokenizer, lambda _: mesh())
    params = init_params(config, abstract, tokenizer)
    optimizer = make_optimizer(config.optimizer, config.train.updates)
    state = init_state(optimizer, params, state_shardings(optimizer, params, abstract.mesh))
    directory.mkdir()
    run_dir.describe(config, RunInputs({}))
    checkpoints = Checkpoints(directory / run_dir.CHECKPOINTS, config.checkpoint, writable=True)
    checkpoints.save(STEP, state, {}, {})
    checkpoints.close()
    return directory
