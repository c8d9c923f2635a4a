"""What is wrong with a config or an override: every error message whole."""

import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field, model_validator

from nrt_jax.config.load import Section, load_config
from nrt_jax.errors import InputError
from tests.config.schema import Config, Strict, load, message, write

UNKNOWN = "unknown key; must be one of"
ALL = "name, train, data, sources, notes, output, tags"
QUOTES = (
    "put double quotes around a text that YAML reads as something else, and single quotes around "
    """the whole for the shell, such as 'section.field=["[x]"]'"""
)
TRAIN = "learning_rate, steps, scheme, cap, shares"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train: {shceme: am}", "c.yaml: train.shceme: unknown key; did you mean 'scheme'?"),
        ("train: {zzz: {a: 1}}", f"c.yaml: train.zzz: {UNKNOWN} {TRAIN}"),
        ("zzz: 1", f"c.yaml: zzz: {UNKNOWN} {ALL}"),
        ("zzz: {}", f"c.yaml: zzz: {UNKNOWN} {ALL}"),
        ("data: {pth: x}", "c.yaml: data.pth: unknown key; did you mean 'path'?"),
        ("sources: [{pth: 1}]", "c.yaml: sources.0.pth: unknown key; did you mean 'path'?"),
        ("<<: {name: x}", f"c.yaml: <<: {UNKNOWN} {ALL}"),
        ("train: {learning_rate: 0}", "c.yaml: train.learning_rate=0: must be greater than 0"),
        ("train: {learning_rate: .nan}", "c.yaml: train.learning_rate=NaN: must be a finite number"),
        ("train: {steps: 1.5}", "c.yaml: train.steps=1.5: must be a valid integer, got a number with a fractional part"),
        ("train: {steps: 1001}", "c.yaml: train.steps=1001: must be less than or equal to 1000"),
        ("train: {steps: many}", "c.yaml: train.steps=many: must be a valid integer"),
        ("train: {steps: null}", "c.yaml: train.steps=null: must be a valid integer"),
        ("train: {scheme: pm}", "c.yaml: train.scheme=pm: must be 'am' or 'gm'"),
        ("train: {cap: x}", "c.yaml: train.cap=x: must be a valid number or 'auto'"),
        ("train:", "c.yaml: train=null: must be a mapping"),
        ("train: [1]", "c.yaml: train=[1]: must be a mapping"),
        ("notes: {a: [1]}", "c.yaml: notes.a=[1]: must be a valid string or a valid integer; put it in quotes"),
        ("name: [1]", "c.yaml: name=[1]: must be a valid string; put it in quotes"),
        ("data: {path: [1]}", "c.yaml: data.path=[1]: must be a path"),
        ("data: {}", "c.yaml: data.path: required; set it in the file or with data.path=VALUE"),
        ("train: {shares: {copy_share: 0.1}}", "c.yaml: train.shares: shares must sum to 1, not 0.6"),
        ("train: {steps: 'a\nb'}", "c.yaml: train.steps=a b: must be a valid integer"),
        (f"train: {{steps: {'x' * 99}}}", f"c.yaml: train.steps={'x' * 57}...: must be a valid integer"),
        (f"train: {{steps: {'9' * 5000}}}", "c.yaml: train.steps=Infinity: must be a finite number"),
        ("train: {steps: 0, scheme: pm, stps: 1}", "c.yaml: train.stps: unknown key; did you mean 'steps'?"),
        ("- 1", "c.yaml: [1]: must be a mapping of keys to values"),
        ("just text", "c.yaml: just text: must be a mapping of keys to values"),
    ],
)  # fmt: skip
def test_a_wrong_file(text, expected):
    assert message(load, text) == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.learning_rate=-1", "override train.learning_rate=-1: must be greater than 0"),
        ("train.shceme=am", "override train.shceme=am: unknown key; did you mean 'scheme'?"),
        ("train.steps.x=1", "override train.steps: must be a valid integer"),
        ("train=3", "override train=3: must be a mapping"),
        ("train={steps: 0}", "override train.steps=0: must be greater than or equal to 1"),
        ("train.shares.copy_share=0", "override train.shares: shares must sum to 1, not 0.5"),
        ("extends=x", f"override extends=x: {UNKNOWN} {ALL}"),
        ("train.steps", "override train.steps: must look like section.field=value"),
        ("=1", "override =1: must look like section.field=value"),
        ("train..steps=1", "override train..steps=1: must look like section.field=value"),
        ("sources=[", f"override sources=[: must be YAML: expected the node content, but found '<stream end>'; {QUOTES}"),
        ("name=", "override name=null: must be a valid string"),
        ("output=", "override output=null: must be a path"),
        ("tags=x", "override tags=x: must be a list, such as [a, b]"),
        ("tags=[*x]", f"override tags=[*x]: must be YAML: found undefined alias 'x'; {QUOTES}"),
        ("tags=[[x]]", f'override tags.0=["x"]: must be a valid string; {QUOTES}'),
    ],
)  # fmt: skip
def test_a_wrong_override(override, expected):
    assert message(load, "name: x", override) == expected


