"""Reading tokenizer directories: ids as transformers gives them, control ids never from text."""

import json
import os
from random import Random

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models

from nrt_jax.data.task_tokenizers import SPECIAL_TOKENS
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from tests.data.made_tokenizers import KINDS, MULTILINGUAL, save


def write(directory, backend, **settings):
    """A tokenizer directory; eos_token is </s> unless told otherwise."""
    return save(backend, directory, **{"bos_token": "<s>", "eos_token": "</s>", **settings})


def characters(*, special=("<s>", "</s>", "<unk>", "<think>", "</think>"), plain=()):
    """A backend of single ASCII characters with the given added tokens."""
    vocabulary = {chr(code): i for i, code in enumerate(range(32, 127))}
    vocabulary["<unk>"] = len(vocabulary)
    backend = tokenizers.Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken(name, normalized=False) for name in special])
    backend.add_tokens([AddedToken(name, normalized=False) for name in plain])
    return backend


def message(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        Tokenizer.load(*arguments)
    return str(caught.value)


@pytest.mark.parametrize("text", MULTILINGUAL)
def test_mistral_ids_are_those_of_transformers(mistral, mistral_reference, text):
    ids = mistral.encode(text)
    assert ids == mistral_reference.encode(text, add_special_tokens=False)
    assert mistral.decode(ids) == mistral_reference.decode(ids)


RANDOM_PARTS = ("</s>", "<s>", "[INST]", "<|eot_id|>", "<|reserved_special_token_5|>", "<unk>")


def random_text(random: Random) -> str:
    """Characters of many scripts, spaces and names of special tokens."""
    ranges = ((32, 127), (0xA0, 0x2FFF), (0x4E00, 0x9FFF), (0x1F300, 0x1F6FF))
    parts = [chr(random.randrange(*random.choice(ranges))) for _ in range(random.randrange(24))]
    parts += random.choices((*RANDOM_PARTS, "  ", "\n", "\t", "▁"), k=random.randrange(4))
    random.shuffle(parts)
    return "".join(parts)


@pytest.mark.parametrize("kind", ["mistral", "llama"])
def test_random_texts_have_the_ids_of_split_special_tokens(kind, load):
    tokenizer, reference = load(kind)
    random = Random(0)
    texts = [random_text(random) for _ in range(2000)]
    options = {"add_special_tokens": False, "split_special_tokens": True}
    ids = tokenizer.encode_batch(texts)
    assert ids == reference(texts, **options)["input_ids"]
    assert not any(tokenizer.special_ids.intersection(text_ids) for text_ids in ids)
    assert [tokenizer.decode(text_ids) for text_ids in ids] == reference.batch_decode(ids)


def test_llama_attributes(llama):
    assert (llama.bos_id, llama.eos_id, llama.unk_id) == (128000, 128009, None)
    assert llama.new_ids == (llama.think_start_id, llama.think_end_id) == (128002, 128003)
    assert llama.vocab_size == 128256
    assert len(llama.special_ids) == 256


@pytest.mark.parametrize("text", MULTILINGUAL)
@pytest.mark.parametrize("kind", KINDS)
def test_made_ids_are_those_of_transformers(kind, text, made, made_reference):
    ids = made(kind).encode(text)
    assert ids == made_reference(kind).encode(text, add_special_tokens=False)
    assert made(kind).decode(ids) == made_reference(kind).decode(ids)


@settings(deadline=None)
@given(before=st.sampled_from(["</s>", "x</s>"]), text=st.text(max_size=12))
@pytest.mark.parametrize("kind", ["prepend", "first", "always"])
def test_text_after_a_control_token(kind, before, text, made, made_reference):
    """No space in front of it where the tokenizer puts one in front of a sequence alone."""
    text = text.replace("<", "")
    loaded = made(kind)
    ids = made_reference(kind).encode(before + text, add_special_tokens=False)
    end = ids.index(loaded.eos_id) + 1
    assert ids[end:] == loaded.encode_batch([text], starts=False)[0]


def test_find(tokenizer):
    assert tokenizer.find("1") == tokenizer.encode("1")[0]
    assert tokenizer.find("<|think_end|>") == tokenizer.think_end_id
    assert tokenizer.find("12") is None


def test_mistral_real_questions(mistral, mistral_reference, shared_data):
    lines = (shared_data / "gsm8k" / "train.jsonl").read_text().splitlines()[:200]
    rows = [json.loads(line) for line in lines]
    texts = [row[name] for row in rows for name in ("question", "answer")]
    reference = mistral_reference(texts, add_special_tokens=False)["input_ids"]
    assert mistral.encode_batch(texts) == reference


def test_mistral_attributes(mistral):
    assert (mistral.bos_id, mistral.eos_id, mistral.unk_id) == (1, 2, 0)
    assert (mistral.think_start_id, mistral.think_end_id) == (14, 15)
    assert mistral.token(14) == "[control_12]"
    assert mistral.vocab_size == 32768
    assert {0, 1, 2, 3, 14, 15} <= mistral.special_ids


@settings(deadline=None)
@given(
    text=st.lists(st.sampled_from([*SPECIAL_TOKENS, "1", "+", "<", "|>"]), max_size=12).map("".join)
)
def test_text_cannot_spell_a_control_id(tokenizer, text):
    ids = tokenizer.encode(text)
    assert not set(ids) & (tokenizer.special_ids - {tokenizer.unk_id})
    assert ids == tokenizer.encode_batch([text])[0]


def test_mistral_text_cannot_spell_a_control_id(mistral):
    for name in sorted(mistral.token(i) for i in mistral.special_ids):
        text = f"before {name} {name}{name}after"
        ids = mistral.encode(text)
        assert not set(ids) & mistral.special_ids
        assert mistral.decode(ids) == text


def test_plain_added_think_tokens_become_special(tmp_path):
    backend = characters(special=("<s>", "</s>", "<unk>"), plain=("<think>", "</think>", "<tool>"))
    loaded = Tokenizer.load(write(tmp_path / "t", backend), "<think>", "</think>")
    names = {loaded.token(i) for i in loaded.special_ids}
    assert names == {"<s>", "</s>", "<unk>", "<think>", "</think>"}
    assert loaded.decode(loaded.encode("a<think>b</think>")) == "a<think>b</think>"
    assert not set(loaded.encode("a<think>b</think>")) & loaded.special_ids
    ids = [*loaded.encode("a"), loaded.think_start_id, *loaded.encode("b")]
    assert loaded.decode(ids) == "a<think>b"
    assert loaded.decode(ids, skip_special=True) == "ab"


def test_plain_added_bos_and_eos_become_special(tmp_path):
    backend = characters(special=("<unk>", "<think>", "</think>"), plain=("<s>", "</s>"))
    loaded = Tokenizer.load(write(tmp_path / "t", backend), "<think>", "</think>")
    assert {loaded.bos_id, loaded.eos_id} <= loaded.special_ids
    assert not set(loaded.encode("<s>a</s>")) & loaded.special_ids


def test_a_file_without_added_tokens(tmp_path):
    directory = write(tmp_path / "t", characters(special=()), eos_token="<unk>", bos_token=None)
    path = directory / "tokenizer.json"
    content = json.loads(path.read_text())
    assert content.pop("added_tokens") == []
    path.write_text(json.dumps(content))
    loaded = Tokenizer.load(directory, "<think>", "</think>")
    assert loaded.special_ids == {loaded.eos_id, loaded.think_start_id, loaded.think_end_id}


def unigram():
    """Its vocabulary holds </s> as an ordinary piece, the way sentencepiece models do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<t>", 0.0), ("</t>", 0.0)]
    pieces += [(character, -5.0) for character in "abc<>/st"]
    backend = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    backend.add_special_tokens([AddedToken(name, normalized=False) for name, _ in pieces[:5]])
    return backend


def test_a_piece_that_spells_a_control_token_is_refused(tmp_path):
    directory = write(tmp_path / "t", unigram(), unk_token="<unk>")
    loaded = Tokenizer.load(directory, "<t>", "</t>")
    assert loaded.control_in(loaded.encode("abc?")) is None
    with pytest.raises(InputError) as caught:
        loaded.encode("a</s>b")
    assert str(caught.value) == "text 'a</s>b' spells the control token </s>; reword it"


def test_an_unknown_token_with_another_role_stays_a_control_token(tmp_path):
    backend = unigram()
    loaded = Tokenizer.load(write(tmp_path / "t", backend, unk_token="</s>"), "<t>", "</t>")
    assert loaded.unk_id is None
    with pytest.raises(InputError, match=r"spells the control token </s>"):
        loaded.encode("a</s>b")


def test_numpy_ids_decode(tokenizer):
    ids = np.array(tokenizer.encode("1+2"), np.int32)
    assert tokenizer.decode(ids) == "1+2"
    assert tokenizer.token(ids[0]) == "1"
    assert tokenizer.decode([tokenizer.bos_id, *ids], skip_special=True) == "1+2"
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == "<|bos|>1+2"


def test_no_truncation_and_no_padding(tmp_path):
    backend = characters()
    backend.enable_truncation(4)
    backend.enable_padding(length=8)
    loaded = Tokenizer.load(write(tmp_path / "t", backend), "<think>", "</think>")
    for text in ("ab", "a longer text"):
        assert loaded.decode(loaded.encode(text)) == text


def test_bos_may_be_missing_and_names_may_be_descriptions(tmp_path):
    eos = {"content": "</s>", "lstrip": False}
    directory = write(tmp_path / "t", characters(), bos_token=None, eos_token=eos)
    loaded = Tokenizer.load(directory, "<think>", "</think>")
    assert loaded.bos_id is None
    assert loaded.token(loaded.eos_id) == "</s>"


def test_unreadable_directories(tmp_path):
    needs = "a tokenizer directory holds tokenizer.json and tokenizer_config.json"
    missing = tmp_path / "missing"
    assert message(missing) == (
        f"{missing}: no such tokenizer directory; set data.tokenizer ({needs})"
    )
    directory = write(tmp_path / "t", characters())
    settings, vocabulary = directory / "tokenizer_config.json", directory / "tokenizer.json"
    vocabulary.unlink()
    assert message(directory) == f"{vocabulary}: No such file or directory; {needs}"
    vocabulary.write_text("{}")
    text = message(directory)
    assert text.startswith(f"{vocabulary}: not a tokenizer (")
    assert text.endswith("); download it again")
    settings.write_text("{,")
    text = message(directory)
    assert text.startswith(f"{settings}: not JSON (")
    assert text.endswith("); download the tokenizer again")
    settings.write_text("[]")
    assert message(directory) == f"{settings}: holds no JSON object; download the tokenizer again"
    settings.unlink()
    assert message(directory) == f"{settings}: No such file or directory; {needs}"


@pytest.mark.parametrize("eos", [None, "<end>"])
def test_eos_must_exist(tmp_path, eos):
    directory = write(tmp_path / "t", characters(), eos_token=eos)
    assert message(directory, "<think>", "</think>") == (
        f"{directory / 'tokenizer_config.json'}: eos_token is {eos!r}; "
        "name the token that ends a sequence, one that tokenizer.json has"
    )


@pytest.mark.parametrize("role", ["eos_token", "pad_token"])
def test_a_role_that_is_not_the_name_of_a_token(tmp_path, role):
    directory = write(tmp_path / "t", characters(), **{role: 2})
    assert message(directory, "<think>", "</think>") == (
        f"{directory / 'tokenizer_config.json'}: {role} is 2; write the name of a token"
    )


def test_copy_is_byte_equal_and_writable(tmp_path, tokenizer):
    source = tmp_path / "source"
    tokenizer.copy_to(source)
    (source / "chat_template.jinja").write_text("{{ messages }}")
    for file in source.iterdir():
        file.chmod(0o444)
    copy = tmp_path / "deep" / "copy"
    Tokenizer.load(source).copy_to(copy)
    assert sorted(os.listdir(copy)) == [
        "chat_template.jinja",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    for file in source.iterdir():
        assert (copy / file.name).read_bytes() == file.read_bytes()
        assert (copy / file.name).stat().st_mode & 0o200
    assert Tokenizer.load(copy).special_ids == tokenizer.special_ids
