"""The config machinery: merging, overrides, paths, dumps, and every error message whole."""

import math
import os
from pathlib import Path
from typing import Annotated, Literal

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, model_validator

from nrt_jax.config.load import ConfigPath, Section, config_schema, dump_config, load_config
from nrt_jax.errors import InputError


class Shares(Section):
    copy_share: float = 0.5
    noise_share: float = 0.5

    @model_validator(mode="after")
    def _sum_to_one(self):
        if self.copy_share + self.noise_share != 1:
            raise ValueError(f"shares must sum to 1,\n  not {self.copy_share + self.noise_share}")
        return self


class Train(Section):
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak of the schedule."""
    steps: int = Field(default=10, ge=1, le=1000)
    scheme: Literal["am", "gm"] = "am"
    cap: float | Literal["auto"] | None = None
    shares: Shares = Shares()


class Source(Section):
    path: ConfigPath
    """A data file."""


class Config(Section):
    name: str = "run"
    train: Train = Train()
    """How to train."""
    data: Source | None = None
    sources: tuple[Source, ...] = ()
    notes: dict[str, str | int] = Field(default_factory=dict)
    output: Path = Path("runs/x")


class Strict(Section):
    train: Train = Train()
    data: Source


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(name: str, text: str) -> Path:
    path = Path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def load(text: str = "", *overrides: str, schema=Config):
    return load_config(schema, [write("c.yaml", text)], overrides)


def message(call, *args, **kwargs) -> str:
    with pytest.raises(InputError) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)
    return str(error.value)


# --- merging -------------------------------------------------------------------------------------


def test_an_empty_file_and_no_file_give_the_defaults():
    assert load("") == load("# only a comment\n") == load_config(Config, []) == Config()


def test_extends_merges_mappings_deep_and_replaces_the_rest():
    write("a/base.yaml", "train: {steps: 5, scheme: gm}\nsources: [{path: x}, {path: y}]\n")
    write("a/more.yaml", "train: {steps: 6, cap: 2}\n")
    path = write("b/c.yaml", "extends: [../a/base.yaml, ../a/more.yaml]\nsources: [{path: z}]\n")
    config = load_config(Config, [path])
    assert (config.train.steps, config.train.scheme, config.train.cap) == (6, "gm", 2)
    assert [source.path.name for source in config.sources] == ["z"]


def test_the_keys_of_a_file_win_over_those_it_extends_wherever_extends_stands():
    write("base.yaml", "train: {steps: 5}\nname: base\n")
    config = load("train: {steps: 7}\nextends: base.yaml\n")
    assert (config.train.steps, config.name) == (7, "base")


def test_extends_reaches_through_several_files_and_twice_to_the_same():
    write("root.yaml", "name: root\ntrain: {steps: 2}\n")
    write("left.yaml", "extends: root.yaml\ntrain: {steps: 3}\n")
    write("right.yaml", "extends: root.yaml\ntrain: {scheme: gm}\n")
    config = load("extends: [left.yaml, right.yaml]\n")
    assert (config.name, config.train.steps, config.train.scheme) == ("root", 2, "gm")


def test_files_merge_left_to_right_and_overrides_last():
    files = [write("1.yaml", "train: {steps: 1, scheme: gm}"), write("2.yaml", "train: {steps: 2}")]
    assert load_config(Config, files) == load("train: {steps: 2, scheme: gm}")
    config = load_config(Config, files, ["train.steps=3", "train.cap=4", "train.cap=null"])
    assert (config.train.steps, config.train.scheme, config.train.cap) == (3, "gm", None)


def test_null_removes_a_section_that_a_base_set():
    write("base.yaml", "data: {path: x}")
    assert load("extends: base.yaml\ndata: null").data is None
    assert load("extends: base.yaml", "data=").data is None


def test_an_override_may_hold_a_mapping_or_an_equals_sign():
    config = load("notes: {a: 1}", "notes={b: x=y}", "name=p=q", "sources=[{path: /z}]")
    assert (config.notes, config.name) == ({"a": 1, "b": "x=y"}, "p=q")
    assert config.sources[0].path == Path("/z")


# --- scalars -------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["1e-5", "1E-05", "1.0e-5", "+.00001", "0.00001", "10e-6"])
def test_floats_are_read_as_yaml_1_2_does(text):
    class Either(Section):
        value: float | str

    assert load(f"value: {text}", schema=Either).value == pytest.approx(1e-5)
    assert load(f"value: '{text}'", schema=Either).value == text


def test_strings_that_yaml_1_1_takes_for_something_else():
    notes = "notes: {a: no, b: 010x, c: 1:30, d: 2024-01-01, e: '5', f: 0x10, g: 1_000x}"
    assert load(notes).notes == {
        "a": "no", "b": "010x", "c": "1:30", "d": "2024-01-01", "e": "5", "f": "0x10", "g": "1_000x"
    }  # fmt: skip


# --- paths ---------------------------------------------------------------------------------------


def test_paths_start_from_the_file_that_set_them(folder):
    write("a/base.yaml", "data: {path: ../d/x}\nsources: [{path: y}, {path: /z}]")
    config = load_config(Config, [write("b/c.yaml", "extends: ../a/base.yaml\nname: n")])
    assert config.data is not None
    assert config.data.path == folder / "d/x"
    assert [source.path for source in config.sources] == [folder / "a/y", Path("/z")]


def test_paths_of_overrides_and_of_code_start_from_the_working_directory(folder):
    config = load_config(Config, [write("b/c.yaml", "data: {path: x}")], ["data.path=y"])
    assert config.data == Source(path=Path("y")) == Source(path=folder / "y")


def test_a_path_that_is_a_default_starts_from_the_working_directory(folder):
    class WithDefault(Section):
        path: ConfigPath = Path("x")

    assert load(schema=WithDefault).path == folder / "x"


def test_a_path_may_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = load("data: {path: ~/x}")
    assert config.data is not None
    assert config.data.path == Path("/home/someone/x")


def test_output_paths_are_left_alone():
    config = load_config(Config, [write("b/c.yaml", "output: runs/y\nname: n")])
    assert config.output == Path("runs/y")
    assert type(config.name) is str


# --- dumps ---------------------------------------------------------------------------------------

texts = st.text() | st.sampled_from(
    ["", "~", "no", "1e-5", "08", "1_0", "<<", ".5", "true", "\x85"]
)
floats = st.floats(allow_nan=False, allow_infinity=False)
paths = st.sampled_from([Path("x"), Path("../y"), Path("/z/1e5"), Path("a b/ü: #")])
shares = st.builds(Shares, copy_share=st.just(0.25), noise_share=st.just(0.75))
trains = st.builds(
    Train,
    learning_rate=st.floats(1e-300, 1e300),
    steps=st.integers(1, 1000),
    scheme=st.sampled_from(["am", "gm"]),
    cap=floats | st.none() | st.just("auto"),
    shares=shares,
)
configs = st.builds(
    Config,
    name=texts,
    train=trains,
    data=st.none() | st.builds(Source, path=paths),
    sources=st.lists(st.builds(Source, path=paths), max_size=2).map(tuple),
    notes=st.dictionaries(texts, texts | st.integers(), max_size=3),
    output=paths,
)


@given(configs)
def test_a_dump_reads_back_equal_from_anywhere(config):
    dump = write("elsewhere/config.yaml", dump_config(config))
    assert load_config(Config, [dump]) == config
    assert dump_config(load_config(Config, [dump])) == dump.read_text(encoding="utf-8")


@given(configs)
def test_other_yaml_readers_agree_on_a_dump(config):
    read = yaml.safe_load(dump_config(config))
    assert read["name"] == config.name
    assert math.isclose(read["train"]["learning_rate"], config.train.learning_rate, rel_tol=0)
    assert read["notes"] == config.notes


def test_a_dump_keeps_the_order_of_the_fields_and_names_absolute_paths(folder):
    dump = dump_config(load("data: {path: ü}\ntrain: {learning_rate: 1e-5}"))
    assert [line.split(":")[0] for line in dump.splitlines() if line[0].isalpha()] == [
        "name", "train", "data", "sources", "notes", "output"
    ]  # fmt: skip
    assert f"  path: {folder}/ü\n" in dump
    assert "  learning_rate: 1.0e-05\n" in dump


def test_the_json_schema_describes_a_file():
    schema = config_schema(Strict)
    assert schema["additionalProperties"] is False
    assert set(schema["properties"]) == {"extends", "train", "data"}
    assert schema["$defs"]["Train"]["properties"]["learning_rate"] == {
        "default": 0.001,
        "description": "Peak of the schedule.",
        "exclusiveMinimum": 0,
        "title": "Learning Rate",
        "type": "number",
    }
    assert schema["$defs"]["Source"]["properties"]["path"]["format"] == "path"
    assert "required" not in schema
    assert "required" not in schema["$defs"]["Source"]


# --- errors --------------------------------------------------------------------------------------

UNKNOWN = "unknown key; must be one of"
ALL = "name, train, data, sources, notes, output"
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
        ("notes: {a: [1]}", "c.yaml: notes.a=[1]: must be a valid string or a valid integer"),
        ("name: [1]", "c.yaml: name=[1]: must be a valid string"),
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
        ("name=[", "override name=[: must be YAML: expected the node content, but found '<stream end>'"),
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