def test_the_file_that_set_a_wrong_value_is_named():
    write("a/base.yaml", "train: {steps: 0}")
    write("c.yaml", "extends: a/base.yaml\ntrain: {scheme: gm}")
    path = write("run.yaml", "name: x")
    expected = "a/base.yaml: train.steps=0: must be greater than or equal to 1"
    assert message(load_config, Config, [Path("c.yaml"), path]) == expected
    assert load_config(Config, [Path("c.yaml"), path], ["train.steps=1"]).train.steps == 1
    assert message(load_config, Config, [Path("c.yaml"), path], ["train.steps=-1"]) == (
        "override train.steps=-1: must be greater than or equal to 1"
    )


def test_a_required_key_is_asked_of_the_last_file():
    write("base.yaml", "train: {steps: 1}")
    assert message(load_config, Strict, [Path("base.yaml"), write("c.yaml", "")]) == (
        "c.yaml: data: required; set it in the file or with data=VALUE"
    )
    assert message(load_config, Strict, []) == (
        "config: data: required; set it in the file or with data=VALUE"
    )


def test_a_choice_of_sections_shows_no_name_of_a_class():
    class Left(Section):
        kind: Literal["left"]
        width: int = 1

    class Right(Section):
        kind: Literal["right"]
        height: int = 1

    class Choice(Section):
        part: Annotated[Left | Right, Field(discriminator="kind")]

    assert message(load, "part: {kind: left, widht: 2}", schema=Choice) == (
        "c.yaml: part.widht: unknown key; did you mean 'width'?"
    )
    assert message(load, "part: {kind: right, height: x}", schema=Choice) == (
        "c.yaml: part.height=x: must be a valid integer"
    )


def test_a_rule_about_the_whole_names_the_file():
    class Whole(Section):
        steps: int = 1

        @model_validator(mode="after")
        def _reject(self):
            raise InputError("steps and epochs exclude each other")

    assert message(load, "steps: 2", schema=Whole) == "c.yaml: steps and epochs exclude each other"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1\nb: [", "c.yaml: line 2: must be YAML: expected the node content, but found '<stream end>'"),
        ("a:\n\tb: 1", "c.yaml: line 2: must be YAML: found character '\\t' that cannot start any token"),
        ("name: a\ntrain: {}\nname: b", "c.yaml: line 3: must be YAML: the key 'name' occurs twice"),
        ("train:\n  steps: 1\n  steps: 2", "c.yaml: line 3: must be YAML: the key 'steps' occurs twice"),
        ("? [a]\n: 1", "c.yaml: line 1: must be YAML: a key that is no name"),
        ("a: !!python/name:os.system x", "c.yaml: line 1: must be YAML: unknown tag 'tag:yaml.org,2002:python/name:os.system'"),
        ("a: 1\n---\nb: 2", "c.yaml: line 2: must be YAML: but found another document"),
        ("a: *b", "c.yaml: line 1: must be YAML: found undefined alias 'b'"),
        ("a: &a [*a]", "c.yaml: must be YAML: nested too deeply"),
        ("[" * 3000, "c.yaml: must be YAML: nested too deeply"),
        ("a: \x07", 'c.yaml: must be YAML: unacceptable character #x0007: special characters are not allowed in "<unicode string>", position 3'),
    ],
)  # fmt: skip
def test_bad_yaml(text, expected):
    assert message(load, text) == expected


