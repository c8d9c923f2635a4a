"""The presets: found by name, fit for every config, with the values that their names promise."""

from pathlib import Path

import pytest
import yaml

from nrt_jax.config.load import load_config
from nrt_jax.config.presets import presets
from nrt_jax.config.run import RunConfig
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.errors import InputError

PRESETS = presets()
QUICKSTART = PRESETS["quickstart/nrt"]
GSM8K = PRESETS["examples/gsm8k_tiny"]
OVERRIDES = {QUICKSTART: [], GSM8K: ["data.path=train.jsonl", "data.tokenizer=mistral_v3"]}
METHODS = [name for name in PRESETS if name.startswith("methods/")]
RECIPES = [name for name in PRESETS if name.startswith("recipes/")]


@pytest.mark.parametrize("path", [QUICKSTART, GSM8K], ids=lambda path: path.stem)
@pytest.mark.parametrize("name", [*METHODS, *RECIPES])
def test_fits_every_config(path, name):
    before = load_config(RunConfig, [path], OVERRIDES[path])
    after = load_config(RunConfig, [path, PRESETS[name]], OVERRIDES[path])
    assert after.run_dir == before.run_dir
    assert after.model == before.model
    assert after.data.source == before.data.source


PAPERS_METHODS = {
    "methods/jlb": "logp",
    "methods/verifree": "p",
    "methods/rlpr": "am",
    "methods/nrt_gm": "gm",
    "methods/nrt_ws_inv_p": "ws_inv_p",
    "methods/nrt_ws_neg_log_p": "ws_neg_log_p",
}


def scheme_of(method: str) -> str:
    return yaml.safe_load(PRESETS[method].read_text("utf-8"))["objective"]["scheme"]


def test_every_scheme_has_a_preset():
    with_traces = [name for name in METHODS if name != "methods/sft"]
    assert sorted(map(scheme_of, with_traces)) == sorted(SCHEMES)
    assert {name: scheme_of(name) for name in PAPERS_METHODS} == PAPERS_METHODS


def test_methods_differ_in_the_trace_reward_alone():
    base = load_config(RunConfig, [QUICKSTART])
    for name in METHODS:
        if name == "methods/sft":
            expected = base.model_copy(update={"method": "sft"})
        else:
            objective = base.objective.model_copy(update={"scheme": scheme_of(name)})
            expected = base.model_copy(update={"objective": objective})
        assert load_config(RunConfig, [QUICKSTART, PRESETS[name]]) == expected, name


PAPER = {
    "optimizer.learning_rate": 1e-5,
    "optimizer.schedule": "constant",
    "optimizer.warmup_ratio": 0.0,
    "optimizer.weight_decay": 0.01,
    "train.batch_prompts": 256,
    "train.mini_batch_prompts": 64,
    "rollout.traces_per_prompt": 8,
    "rollout.max_trace_tokens": 2048,
    "rollout.max_response_tokens": 4096,
    "rollout.temperature": 1.0,
    "rollout.top_p": 1.0,
    "data.max_prompt_tokens": 4096,
    "objective.clip_low": 0.2,
    "objective.clip_high": 0.28,
    "objective.kl_coefficient": 0.0,
    "objective.entropy_coefficient": 0.0,
    "objective.format_coefficient": 0.3,
}
"""Table 6 of the paper."""

RELEASE = {
    "objective.token_signal": "fixed",
    "objective.policy_loss": "cispo",
    "objective.reward_policy": "sampling",
    "objective.estimator": "grpo_unclipped",
    "objective.trace_covers": "z_and_end",
    "objective.format_where": "not_emitted",
    "objective.weight_cap": None,
    "optimizer.clip_norm": 1.0,
    "rollout.traces_per_prompt": 8,
}
"""The authors' code, with what it shares with the paper."""


@pytest.mark.parametrize(("name", "expected"), [("paper", PAPER), ("release", RELEASE)])
def test_values_of_a_recipe(name, expected):
    tree = load_config(
        RunConfig, [GSM8K, PRESETS[f"recipes/{name}"]], OVERRIDES[GSM8K]
    ).model_dump()
    shown = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in expected}
    assert shown == expected


def test_the_paper_trains_one_epoch():
    train = load_config(RunConfig, [GSM8K, PRESETS["recipes/paper"]], OVERRIDES[GSM8K]).train
    assert train.steps * train.batch_prompts == 204_800


# --- names ---------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def load(*names: str, overrides: tuple[str, ...] = ()) -> RunConfig:
    return load_config(RunConfig, [Path(name) for name in names], overrides)


def test_a_preset_is_found_by_its_name_from_anywhere(folder):
    config = load("quickstart/nrt")
    assert config == load("quickstart/nrt.yaml") == load(str(QUICKSTART))
    assert config.model.path == QUICKSTART.parent / "base_model"
    assert load("quickstart/nrt", "methods/rlpr").objective.scheme == "am"


def test_extends_takes_a_file_beside_it_or_a_preset(folder):
    (folder / "run.yaml").write_text("extends: [quickstart/nrt, recipes/release]\nseed: 5\n")
    config = load("run.yaml")
    assert config == load("quickstart/nrt", "recipes/release", overrides=("seed=5",))
    (folder / "quickstart").mkdir()
    (folder / "quickstart" / "nrt").write_text("extends: quickstart/sft\n")
    assert load("run.yaml").method == "sft"


def test_a_file_wins_over_a_preset_and_a_directory_does_not(folder):
    (folder / "quickstart").mkdir()
    (folder / "quickstart" / "nrt.yaml").write_text("extends: quickstart/sft\nseed: 6\n")
    (folder / "quickstart" / "sft").mkdir()
    assert load("quickstart/nrt.yaml").seed == 6
    assert load("quickstart/nrt").seed == 0
    assert load("quickstart/sft").method == "sft"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("rlpr", "methods/rlpr"),
        ("method/rlpr.yaml", "methods/rlpr"),
        ("quickstrat/nrt", "quickstart/nrt"),
        ("configs/quickstart/nrt.yaml", "quickstart/nrt"),
        ("quickstart/ntr", "quickstart/nrt"),
    ],
)
def test_a_misspelt_name_gets_a_suggestion(name, meant, folder):
    with pytest.raises(InputError) as error:
        load(name)
    assert str(error.value) == f"{name}: no such config file; did you mean {meant!r}?"
    (folder / "run.yaml").write_text(f"extends: {name}\n")
    with pytest.raises(InputError) as error:
        load("run.yaml")
    expected = f"{name}: no such config file (extended by run.yaml); did you mean {meant!r}?"
    assert str(error.value) == expected
