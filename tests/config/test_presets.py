"""The presets that ship: they fit every config, and hold the values that their names promise."""

import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
QUICKSTART = CONFIGS / "quickstart" / "nrt.yaml"
GSM8K = CONFIGS / "examples" / "gsm8k_tiny.yaml"
OVERRIDES = {QUICKSTART: [], GSM8K: ["data.path=train.jsonl", "data.tokenizer=mistral_v3"]}
METHODS = {path.stem: path for path in sorted((CONFIGS / "methods").glob("*.yaml"))}
RECIPES = {path.stem: path for path in sorted((CONFIGS / "recipes").glob("*.yaml"))}


@pytest.mark.parametrize("path", [QUICKSTART, GSM8K], ids=lambda path: path.stem)
@pytest.mark.parametrize("name", [*METHODS, *RECIPES])
def test_fits_every_config(path, name):
    before = load_config(RunConfig, [path], OVERRIDES[path])
    after = load_config(RunConfig, [path, (METHODS | RECIPES)[name]], OVERRIDES[path])
    assert after.run_dir == before.run_dir
    assert after.model == before.model
    assert after.data.source == before.data.source


SCHEMES = {
    "jlb": "logp",
    "verifree": "p",
    "rlpr": "am",
    "nrt_gm": "gm",
    "nrt_ws_inv_p": "ws_inv_p",
    "nrt_ws_neg_log_p": "ws_neg_log_p",
}


def test_methods_differ_in_the_trace_reward_alone():
    assert METHODS.keys() == SCHEMES.keys() | {"sft"}
    base = load_config(RunConfig, [QUICKSTART])
    for name, scheme in SCHEMES.items():
        objective = base.objective.model_copy(update={"scheme": scheme})
        config = load_config(RunConfig, [QUICKSTART, METHODS[name]])
        assert config == base.model_copy(update={"objective": objective}), name
    config = load_config(RunConfig, [QUICKSTART, METHODS["sft"]])
    assert config == base.model_copy(update={"method": "sft"})


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
    tree = load_config(RunConfig, [GSM8K, RECIPES[name]], OVERRIDES[GSM8K]).model_dump()
    shown = {key: tree[key.split(".")[0]][key.split(".")[1]] for key in expected}
    assert shown == expected


def test_the_paper_trains_one_epoch():
    train = load_config(RunConfig, [GSM8K, RECIPES["paper"]], OVERRIDES[GSM8K]).train
    assert train.steps * train.batch_prompts == 204_800