def test_files_that_cannot_be_read():
    Path("latin.yaml").write_bytes(b"name: \xfc")
    Path("folder.yaml").mkdir()
    assert message(load_config, Config, [Path("no/c.yaml")]) == "no/c.yaml: no such config file"
    assert message(load, "extends: no.yaml") == "no.yaml: no such config file (extended by c.yaml)"
    assert message(load_config, Config, [Path("folder.yaml")]) == (
        "folder.yaml: cannot be read: Is a directory"
    )
    assert message(load_config, Config, [Path("latin.yaml")]) == (
        "latin.yaml: must be UTF-8 text; byte 6 is not"
    )


def test_files_of_other_kinds():
    path = write("c.yaml", "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    assert message(load_config, Config, [path]).startswith("c.yaml: is a Git LFS pointer, not the")
    path.write_text("name: x", encoding="utf-16")
    assert message(load_config, Config, [path]).startswith("c.yaml: is text in UTF-16; save it as")
    path.unlink()
    path.symlink_to("/nowhere/c.yaml")
    assert message(load_config, Config, [path]) == (
        "c.yaml: is a symbolic link to /nowhere/c.yaml, which does not exist; restore it"
    )


def test_an_override_without_its_sign():
    assert message(load_config, Config, [Path("train.steps")]) == (
        "train.steps: no such config file; an override is written train.steps=VALUE"
    )


def test_a_byte_order_mark_is_no_part_of_the_first_key():
    assert load("\ufeffname: x").name == "x"


@pytest.mark.parametrize("extends", ["3", "[a.yaml, 3]", "{a: b}", "null"])
def test_wrong_extends(extends):
    shown = {"[a.yaml, 3]": '["a.yaml", 3]', "{a: b}": '{"a": "b"}'}.get(extends, extends)
    expected = f"c.yaml: extends={shown}: must be a path or a list of paths"
    assert message(load, f"extends: {extends}") == expected


def test_a_cycle_names_its_chain():
    write("a/x.yaml", "extends: ../b/y.yaml")
    write("b/y.yaml", "extends: ../a/x.yaml")
    assert message(load, "extends: a/x.yaml") == (
        "b/y.yaml: extends=a/x.yaml: must not lead back to itself: "
        "c.yaml -> a/x.yaml -> b/y.yaml -> a/x.yaml"
    )
    assert message(load, f"extends: {os.curdir}/c.yaml") == (
        "c.yaml: extends=c.yaml: must not lead back to itself: c.yaml -> c.yaml"
    )


def test_a_config_cannot_be_changed():
    with pytest.raises(ValueError, match="frozen"):
        Config().train.steps = 3


class Numbers(Section):
    count: int = Field(default=1, ge=1)
    maybe: int | None = None
    seed: int = Field(default=0, ge=0, le=2**63)
    share: float | None = None


@pytest.mark.parametrize("key", ["count", "maybe"])
@pytest.mark.parametrize("value", [2**31, 2**63, 10**40])
def test_integers_fit_the_devices(key, value):
    with pytest.raises(InputError, match=rf"^override {key}={value}.*: must be -2147483648 to"):
        load_config(Numbers, [], [f"{key}={value}"])
    assert getattr(load_config(Numbers, [], [f"{key}={2**31 - 1}"]), key) == 2**31 - 1


def test_a_field_may_bound_its_integers_itself():
    assert load_config(Numbers, [], [f"seed={2**63}", "share=1e30"]).seed == 2**63
