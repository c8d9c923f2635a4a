"""Stops, padding and sampling defaults of a base, through import, training and export."""

import json
import re
import shutil
from pathlib import Path

import pytest

from nrt_jax.checkpoints.export import export, import_checkpoint
from nrt_jax.checkpoints.open import open_model
from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.serving import ServingConfig
from nrt_jax.engine.make import trace_engine
from nrt_jax.errors import InputError
from nrt_jax.evaluation.held_out import make_answerer
from nrt_jax.serving.served_model import serve_model
from tests.data.templates import TEMPLATES
from tests.serving.runs import write_chat_model, write_run

transformers = pytest.importorskip("transformers")

END_OF_TEXT, EOT, WORD = 601, 602, 300
"""Two special tokens of the made tokenizer, the second its eos, and an ordinary one."""
GENERATION = {
    "_from_model_config": False,
    "bos_token_id": 600,
    "do_sample": True,
    "eos_token_id": [END_OF_TEXT, WORD],
    "pad_token_id": 604,
    "temperature": 0.6,
    "top_p": 0.9,
    "unknown": {"kept": [1, None]},
    "transformers_version": "4.45.0",
}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return write_chat_model(tmp_path_factory.mktemp("base") / "model", TEMPLATES["llama3"])


@pytest.fixture
def base(model, tmp_path):
    """A copy of the model with this generation_config.json (none for None), and ids in config."""

    def make(generation: object = GENERATION, **ids: object) -> Path:
        folder = Path(shutil.copytree(model, tmp_path / "base"))
        text = generation if isinstance(generation, str) else json.dumps(generation)
        (folder / "generation_config.json").write_text(text)
        if generation is None:
            (folder / "generation_config.json").unlink()
        config = json.loads((folder / "config.json").read_text()) | ids
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return make


def read(folder: Path, name: str = "generation_config.json") -> dict:
    return json.loads((folder / name).read_text())


def export_of_run(base: Path, folder: Path) -> Path:
    export(write_run(folder, "nrt", base), folder / "export", dtype=None, copy_rows=[])
    return folder / "export"


def imported(source: Path, out: Path) -> Path:
    import_checkpoint(source, out, MeshConfig(), None)
    return out


# --- a model that was trained --------------------------------------------------------------------


def test_a_training_keeps_what_the_base_had(base, tmp_path):
    out = export_of_run(base(), tmp_path)
    stops = [END_OF_TEXT, WORD, EOT]
    assert read(out) == GENERATION | {"eos_token_id": stops}
    config = read(out, "config.json")
    assert [config[f"{role}_token_id"] for role in ("bos", "eos", "pad")] == [600, stops, 604]
    theirs = transformers.GenerationConfig.from_pretrained(out)
    assert (theirs.eos_token_id, theirs.pad_token_id, theirs.top_p) == (stops, 604, 0.9)
    assert transformers.AutoConfig.from_pretrained(out).eos_token_id == stops
    # There and back once more, and another training.
    (tmp_path / "more").mkdir()
    assert read(export_of_run(imported(out, tmp_path / "in"), tmp_path / "more")) == read(out)


def test_the_engines_stop_where_the_export_does(base, tmp_path):
    opened = open_model(write_run(tmp_path, "nrt", base()))
    config, tokenizer = opened.config, opened.tokenizer
    stops = tokenizer.special_ids | {WORD}
    assert WORD not in tokenizer.special_ids
    answerer = make_answerer(config, opened.model, tokenizer)
    assert answerer.answer_engine.stop_ids == stops
    assert trace_engine(config, opened.model, tokenizer).stop_ids == stops
    served = serve_model(opened, ServingConfig())
    assert served.engine(1).stop_ids == stops
    assert served.trace_stop_ids == frozenset()


@pytest.mark.parametrize(
    ("generation", "ids", "expected"),
    [
        (None, {}, {"bos_token_id": 600, "eos_token_id": EOT}),
        (None, {"eos_token_id": [END_OF_TEXT, EOT]}, {"eos_token_id": [END_OF_TEXT, EOT]}),
        (None, {"eos_token_id": [WORD, -1, 9999]}, {"eos_token_id": [WORD, EOT]}),
        (
            None,
            {"eos_token_id": -1, "pad_token_id": -1},
            {"eos_token_id": EOT, "pad_token_id": None},
        ),
        ({}, {"pad_token_id": 603}, {"eos_token_id": EOT, "pad_token_id": 603}),
        ({"eos_token_id": EOT}, {"eos_token_id": WORD}, {"eos_token_id": EOT}),
        (
            {"eos_token_id": None, "pad_token_id": None, "top_k": None},
            {"eos_token_id": END_OF_TEXT, "pad_token_id": 603},
            {"eos_token_id": [END_OF_TEXT, EOT], "pad_token_id": 603, "top_k": None},
        ),
    ],
)
def test_ids_that_one_of_the_files_has(generation, ids, expected, base, tmp_path):
    """Null is written over no value, and the file of its own comes first."""
    out = export_of_run(base(generation, **ids), tmp_path)
    assert {key: read(out).get(key) for key in expected} == expected
    transformers.GenerationConfig.from_pretrained(out)


