"""Think tokens that a tokenizer has, lends or gets, here and in the copy for transformers."""

import json
import os

import pytest

from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from tests.data.made_tokenizers import KINDS, MULTILINGUAL

transformers = pytest.importorskip("transformers")

TEMPLATE = "{{ bos_token }}{{ messages[0]['content'] }}"


def message(directory, *names) -> str:
    with pytest.raises(InputError) as caught:
        Tokenizer.load(directory, *names)
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(f"{directory}: ")
    return text.removeprefix(f"{directory}: ")


def check_copy(tokenizer: Tokenizer, copy) -> None:
    """AutoTokenizer reads the copy as we read the source."""
    theirs = transformers.AutoTokenizer.from_pretrained(copy)
    for think_id in (tokenizer.think_start_id, tokenizer.think_end_id):
        assert theirs.convert_ids_to_tokens(think_id) == tokenizer.token(think_id)
        assert think_id in theirs.all_special_ids
    assert len(theirs) == tokenizer.vocab_size
    for text in MULTILINGUAL:
        ids = tokenizer.encode(text)
        assert theirs.encode(text, add_special_tokens=False) == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    start, end = map(tokenizer.token, (tokenizer.think_start_id, tokenizer.think_end_id))
    ids = theirs.encode(f"1{start}2{end}3", add_special_tokens=False)
    assert [i for i in ids if i in tokenizer.special_ids] == [
        tokenizer.think_start_id,
        tokenizer.think_end_id,
    ]
    shown = theirs.decode(ids, skip_special_tokens=True)
    assert shown.replace(" ", "") == "123"
    assert shown == tokenizer.decode(ids, skip_special=True)
    reloaded = Tokenizer.load(copy, start, end)
    assert reloaded.new_ids == ()
    assert reloaded.special_ids == tokenizer.special_ids
    assert reloaded.vocab_size == tokenizer.vocab_size


def test_reserved_tokens_are_taken_in_order(made_directory, made, tmp_path):
    source, tokenizer = made_directory("llama3"), made("llama3")
    before = transformers.AutoTokenizer.from_pretrained(source)
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(3)]
    first, second, third = before.convert_tokens_to_ids(reserved)
    assert (tokenizer.think_start_id, tokenizer.think_end_id) == (first, second)
    assert tokenizer.new_ids == (first, second)
    assert tokenizer.vocab_size == len(before)
    assert tokenizer.decode([first, second, third]) == (
        "<|think_start|><|think_end|><|reserved_special_token_2|>"
    )
    assert tokenizer.find(reserved[0]) is None
    # The old name is text again.
    assert not set(tokenizer.encode(reserved[0])) & tokenizer.special_ids

    tokenizer.copy_to(tmp_path, TEMPLATE)
    check_copy(tokenizer, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (tmp_path / name).read_text()
        assert reserved[0] not in text
        assert reserved[1] not in text
        assert reserved[2] in text


def test_a_reserved_token_that_has_a_part_is_not_taken(made_directory, tmp_path):
    source = made_directory("llama3")
    settings = json.loads((source / "tokenizer_config.json").read_text())
    copy = tmp_path / "copy"
    Tokenizer.load(source).copy_to(copy)
    (copy / "tokenizer.json").write_bytes((source / "tokenizer.json").read_bytes())
    settings["pad_token"] = "<|reserved_special_token_0|>"
    (copy / "tokenizer_config.json").write_text(json.dumps(settings))
    loaded = Tokenizer.load(copy, "<|reserved_special_token_1|>", "</think>")
    assert loaded.think.renamed == {"<|reserved_special_token_2|>": "</think>"}
    assert loaded.new_ids == (loaded.think_end_id,)
    assert loaded.token(loaded.think_start_id) == "<|reserved_special_token_1|>"


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "llama3"])
def test_appended_tokens(kind, made_directory, made, tmp_path):
    tokenizer = made(kind)
    before = len(transformers.AutoTokenizer.from_pretrained(made_directory(kind)))
    assert tokenizer.new_ids == (before, before + 1)
    assert tokenizer.new_ids == (tokenizer.think_start_id, tokenizer.think_end_id)
    assert set(tokenizer.new_ids) <= tokenizer.special_ids
    assert tokenizer.vocab_size == before + 2
    tokenizer.copy_to(tmp_path)
    check_copy(tokenizer, tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]
    assert transformers.AutoTokenizer.from_pretrained(tmp_path).pad_token is None


def test_mistral_tokens_found_and_appended(mistral_directory, mistral, tmp_path):
    assert mistral.new_ids == ()
    mistral.copy_to(tmp_path / "found")
    folders = tmp_path / "found", mistral_directory
    copied, source = (folder / "tokenizer.json" for folder in folders)
    assert copied.read_bytes() == source.read_bytes()
    copied, source = (
        json.loads((folder / "tokenizer_config.json").read_text()) for folder in folders
    )
    # The two names of the class that takes tokenizer.json as it is.
    assert copied.pop("tokenizer_class") == "TokenizersBackend"
    assert source.pop("tokenizer_class") == "PreTrainedTokenizerFast"
    assert copied == source
    check_copy(mistral, tmp_path / "found")
    appended = Tokenizer.load(mistral_directory)
    assert appended.new_ids == (32768, 32769)
    appended.copy_to(tmp_path / "appended", TEMPLATE)
    check_copy(appended, tmp_path / "appended")


