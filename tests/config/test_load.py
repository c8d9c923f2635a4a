"""The config machinery: merging, overrides, paths and dumps."""

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from nrt_jax.config.load import ConfigPath, Section, config_schema, dump_config, load_config
from tests.config.schema import (
    Config,
    Optional,
    Shares,
    Source,
    Strict,
    Train,
    load,
    write,
)

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


YAML_SYNTAX = [
    "[x]",
    "{x}",
    "a: b",
    "x: ",
    "*x",
    "&x",
    "!x",
    "# x",
    "a #b",
    "%x",
    "@x",
    "<<",
    "---",
]
YAML_SYNTAX += ["- x", "| x", "? x", "[", '"', '"a" b', " lead", "a\tb"]
YAML_VALUES = ["yes", "true", "null", "~", "5", "1e3", "é🙂"]


@pytest.mark.parametrize("text", [*YAML_SYNTAX, *YAML_VALUES])
def test_an_override_of_a_text_is_text_whatever_it_is_in_yaml(text):
    assert load("name: x", f"name={text}").name == text


def test_quotes_around_an_override_are_no_part_of_it():
    for text in ('"a: b"', "'a: b'"):
        assert load("", f"name={text}").name == "a: b"


def test_overrides_of_paths_choices_and_optional_texts(folder):
    config = load("", "data.path=[x]: #1", "output={y}", "train.scheme='gm'")
    assert config.data == Source(path=folder / "[x]: #1")
    assert (config.output, config.train.scheme) == (Path("{y}"), "gm")
    assert load_config(Optional, [], ["text=null"]).text is None
    assert load_config(Optional, [], ["text="]).text is None
    assert load_config(Optional, [], ["text=#x"]).text == "#x"
    assert load_config(Optional, [], ["text='null'"]).text == "null"


def test_overrides_of_lists_and_numbers_stay_yaml():
    config = load("", 'tags=[x, "[y]"]', "train.cap=1e3", "train.steps=3 # three")
    assert (config.tags, config.train.cap, config.train.steps) == (("x", "[y]"), 1000.0, 3)


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
        "name", "train", "data", "sources", "notes", "output", "tags"
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
