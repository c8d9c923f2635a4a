"""Tokens after a prompt decode as transformers decodes prompt and tokens together."""

from pathlib import Path

import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from nrt_jax.data.detokenizer import (
    BYTE_NAME,
    LONGEST_RUN,
    REPLACEMENT,
    Detokenizer,
    decode_after,
)
from nrt_jax.data.tokenizer import Tokenizer
from tests.data.made_tokenizers import KINDS, MULTILINGUAL, save, write_made_tokenizer

WORDS = ["hello", "world", "a", "b", "##s", "##ing", "##.", "##'", ".", ",", "?", "!"]
WORDS += ["don", "it", "'", "s", "m", "ve", "re", "n", "t", "n't", "'s"]


def write_word_pieces(directory: Path, *, cleans: bool) -> Path:
    """A tokenizer whose words get spaces when they are decoded."""
    vocabulary = {word: i for i, word in enumerate(["[UNK]", "[CLS]", "[SEP]", *WORDS])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece("##", cleanup=False)
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return save(
        backend,
        directory,
        bos_token="[CLS]",
        eos_token="[SEP]",
        unk_token="[UNK]",
        clean_up_tokenization_spaces=cleans,
    )


def write_metaspace(directory: Path) -> Path:
    """A tokenizer whose decoder drops every space of the first token."""
    path = write_made_tokenizer("always", directory)
    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    backend.save(str(path / "tokenizer.json"))
    return path


@pytest.fixture(
    scope="module",
    params=[*KINDS, "metaspace", "words", "cleaned words", "llama", "mistral"],
)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    kind, directory = request.param, tmp_path_factory.mktemp("made") / "tokenizer"
    if kind in ("llama", "mistral"):
        return request.getfixturevalue(kind)
    if kind == "metaspace":
        return Tokenizer.load(write_metaspace(directory))
    if "words" in kind:
        return Tokenizer.load(write_word_pieces(directory, cleans=kind == "cleaned words"))
    return Tokenizer.load(write_made_tokenizer(kind, directory))


@pytest.fixture(scope="module")
def drawn(tokenizer):
    """Any tokens, bytes and parts of characters more often than a model draws them."""
    size = tokenizer.vocab_size
    byte_ids = [i for i in range(size) if BYTE_NAME.fullmatch(tokenizer.token(i))]
    parts = [i for text in "🙂€ü'. " for i in tokenizer.encode(text)]
    some = st.sampled_from([*byte_ids, *parts])
    return st.lists(st.integers(0, size - 1) | some, max_size=12)


# The fixtures are the same for every example.
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_tokens_after_any_prompt(tokenizer, drawn, data):
    prompt, tokens = data.draw(drawn), data.draw(drawn)
    detokenizer = Detokenizer(tokenizer, prompt)
    pieces = [detokenizer.feed(token) for token in tokens]
    assert not any(piece.endswith(REPLACEMENT) for piece in pieces)
    text = "".join(pieces) + detokenizer.flush()
    before, whole = tokenizer.fast.decode(prompt), tokenizer.fast.decode(prompt + tokens)
    if whole.startswith(before):
        assert text == whole[len(before) :]
    else:
        # The prompt ends inside of a character that the tokens complete, or before a space that
        # transformers removes.
        common = whole.removesuffix(text)
        assert common + text == whole
        assert before.startswith(common)
        assert not before.startswith(common + text[:1])
    assert text == decode_after(tokenizer, prompt, tokens)


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_token_begins_somewhere(tokenizer, drawn, data):
    """In order, and an ordinary token where its own text stands."""
    prompt, tokens = data.draw(drawn), data.draw(drawn)
    hidden = tokenizer.special_ids
    detokenizer, text, starts = Detokenizer(tokenizer, prompt, hidden=hidden), "", []
    for token in tokens:
        settled = detokenizer.settle(token)
        starts += [len(text) + start for start in settled.starts]
        text += settled.text
    settled = detokenizer.settle_rest()
    starts += [len(text) + start for start in settled.starts]
    text += settled.text
    assert len(starts) == len(tokens)
    assert starts == sorted(starts)
    shown = [token for token in tokens if token not in hidden]
    assert text == decode_after(tokenizer, prompt, shown)


@pytest.mark.parametrize("text", MULTILINGUAL)
def test_pieces_of_a_text_are_whole_characters(tokenizer, text):
    tokens = tokenizer.encode(text)
    detokenizer = Detokenizer(tokenizer)
    pieces = [detokenizer.feed(token) for token in tokens]
    assert not any(REPLACEMENT in piece for piece in pieces)
    assert "".join(pieces) + detokenizer.flush() == tokenizer.fast.decode(tokens)


def test_a_sentencepiece_answer_keeps_its_space(tmp_path):
    tokenizer = Tokenizer.load(write_made_tokenizer("always", tmp_path / "t"))
    prompt, tokens = tokenizer.encode("Answer:"), tokenizer.encode("two")
    assert decode_after(tokenizer, prompt, tokens) == " two"
    assert decode_after(tokenizer, [], tokens) == "two"


@pytest.mark.parametrize(
    ("kind", "names", "text", "starts"),
    [
        ("always", ["<0xC3>", "<0xBC>", "<0xE2>", "<0x82>", "<0xAC>"], "ü€", (0, 0, 1, 1, 1)),
        # One invalid byte makes all of a run invalid.
        ("always", ["<0xC3>", "<0xBC>", "<0xFF>"], "\ufffd" * 3, (0, 1, 1)),
        ("llama3", ["Ã", "¼", "â", "Ĥ", "¬"], "ü€", (0, 0, 0, 0, 0)),
        ("llama3", ["ÿ", "ÿ", "a"], "\ufffd\ufffda", (0, 1, 2)),
    ],
)
def test_where_tokens_begin_that_are_settled_together(tmp_path, kind, names, text, starts):
    tokenizer = Tokenizer.load(write_made_tokenizer(kind, tmp_path / "t"))
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
    settled = [detokenizer.settle(tokenizer.find(name)) for name in names]
    last = [each for each in [*settled, detokenizer.settle_rest()] if each.text]
    assert "".join(each.text for each in last) == text
    assert tuple(start for each in last for start in each.starts)[: len(starts)] == starts


def test_text_comes_as_soon_as_it_is_certain(tmp_path):
    tokenizer = Tokenizer.load(write_made_tokenizer("always", tmp_path / "t"))
    names = [tokenizer.token(i) for i in range(tokenizer.vocab_size)]
    word = next(name for name in names if name[:1] == "▁" and name[1:].isalpha())
    detokenizer, shown = Detokenizer(tokenizer, tokenizer.encode("a")), word.replace("▁", " ")
    tokens = [names.index(name) for name in (word, "<0xC3>", "<0xBC>", word)]
    assert [detokenizer.feed(token) for token in tokens] == [shown, "", "", "ü" + shown]


def test_a_script_of_bytes_alone_is_not_held_back_to_its_end(tmp_path):
    tokenizer = Tokenizer.load(write_made_tokenizer("always", tmp_path / "t"))
    text = "ខ្ញុំរៀនភាសាខ្មែរ" * 10
    tokens = [tokenizer.find(f"<0x{byte:02X}>") for byte in text.encode()]
    detokenizer = Detokenizer(tokenizer, tokenizer.encode("a"))
    pieces = [detokenizer.feed(token) for token in tokens]
    assert "".join(pieces) + detokenizer.flush() == text
    assert sum(bool(piece) for piece in pieces) >= len(tokens) // LONGEST_RUN


def test_a_long_prompt_costs_little(tmp_path):
    """Only its last tokens are decoded again."""
    tokenizer = Tokenizer.load(write_made_tokenizer("llama3", tmp_path / "t"))
    prompt = tokenizer.encode("Die Straße " * 200)
    assert len(Detokenizer(tokenizer, prompt)._context) < 4