def test_llama_reserved_tokens_are_taken(llama, tmp_path):
    assert llama.think.renamed == {
        "<|reserved_special_token_0|>": "<|think_start|>",
        "<|reserved_special_token_1|>": "<|think_end|>",
    }
    llama.copy_to(tmp_path)
    check_copy(llama, tmp_path)


def test_one_found_and_one_appended(made_directory):
    loaded = Tokenizer.load(made_directory("first"), "[INST]", "[THINK_END]")
    assert loaded.think_start_id == 3
    assert loaded.new_ids == (loaded.vocab_size - 1,) == (loaded.think_end_id,)


@pytest.mark.parametrize("extra", ["list", "dict", "descriptions", "old list"])
def test_the_copy_lists_the_tokens_where_the_source_lists_its_own(extra, made_directory, tmp_path):
    Tokenizer.load(made_directory("prepend"), "[INST]", "[/INST]").copy_to(tmp_path / "source")
    path = tmp_path / "source" / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    described = {"content": "[INST]", "lstrip": False, "__type": "AddedToken"}
    settings |= {
        "list": {"extra_special_tokens": ["[INST]"]},
        "dict": {"extra_special_tokens": {"inst_token": "[INST]"}},
        "descriptions": {"additional_special_tokens": [described]},
        "old list": {"additional_special_tokens": ["[INST]"]},
    }[extra]
    path.write_text(json.dumps(settings))
    (tmp_path / "source" / "special_tokens_map.json").write_text('{"bos_token": "<s>"}')
    tokenizer = Tokenizer.load(tmp_path / "source")
    tokenizer.copy_to(tmp_path / "copy")
    check_copy(tokenizer, tmp_path / "copy")


def test_a_think_token_that_strips_spaces_or_is_not_special_is_mended(made_directory, tmp_path):
    source = tmp_path / "source"
    Tokenizer.load(made_directory("prepend")).copy_to(source)
    path = source / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"][-1] |= {"special": False, "lstrip": True}
    path.write_text(json.dumps(data))
    tokenizer = Tokenizer.load(source)
    tokenizer.copy_to(tmp_path / "copy")
    check_copy(tokenizer, tmp_path / "copy")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    ids = theirs.encode("1 <|think_end|>", add_special_tokens=False)
    assert ids == [*tokenizer.encode("1 "), tokenizer.think_end_id]


def test_a_class_that_rebuilds_the_tokenizer_is_not_exported(made_directory, tmp_path):
    source = tmp_path / "source"
    Tokenizer.load(made_directory("prepend")).copy_to(source)
    path = source / "tokenizer_config.json"
    settings = json.loads(path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    path.write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(source)
    tokenizer.copy_to(tmp_path / "copy")
    check_copy(tokenizer, tmp_path / "copy")
    # LlamaTokenizer puts no space after a control token, whatever tokenizer.json says.
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "copy")
    ids = theirs.encode("</s>words", add_special_tokens=False)
    assert ids == [tokenizer.eos_id, *tokenizer.encode_batch(["words"], starts=False)[0]]


def test_the_copy_has_one_chat_template(made_directory, tmp_path):
    source, copy = tmp_path / "source", tmp_path / "copy"
    Tokenizer.load(made_directory("llama3")).copy_to(source)
    path = source / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": "old"}))
    (source / "chat_template.jinja").write_text("older")
    (source / "chat_template.json").write_text('{"chat_template": "oldest"}')
    tokenizer = Tokenizer.load(source)
    tokenizer.copy_to(copy)
    files = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(os.listdir(copy)) == files
    assert transformers.AutoTokenizer.from_pretrained(copy).chat_template == "older"
    tokenizer.copy_to(copy, TEMPLATE)
    assert sorted(os.listdir(copy)) == files
    assert "chat_template" not in json.loads((copy / "tokenizer_config.json").read_text())
    assert transformers.AutoTokenizer.from_pretrained(copy).chat_template == TEMPLATE


def test_names_that_cannot_be_think_tokens(made_directory):
    directory = made_directory("prepend")
    assert message(directory, "<t>", "</s>") == (
        "data.think_end='</s>' is the eos_token of this tokenizer; "
        "choose a name that has no other role"
    )
    assert message(directory, " ", "<t>") == (
        "data.think_start=' ' is empty; give the token a name such as <|think_start|>"
    )
    ordinary = Tokenizer.load(directory).find("▁▁")
    assert message(directory, "▁▁", "<t>") == (
        "data.think_start='▁▁' is an ordinary entry of this tokenizer's vocabulary "
        f"(id {ordinary}), which text can spell; choose a name that it does not have, "
        "such as <|think_start|>"
    )
    with pytest.raises(InputError) as caught:
        Tokenizer.load(directory, "<t>", "<t>")
    assert str(caught.value) == "data.think_end='<t>' is data.think_start too; they must differ"


def test_a_vocabulary_with_gaps_gets_no_token(made_directory, tmp_path):
    Tokenizer.load(made_directory("prepend"), "[INST]", "[/INST]").copy_to(tmp_path)
    path = tmp_path / "tokenizer.json"
    data = json.loads(path.read_text())
    data["model"]["vocab"]["一二三"] = 5000
    path.write_text(json.dumps(data))
    assert Tokenizer.load(tmp_path, "[INST]", "[/INST]").vocab_size == 5001
    with pytest.raises(InputError) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value) == (
        f"{path}: has gaps in its ids, so '<|think_start|>' cannot be added to it; set "
        "data.think_start and data.think_end to special tokens that it has"
    )
