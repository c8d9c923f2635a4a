"""The tokenizers of the built-in tasks in our reader and in transformers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nrt_jax.config.presets import DIRECTORY
from nrt_jax.data.hard_tokens import words
from nrt_jax.data.task_tokenizers import (
    CHARACTERS,
    SPECIAL_TOKENS,
    write_hard_tokens_tokenizer,
    write_quickstart_tokenizer,
)
from nrt_jax.data.tokenizer import Tokenizer

TEXTS = st.text(alphabet=CHARACTERS, max_size=40)


@pytest.fixture(scope="module")
def auto_tokenizer(quickstart_directory):
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(quickstart_directory)


@settings(deadline=None)
@given(text=TEXTS)
def test_one_token_a_character_and_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert [tokenizer.token(i) for i in ids] == list(text)
    assert tokenizer.decode(ids) == text


@settings(deadline=None)
@given(text=TEXTS)
def test_transformers_agrees(tokenizer, auto_tokenizer, text):
    ids = auto_tokenizer.encode(text, add_special_tokens=False)
    assert ids == tokenizer.encode(text)
    assert auto_tokenizer.decode(ids) == text
    assert auto_tokenizer.encode(text) == [tokenizer.bos_id, *ids]


def test_transformers_knows_the_special_tokens(tokenizer, auto_tokenizer):
    assert auto_tokenizer.bos_token_id == tokenizer.bos_id
    assert auto_tokenizer.eos_token_id == tokenizer.eos_id
    assert auto_tokenizer.pad_token == "<|pad|>"
    assert auto_tokenizer.unk_token_id == tokenizer.unk_id
    assert set(auto_tokenizer.all_special_ids) == tokenizer.special_ids
    text = "1+2<|think_start|>3<|think_end|>=3<|eos|>"
    ids = auto_tokenizer.encode(text, add_special_tokens=False)
    think_start, think_end = tokenizer.think_start_id, tokenizer.think_end_id
    assert ids[3] == think_start
    assert ids[5] == think_end
    assert ids[-1] == tokenizer.eos_id
    assert auto_tokenizer.decode(ids) == tokenizer.decode(ids) == text
    assert auto_tokenizer.decode(ids, skip_special_tokens=True) == "1+23=3"


def test_ids_are_dense(tokenizer):
    assert tokenizer.vocab_size == len(SPECIAL_TOKENS) + len(CHARACTERS)
    assert len({tokenizer.token(i) for i in range(tokenizer.vocab_size)}) == tokenizer.vocab_size


def test_other_characters_are_unknown(tokenizer):
    assert tokenizer.encode("1aé🙂2") == [
        *tokenizer.encode("1"),
        *[tokenizer.unk_id] * 3,
        *tokenizer.encode("2"),
    ]


@pytest.fixture(scope="module")
def hard_tokenizers(tmp_path_factory):
    transformers = pytest.importorskip("transformers")
    directory = tmp_path_factory.mktemp("words")
    write_hard_tokens_tokenizer(directory)
    return Tokenizer.load(directory), transformers.AutoTokenizer.from_pretrained(directory)


@settings(deadline=None, max_examples=20)
@given(chosen=st.lists(st.sampled_from(words()), min_size=1, max_size=40))
def test_one_token_a_word_and_back(hard_tokenizers, chosen):
    tokenizer, auto = hard_tokenizers
    text = " ".join(chosen)
    ids = tokenizer.encode(text)
    assert [tokenizer.token(i) for i in ids] == chosen
    assert tokenizer.decode(ids) == text
    assert auto.encode(text) == [tokenizer.bos_id, *ids]
    assert auto.decode(ids) == text


def test_other_words_are_unknown(hard_tokenizers):
    tokenizer, _ = hard_tokenizers
    assert tokenizer.encode("rain snow 3")[1] == tokenizer.unk_id
    assert tokenizer.vocab_size == len(SPECIAL_TOKENS) + len(words())


@pytest.mark.parametrize(
    ("write", "task"),
    [(write_quickstart_tokenizer, "quickstart"), (write_hard_tokens_tokenizer, "hard_tokens")],
)
def test_the_shipped_models_have_these_tokenizers(write, task, tmp_path):
    write(tmp_path)
    shipped = DIRECTORY / task / "base_model" / "tokenizer.json"
    assert (tmp_path / "tokenizer.json").read_text() == shipped.read_text()
