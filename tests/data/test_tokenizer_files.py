"""Roles, added tokens and templates count wherever transformers looks for them."""

import json
import shutil
import subprocess
import sys

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data.chat_template import TODAY, render_template, template_text
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

transformers = pytest.importorskip("transformers")

LLAMA3_TOKENS = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
TEMPLATE = "{{ bos_token }}{{ messages[0].content }}"


@pytest.fixture
def directory(made_directory, tmp_path):
    return shutil.copytree(made_directory("llama3"), tmp_path / "tokenizer")


def edit(path, **values) -> dict:
    """Set values in a JSON file; None takes a key away."""
    content = json.loads(path.read_text()) if path.exists() else {}
    content = {k: v for k, v in (content | values).items() if v is not None}
    path.write_text(json.dumps(content))
    return content


def refusal(directory) -> str:
    with pytest.raises(InputError) as caught:
        Tokenizer.load(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("described", [True, False])
def test_roles_of_the_special_tokens_map_alone(directory, described):
    settings = directory / "tokenizer_config.json"
    edit(settings, bos_token=None, eos_token=None, added_tokens_decoder=None)
    names = LLAMA3_TOKENS | {"pad_token": "<|end_of_text|>"}
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    values = {k: {"content": v, **flags} if described else v for k, v in names.items()}
    edit(directory / "special_tokens_map.json", **values)
    loaded = Tokenizer.load(directory)
    assert loaded.token(loaded.bos_id) == names["bos_token"]
    assert loaded.token(loaded.eos_id) == names["eos_token"]
    assert loaded.fast.pad_token == names["pad_token"]
    assert loaded.vocab_size == len(transformers.AutoTokenizer.from_pretrained(directory))


@pytest.mark.parametrize("named", [True, False])
def test_a_reserved_token_that_a_model_names_is_not_taken(directory, named):
    """As models that see images name theirs."""
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(3)]
    names = {"image_token": reserved[0]}
    settings = {"extra_special_tokens": names, "additional_special_tokens": None}
    edit(directory / "tokenizer_config.json", **(names if named else settings))
    loaded = Tokenizer.load(directory)
    assert list(loaded.think.renamed) == reserved[1:]
    assert loaded.fast.image_token == reserved[0]
    assert loaded.vocab_size == len(transformers.AutoTokenizer.from_pretrained(directory))


def drop_last_token(directory) -> tuple[int, dict]:
    """Take the last added token out of tokenizer.json: its id and its description."""
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    last = content["added_tokens"].pop()
    content["model"]["vocab"].pop(last["content"], None)
    path.write_text(json.dumps(content))
    return last.pop("id"), last


