"""The command line: help at once, configs that print and compose, the presets that ship."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import nrt_jax
from nrt_jax.cli import main
from nrt_jax.config import dump_config, load_config
from nrt_jax.training.config import RunConfig
from tests.conftest import REPOSITORY

CONFIGS = REPOSITORY / "configs"
QUICKSTART = CONFIGS / "quickstart" / "nrt.yaml"
GSM8K = CONFIGS / "examples" / "gsm8k_tiny.yaml"
OVERRIDES = {QUICKSTART: [], GSM8K: ["data.path=train.jsonl", "data.tokenizer=mistral_v3"]}
PRESETS = sorted([*(CONFIGS / "methods").glob("*.yaml"), *(CONFIGS / "recipes").glob("*.yaml")])
VERBS = (["train"], ["generate"], ["export"], ["report"], ["config", "show"], ["config", "schema"])


def values(config: RunConfig, expected: dict) -> dict:
    """The values of the dotted keys in `expected`."""
    shown = {}
    for key in expected:
        value = config
        for name in key.split("."):
            value = getattr(value, name)
        shown[key] = value
    return shown


# --- help -----------------------------------------------------------------------------------------

ASK_FOR_HELP = """
import contextlib, io, json, sys
from nrt_jax.cli import main
ended = []
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            main(words)
        except SystemExit as end:
            ended.append([end.code, out.getvalue()])
heavy = {"jax", "flax", "orbax", "pydantic", "numpy", "matplotlib"} & sys.modules.keys()
print(json.dumps([ended, sorted(heavy)]))
"""


def test_help_and_version_wait_for_no_library():
    words = [["--help"], ["--version"], *([*verb, "--help"] for verb in VERBS)]
    command = [sys.executable, "-c", ASK_FOR_HELP, json.dumps(words)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    ended, heavy = json.loads(done.stdout)
    assert heavy == []
    assert [status for status, _ in ended] == [0] * len(words)
    assert ended[1][1] == f"nrt-jax {nrt_jax.__version__}\n"
    assert all(verb[0] in ended[0][1] for verb in VERBS)
    for verb, (_, said) in zip(VERBS, ended[2:], strict=True):
        assert said.startswith(f"usage: nrt-jax {' '.join(verb)} ")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "required: VERB; see nrt-jax --help"),
        (["trian"], "invalid choice: 'trian'"),
        (["train"], "required: CONFIG; see nrt-jax train --help"),
        (["generate", "run"], "required: --prompt; see nrt-jax generate --help"),
        (["generate", "run", "--prompt", "1", "--temperature", "-1"], "-1 is no temperature"),
        (["generate", "run", "--prompt", "1", "--temperature", "hot"], "hot is no temperature"),
        (["generate", "run", "--prompt", "1", "--seed", "-1"], "-1 is no seed; give 0 to"),
        (["generate", "run", "--prompt", "1", "--seed", "x"], "x is no seed; give 0 to"),
        (["export", "run", "out", "--dtype", "int4"], "invalid choice: 'int4'"),
    ],
)
def test_wrong_words(words, said, capsys):
    with pytest.raises(SystemExit) as end:
        main(words)
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nrt-jax: error: ")
    assert said in line


# --- config ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [QUICKSTART, GSM8K], ids=lambda path: path.stem)
def test_config_show_reads_back_equal(path, capsys, tmp_path):
    assert main(["config", "show", str(path), *OVERRIDES[path], "seed=7", "run_dir=here"]) == 0
    again = tmp_path / "again.yaml"
    again.write_text(capsys.readouterr().out, "utf-8")
    config = load_config(RunConfig, [again], [])
    assert config == load_config(RunConfig, [path], [*OVERRIDES[path], "seed=7", "run_dir=here"])
    assert (config.seed, config.run_dir) == (7, Path("here"))
    assert dump_config(config) == again.read_text("utf-8")


def test_a_file_may_have_an_equals_sign_in_its_name(capsys, tmp_path):
    path = tmp_path / "rate=1.yaml"
    path.write_text(f"extends: {QUICKSTART}\nseed: 5\n")
    assert main(["config", "show", str(path), "seed=6"]) == 0
    assert "seed: 6\n" in capsys.readouterr().out


def test_config_schema_is_json_that_describes_every_key(capsys):
    assert main(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    assert schema["properties"].keys() == {*RunConfig.model_fields, "extends"}
    sections = [schema, *(s for s in schema["$defs"].values() if "properties" in s)]
    undescribed = [
        name
        for section in sections
        for name, field in section["properties"].items()
        if "description" not in field
    ]
    assert undescribed == []


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("objective.shceme=gm", "objective.shceme=gm: unknown key; did you mean 'scheme'?"),
        ("objectiv.scheme=gm", "did you mean 'objective'?"),
        ("objective.scheme=median", "median"),
    ],
)
def test_an_unknown_key(override, said, capsys):
    assert main(["config", "show", str(QUICKSTART), override]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("nrt-jax: error: override objectiv")
    assert said in line


# --- presets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [QUICKSTART, GSM8K], ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_presets_compose(path, preset):
    overrides = OVERRIDES[path]
    before = load_config(RunConfig, [path], overrides)
    after = load_config(RunConfig, [path, preset], overrides)
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


def test_every_method_has_a_preset_and_changes_nothing_else():
    """A comparison of methods compares the trace reward alone."""
    methods = {path.stem: path for path in PRESETS if path.parent.name == "methods"}
    assert methods.keys() == SCHEMES.keys() | {"sft"}
    base = load_config(RunConfig, [QUICKSTART], [])
    for name, scheme in SCHEMES.items():
        config = load_config(RunConfig, [QUICKSTART, methods[name]], [])
        wanted = base.objective.model_copy(update={"scheme": scheme})
        assert config == base.model_copy(update={"objective": wanted}), name
    config = load_config(RunConfig, [QUICKSTART, methods["sft"]], [])
    assert config == base.model_copy(update={"method": "sft"})


PAPER = {
    "optimizer.learning_rate": 1e-5,
    "optimizer.schedule": "constant",
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
    "optimizer.clip_norm": 1.0,
    "rollout.traces_per_prompt": 8,
}


@pytest.mark.parametrize(("recipe", "expected"), [("paper", PAPER), ("release", RELEASE)])
def test_recipe_values(recipe, expected):
    preset = CONFIGS / "recipes" / f"{recipe}.yaml"
    config = load_config(RunConfig, [GSM8K, preset], OVERRIDES[GSM8K])
    assert values(config, expected) == expected


def test_paper_is_one_epoch():
    config = load_config(RunConfig, [GSM8K, CONFIGS / "recipes" / "paper.yaml"], OVERRIDES[GSM8K])
    assert config.train.steps * config.train.batch_prompts == 204_800