# --- import, export, import ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "ids"),
    [
        (GENERATION, {"eos_token_id": EOT, "pad_token_id": 605, "bos_token_id": None}),
        ({"temperature": 0.6}, {"eos_token_id": [EOT, 601], "bos_token_id": 600}),
        ({"eos_token_id": None, "pad_token_id": None}, {"eos_token_id": EOT, "pad_token_id": -1}),
    ],
)
def test_an_import_and_its_export_keep_all(generation, ids, base, tmp_path):
    source = base(generation, **ids)
    first = imported(source, tmp_path / "first")
    assert read(first) == generation
    export(first, tmp_path / "out", dtype=None, copy_rows=[])
    second = imported(tmp_path / "out", tmp_path / "second")
    for folder in (tmp_path / "out", second):
        assert read(folder) == generation
        config = read(folder, "config.json")
        for key, value in ids.items():
            # The other file may know what this one does not.
            assert config[key] == (generation.get(key) if value is None else value)


def test_named_templates_are_copied(base, tmp_path):
    source = base()
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    export(imported(source, tmp_path / "in"), tmp_path / "out", dtype=None, copy_rows=[])
    for folder in (tmp_path / "in", tmp_path / "out"):
        file = folder / "additional_chat_templates" / "tool_use.jinja"
        assert file.read_text() == "{{ messages }}"
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert set(theirs.chat_template) == {"default", "tool_use"}


# --- broken files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "is empty; copy or download it again"),
        ("{'a': 1}", "must be JSON"),
        ('{"eos_token_id": 1,}', "must be JSON"),
        ("[1]", "must be a JSON object"),
        ('{"eos_token_id": 1, "eos_token_id": 2}', "the key 'eos_token_id' occurs twice"),
        ({"eos_token_id": "2"}, "eos_token_id='2': must be a token id or a list of token ids;"),
        ({"eos_token_id": True}, "eos_token_id=True: must be a token id or a list"),
        ({"eos_token_id": 1.0}, "eos_token_id=1.0: must be a token id or a list"),
        ({"eos_token_id": []}, "eos_token_id=[]: must be a token id or a list"),
        ({"eos_token_id": [1, None]}, "eos_token_id=[1, None]: must be a token id or a list"),
        ({"eos_token_id": [[1]]}, "eos_token_id=[[1]]: must be a token id or a list"),
        ({"eos_token_id": -1}, "eos_token_id=-1: must be a token id or a list"),
        ({"eos_token_id": {"a": 1}}, "eos_token_id={'a': 1}: must be"),
        ({"eos_token_id": [1, 10**6]}, "[1, 1000000]: 1000000 is outside the vocabulary of 613 "),
        ({"pad_token_id": 2**70}, "is outside the vocabulary of 613 tokens; correct it, or"),
        ({"pad_token_id": [1]}, "pad_token_id=[1]: must be a token id; correct it"),
        ({"bos_token_id": False}, "bos_token_id=False: must be a token id"),
        ({"suppress_tokens": [1, -1]}, "suppress_tokens=[1, -1]: must be a list of token ids"),
        ({"forced_eos_token_id": 613}, "forced_eos_token_id=613: 613 is outside"),
        ({"temperature": "hot"}, "temperature='hot': must be a number"),
        ('{"top_p": NaN}', "top_p=nan: must be a number"),
        ({"top_k": 1.5}, "top_k=1.5: must be an integer"),
        ({"do_sample": "yes"}, "do_sample='yes': must be true or false"),
    ],
)
def test_a_broken_file_is_not_imported(content, said, base, tmp_path, words):
    source = base(content)
    status, _, error = words("import", source, tmp_path / "out")
    assert status == 2
    assert error.startswith(f"nrt-jax: error: {source / 'generation_config.json'}: ")
    assert said in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match=re.escape(said)):
        trace_engine(*engine_of(source))


def engine_of(source: Path) -> tuple:
    opened = open_model(source, ["method=nrt"])
    return opened.config, opened.model, opened.tokenizer


@pytest.mark.parametrize("value", ["2", True, [True], 1.5, {}])
def test_ids_of_config_json(value, base, tmp_path, words):
    source = base(None, eos_token_id=value)
    status, _, error = words("import", source, tmp_path / "out")
    assert status == 2
    assert f"config.json: eos_token_id={value!r}: must be a token id or a list of" in error