@pytest.mark.parametrize("place", ["added_tokens_decoder", "added_tokens.json"])
def test_a_token_that_tokenizer_json_lacks(directory, place, tmp_path):
    last_id, last = drop_last_token(directory)
    settings = directory / "tokenizer_config.json"
    if place == "added_tokens.json":
        edit(settings, added_tokens_decoder=None)
        edit(directory / place, **{last["content"]: last_id})
    edit(settings, eos_token=last["content"])
    loaded = Tokenizer.load(directory)
    assert loaded.eos_id == last_id
    assert last_id in loaded.special_ids
    assert last_id not in loaded.encode(last["content"])
    loaded.copy_to(tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    assert theirs.eos_token_id == last_id


def test_a_token_that_would_get_another_id(directory):
    last_id, last = drop_last_token(directory)
    settings = directory / "tokenizer_config.json"
    described = json.loads(settings.read_text())["added_tokens_decoder"]
    described[str(last_id + 5)] = described.pop(str(last_id))
    edit(settings, added_tokens_decoder=described)
    assert refusal(directory) == (
        f"{settings}: added_tokens_decoder gives {last['content']!r} the id {last_id + 5}, and in "
        f"tokenizer.json it gets {last_id}; download both files again"
    )


@pytest.mark.parametrize(
    "place", ["chat_template.jinja", "string", "list", "folder", "folder beside", "json"]
)
def test_templates_wherever_they_are(directory, place):
    settings, folder = directory / "tokenizer_config.json", directory / "additional_chat_templates"
    other = {"name": "tool_use", "template": "other"}
    if place == "string":
        edit(settings, chat_template=TEMPLATE)
    elif place == "list":
        edit(settings, chat_template=[other, {"name": "default", "template": TEMPLATE}])
    elif place == "json":
        edit(directory / "chat_template.json", chat_template=TEMPLATE)
    if place.startswith("folder"):
        folder.mkdir()
        (folder / "tool_use.jinja").write_text("other")
    if place == "folder":
        (folder / "default.jinja").write_text(TEMPLATE)
    if place in ("chat_template.jinja", "folder beside"):
        (directory / "chat_template.jinja").write_text(TEMPLATE)
    config = DataConfig(source="chain_addition", template="tokenizer")
    assert template_text(config, Tokenizer.load(directory)) == TEMPLATE


@pytest.mark.parametrize("name", ["special_tokens_map.json", "added_tokens.json"])
def test_small_files_that_are_not_json(directory, name):
    (directory / name).write_text("{,")
    assert refusal(directory).startswith(f"{directory / name}: not JSON (")


@pytest.mark.parametrize("name", ["chat_template.jinja", "additional_chat_templates/t.jinja"])
def test_a_template_that_is_not_text(directory, name):
    (directory / name).parent.mkdir(exist_ok=True)
    (directory / name).write_bytes(b"\xff")
    assert refusal(directory).startswith(f"{directory / name}: not UTF-8 (")


def test_what_transformers_alone_refuses(directory):
    edit(directory / "tokenizer_config.json", padding_side="middle")
    text = refusal(directory)
    assert text.startswith(f"{directory}: transformers cannot read it (Padding side should be ")
    assert text.endswith("; download the tokenizer again")


def test_dates_are_those_of_strftime(made):
    def told(template: str) -> str:
        return render_template(template, [{"role": "user", "content": "1"}], made("llama3"))

    directives = [*"aAbBcdeHIjmMpSUwWxXyYzZ%", *("-" + letter for letter in "dHIjmMS")]
    asked = " ".join("%" + directive for directive in directives) + " %%d 100%"
    assert told(f"{{{{ strftime_now({asked!r}) }}}}") == TODAY.strftime(asked)
    # As Llama 3.2 asks; and nothing is left of what tells the date.
    asks = "{%- if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert told(asks) == "26 Jul 2024"
    for text in ("\n  a", "  {% if true %}a{% endif %}", "{#- c #}  a", "\n", "{{- 'a' }}\n"):
        theirs = made("llama3").fast.apply_chat_template(
            [{"role": "user", "content": "1"}], chat_template=text, tokenize=False
        )
        assert told(text) == theirs


LOADS = """
import sys
from pathlib import Path
sys.modules["torch"] = None
from nrt_jax.data.tokenizer import Tokenizer
print(Tokenizer.load(Path(sys.argv[1])).encode("1"))
"""


def test_torch_is_not_needed_and_not_advised(quickstart_directory, tokenizer):
    command = [sys.executable, "-c", LOADS, str(quickstart_directory)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == (f"{tokenizer.encode('1')}\n", "")


def test_transformers_is_imported_when_a_tokenizer_is_loaded():
    code = "import sys, nrt_jax.data.pipeline; print('transformers' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout == "False\n", result.stderr


# --- files that are not what their names say ------------------------------------------------------

NAMES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


@pytest.mark.parametrize("name", [*NAMES, "chat_template.jinja", "chat_template.json"])
def test_files_of_other_kinds(name, directory):
    path = directory / name
    for content, said in (
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        ('{"a": 1}'.encode("utf-16"), "is text in UTF-16"),
    ):
        path.write_bytes(content)
        assert refusal(directory).startswith(f"{path}: {said}")
    path.unlink()
    path.symlink_to("/nowhere/blob")
    said = f"{path}: is a symbolic link to /nowhere/blob, which does not exist; restore it; a token"
    assert refusal(directory).startswith(said)
    path.unlink()
    path.mkdir()
    assert refusal(directory).startswith(f"{path}: Is a directory; a tokenizer directory holds")


@pytest.mark.parametrize("name", [*NAMES, "chat_template.json"])
def test_a_key_twice(name, directory):
    path = directory / name
    content = path.read_text().strip() if path.exists() else "{}"
    path.write_text(
        content[:-1].rstrip(",") + (", " if len(content) > 2 else "") + '"x": {"y": 1, "y": 2}}'
    )
    assert "the key 'y' occurs twice in one object; keep one" in refusal(directory)


def test_a_vocabulary_with_an_entry_twice(directory):
    """The library takes the last id, and every text with the entry gets another one."""
    path = directory / "tokenizer.json"
    text = path.read_text()
    assert text.count('"vocab": {') == 1
    path.write_text(text.replace('"vocab": {', '"vocab": {"a": 5, ', 1))
    assert "the key 'a' occurs twice in one object" in refusal(directory)


def test_a_file_in_place_of_the_directory(directory):
    path = directory / "tokenizer.json"
    assert refusal(path).startswith(f"{path}: is a file, not a tokenizer directory; set data.tok")
