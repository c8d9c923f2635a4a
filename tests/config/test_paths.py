"""Paths of a config: of this machine, and whole."""

from pathlib import Path

import pytest

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError

MODEL = "model.path=m"


def paths_of(*overrides: str) -> RunConfig:
    return load_config(RunConfig, [], [MODEL, "data.source=jsonl", "data.path=d", *overrides])


@pytest.mark.parametrize("key", ["run_dir", "data.path", "data.tokenizer", "model.path"])
def test_a_home_is_expanded(key, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = paths_of(f"{key}=~/x")
    for name in key.split("."):
        config = getattr(config, name)
    assert config == tmp_path / "x"


def test_a_home_in_extends(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "base.yaml").write_text("run_dir: there\n")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "run.yaml").write_text(
        "extends: ~/base.yaml\nmodel: {path: m}\ndata: {source: jsonl, path: d}\n"
    )
    assert load_config(RunConfig, [tmp_path / "mine" / "run.yaml"]).run_dir == Path("there")


@pytest.mark.parametrize("key", ["run_dir", "data.path", "data.eval_path", "model.path"])
@pytest.mark.parametrize(
    ("value", "said"),
    [
        ("gs://b/x", "must be a path of this machine, not a gs:// address; copy or mount it first"),
        ("s3://b/x", "must be a path of this machine, not a s3:// address; copy or mount it first"),
        ("hdfs://h/x", "must be a path of this machine, not a hdfs:// address; copy or mount it"),
        ("file:///x/y", "must be a path of this machine, not a file:// address; write /x/y"),
        ("~nobody-of-this-name/x", "~nobody-of-this-name: no such user's home; write the path"),
        ('"a\\0b"', "must be a path, and a path has no NUL character"),
    ],
)
def test_what_is_no_path_of_this_machine(key, value, said):
    if key.startswith("data.") and value.startswith(("gs:", "s3:")):
        assert str(paths_of(f"{key}={value}").data).count(f"'{value}'") == 1
        return
    with pytest.raises(InputError) as error:
        paths_of(f"{key}={value}")
    assert f"override {key}=" in str(error.value)
    assert said in str(error.value)


def test_a_colon_is_no_address():
    assert paths_of("run_dir=a/b://c").run_dir == Path("a/b:/c")
