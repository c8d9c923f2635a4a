"""Every model on every machine, with every method and recipe: it resolves and can be planned."""

import json
from pathlib import Path

import pytest

from benchmarks.plans import TOPOLOGIES, all_figures, load, preset_plan
from nrt_jax import cli
from nrt_jax.checkpoints.abstract_model import architecture_of, load_tokenizer
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.model import ModelConfig
from nrt_jax.config.presets import DIRECTORY, presets
from nrt_jax.errors import InputError
from tests.planning.runs import plan

NAMES = list(presets())
MODELS = [name for name in NAMES if name.startswith("models/")]
METHODS = [name for name in NAMES if name.startswith("methods/")]
RECIPES = [name for name in NAMES if name.startswith("recipes/")]
WORDS = ("models/llama3_2_3b", "recipes/paper", "data/tulu3_200k", "data.path=tulu3/*.parquet")
SIZES = {
    "models/llama3_2_3b": 3.21e9,
    "models/mistral_7b_v0_3": 7.25e9,
    "models/llama3_1_8b": 8.03e9,
    "models/llama3_1_70b": 70.6e9,
}
"""Weights, as the models' cards give them."""
NOT_DIVIDED = {("llama3_1_70b", "v6e_64"), ("llama3_1_70b", "h100x1")}
"""The 70B model's sizes are for machines that may hold it."""
RECORDED = json.loads((DIRECTORY.parent / "docs" / "figures.json").read_text("utf-8"))["plans"]


def test_every_machine_has_a_topology():
    machines = [name for name in NAMES if name.startswith("hardware/")]
    assert sorted(machines) == sorted(f"hardware/{name}" for name in TOPOLOGIES)
    assert sorted(MODELS) == sorted(SIZES)


@pytest.mark.parametrize("machine", TOPOLOGIES)
@pytest.mark.parametrize("model", [name.split("/")[1] for name in MODELS])
def test_every_model_on_every_machine_has_a_plan(model, machine):
    if (model, machine) in NOT_DIVIDED:
        with pytest.raises(InputError, match="mesh"):
            preset_plan(model, machine)
        return
    found = preset_plan(model, machine)
    assert found.setting.count == pytest.approx(SIZES[f"models/{model}"], rel=0.003)
    train = found.setting.config.train
    assert (train.batch_prompts, train.mini_batch_prompts, train.steps) == (256, 64, 800)
    assert found.memory.total > 0
    assert found.step.total > 0


def test_the_page_has_these_plans():
    """After a change of the formulas: python -m benchmarks.plans, and docs/figures.py plans."""
    assert all_figures() == pytest.approx(RECORDED, rel=1e-4)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("method", METHODS)
def test_models_and_machines_compose_with_methods_and_recipes(method, recipe):
    alone = load("hardware/v6e_64", "models/llama3_1_8b", recipe)
    config = load("hardware/v6e_64", "models/llama3_1_8b", recipe, method)
    assert config.model == alone.model
    assert config.mesh == alone.mesh
    assert config.rollout == alone.rollout
    assert plan("v6e:8x8", "hardware/v6e_64", "models/llama3_1_8b", recipe, method).fits


# --- the shape of a checkpoint that is not there -------------------------------------------------


def test_training_asks_for_the_checkpoint_of_a_shape():
    config = load("models/llama3_1_8b", "recipes/paper")
    with pytest.raises(InputError, match=r"name the directory of its weights, model\.path=DIR"):
        load_tokenizer(config)
    with pytest.raises(InputError, match=r"model\.path is null"):
        architecture_of(config.model)


def test_a_checkpoint_of_another_shape_is_refused(tmp_path, monkeypatch):
    small = Architecture(vocab_size=32000, hidden_size=64)
    monkeypatch.setattr("nrt_jax.checkpoints.abstract_model.read_architecture", lambda path: small)
    model = ModelConfig(path=tmp_path, shape=small)
    assert architecture_of(model) == small
    with pytest.raises(InputError, match=r"hidden_size is 64, and model.shape says 96"):
        architecture_of(model.model_copy(update={"shape": Architecture(hidden_size=96)}))


def test_a_shape_and_random_weights_are_not_both_asked_for():
    with pytest.raises(InputError, match=r"set model\.shape=null to draw random weights"):
        load("models/llama3_1_8b", "recipes/paper", "model.architecture.hidden_size=64")


# --- the verb ------------------------------------------------------------------------------------


def test_the_verb_prints_a_plan(capsys):
    words = [*WORDS, "hardware/h100x8", "--topology", "h100x8", "--price-per-hour", "2", "--json"]
    assert cli.main(["plan", *words]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["fits"]
    assert figures["cost"] == pytest.approx(2 * 8 * figures["hours"])


def test_the_verb_says_by_how_much_a_run_does_not_fit(capsys):
    words = [*WORDS, "hardware/h100x1", "optimizer.offload=false", "rollout.slots=512"]
    assert cli.main(["plan", *words, "--topology", "h100x1"]) == 1
    captured = capsys.readouterr()
    assert "does not fit" in captured.out
    assert "GB more than the 76.0 GB that can be used; the cheapest changes" in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--topology", "v5p:4x4x5"], "v5p:4x4x4"),
        (["--topology", "h100x9"], "the nearest are h100x8"),
        (["--topology", "v6e:8x8", "--tokens", "1,2"], "give three counts of tokens"),
        (["--topology", "v6e:8x8", "--price-per-hour", "-1"], "give a number above 0"),
        ([], "--topology"),
    ],
)
def test_mistakes_in_options_are_one_line(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", *WORDS, *words])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_a_config_without_a_model_asks_for_one(tmp_path, capsys):
    file = Path(tmp_path / "run.yaml")
    file.write_text("data: {path: x.jsonl, tokenizer: y}\nmodel: {dtype: bfloat16}\n")
    assert cli.main(["plan", str(file), "--topology", "v6e:8x8"]) == 2
    assert "set one of path" in capsys.readouterr().err
