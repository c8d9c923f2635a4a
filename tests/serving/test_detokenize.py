"""Tokens to text: the pieces join to the whole, and no piece ends inside a character."""

import itertools

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from nrt_jax.data.detokenizer import REPLACEMENT
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.requests import Event
from nrt_jax.serving.detokenize import Piece, Shown, TextWriter, prompt_offsets
from nrt_jax.serving.logprobs import TokenTexts, bytes_of, prompt_logprobs
from tests.data.made_tokenizers import KINDS, MULTILINGUAL, save, write_made_tokenizer


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request, tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(
        write_made_tokenizer(request.param, tmp_path_factory.mktemp("made") / request.param)
    )


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_made_tokenizer("llama3", tmp_path_factory.mktemp("bytes") / "t"))


def event(tokens: list[int], finished=None) -> Event:
    """Every token with a logprob of its own, and itself as the only alternative."""
    logprobs = -np.arange(1, len(tokens) + 1, dtype=np.float32)
    return Event(
        0,
        0,
        np.array(tokens, np.int32),
        logprobs,
        np.array(tokens, np.int32)[:, None],
        logprobs[:, None],
        finished,
    )


def pieces_of(text: list[int], cuts: list[int], writer: TextWriter, end="length") -> list[Piece]:
    """Feed the tokens in parts, until one of the pieces is the last."""
    bounds = sorted({0, *(cut % (len(text) + 1) for cut in cuts)})
    spans = [*itertools.pairwise(bounds), (bounds[-1], len(text))]
    pieces = []
    for begin, stop in spans:
        pieces.append(writer.write(event(text[begin:stop], end if stop == len(text) else None)))
        if pieces[-1].finish:
            return pieces
    return pieces


TEXT = st.text(alphabet="abü€ ", min_size=1, max_size=24)


@given(text=TEXT, stops=st.lists(st.text(alphabet="abü€ ", min_size=1, max_size=4), max_size=4))
def test_a_text_ends_before_the_first_stop_text(byte_level, text, stops):
    tokens = byte_level.encode(text)
    (whole,) = pieces_of(tokens, [], TextWriter(byte_level, Shown(tuple(stops))))
    # Tokens come one at a time: the text at hand is searched after each.
    ends = [byte_level.decode(tokens[: n + 1]) for n in range(len(tokens))]
    shown = [t.rstrip(REPLACEMENT) for t in ends]
    found = next((t for t in shown if any(stop in t for stop in stops)), None)
    expected = text if found is None else found[: min(found.find(s) for s in stops if s in found)]
    assert whole.text == expected
    assert whole.finish == ("length" if found is None else "stop")


@given(
    text=TEXT,
    stops=st.lists(st.text(alphabet="abü€ ", min_size=1, max_size=4), max_size=4),
    cuts=st.lists(st.integers(0, 100), max_size=5),
    end=st.sampled_from(["length", "stop"]),
)
def test_pieces_do_not_depend_on_how_tokens_come(byte_level, text, stops, cuts, end):
    tokens = byte_level.encode(text) + ([byte_level.eos_id] if end == "stop" else [])
    (whole,) = pieces_of(tokens, [], TextWriter(byte_level, Shown(tuple(stops))), end)
    parts = pieces_of(tokens, cuts, TextWriter(byte_level, Shown(tuple(stops))), end)
    assert "".join(part.text for part in parts) == whole.text
    joined = [(each.token, each.offset) for part in parts for each in part.logprobs]
    assert joined == [(each.token, each.offset) for each in whole.logprobs]
    assert sum(part.sampled for part in parts) == whole.sampled
    assert parts[-1].finish == whole.finish
    assert np.concatenate([part.tokens for part in parts]).tolist() == whole.tokens.tolist()


@pytest.mark.parametrize(
    ("stop", "text", "shown"),
    [("aab", "aab", ""), ("aab", "baaab", "ba"), ("abab", "aababa", "a"), ("aab", "aaa", "aaa")],
)
def test_a_stop_text_that_begins_like_itself(byte_level, stop, text, shown):
    """As much is held back as may begin the stop text: both letters of "aa", for "aab"."""
    tokens = [byte_level.find(letter) for letter in text]
    writer = TextWriter(byte_level, Shown((stop,)))
    pieces = pieces_of(tokens, list(range(len(tokens))), writer)
    assert "".join(piece.text for piece in pieces) == shown
    assert pieces[-1].finish == ("stop" if stop in text else "length")


def test_the_token_that_ended_a_sequence_is_scored_and_not_shown(byte_level):
    tokens = [*byte_level.encode("ab"), byte_level.eos_id]
    piece = TextWriter(byte_level).write(event(tokens, "stop"))
    assert (piece.text, piece.sampled, piece.finish) == ("ab", len(tokens), "stop")
    assert piece.tokens.tolist() == tokens[:-1]
    # Its logprob is, after the text: lm-evaluation-harness drops the last one of an echo.
    assert [each.token for each in piece.logprobs] == tokens
    assert piece.logprobs[-1].offset == 2


def test_offsets_continue_an_echo(byte_level):
    piece = TextWriter(byte_level, offset=10).write(event(byte_level.encode("a €"), "length"))
    assert piece.logprobs[0].offset == 10
    assert [each.offset for each in piece.logprobs] == sorted(
        each.offset for each in piece.logprobs
    )


def test_what_cannot_be_drawn_is_no_alternative(byte_level):
    tokens = byte_level.encode("a")
    top_ids = np.array([[tokens[0], 5]], np.int32)
    top = np.array([[-0.5, -np.inf]], np.float32)
    one = Event(
        0, 0, np.array(tokens, np.int32), np.array([-0.5], np.float32), top_ids, top, "length"
    )
    (only,) = TextWriter(byte_level).write(one).logprobs
    assert only.top == ((tokens[0], -0.5),)


def test_a_text_after_a_prompt_keeps_its_first_space(tokenizer):
    """Whole and in pieces, with offsets that point at what the tokens are."""
    prompt, tokens = tokenizer.encode("Die"), tokenizer.encode("a Straße a")
    whole = tokenizer.fast.decode(prompt + tokens)
    echo, _ = prompt_offsets(tokenizer, prompt, "Die")
    writer = TextWriter(tokenizer, offset=len(echo), prompt=prompt)
    pieces = pieces_of(tokens, list(range(len(tokens))), writer)
    assert echo + "".join(piece.text for piece in pieces) == whole
    texts = TokenTexts(tokenizer)
    for each in (logprob for piece in pieces for logprob in piece.logprobs):
        if not texts[each.token].startswith("bytes:"):
            assert whole[each.offset :].startswith(texts[each.token])


def test_a_character_that_the_prompt_begins(byte_level):
    """It is the text's if the tokens complete it, and an echo of ids does not show half of it."""
    euro = byte_level.encode("€")
    assert len(euro) > 1
    prompt, tokens = [*byte_level.encode("a"), *euro[:1]], [*euro[1:], *byte_level.encode("b")]
    (plain,) = pieces_of(tokens, [], TextWriter(byte_level, prompt=prompt))
    assert plain.text == "€b"
    (mended,) = pieces_of(tokens, [], TextWriter(byte_level, prompt=prompt, mends=True))
    assert mended.text == "€b"
    other = byte_level.encode("b")
    (plain,) = pieces_of(other, [], TextWriter(byte_level, prompt=prompt))
    assert plain.text == "b"
    (mended,) = pieces_of(other, [], TextWriter(byte_level, prompt=prompt, mends=True))
    assert mended.text == REPLACEMENT + "b"


def test_a_stop_text_that_begins_with_the_first_space(tokenizer):
    prompt, tokens = tokenizer.encode("Die"), tokenizer.encode("a Straße")
    text = tokenizer.fast.decode(prompt + tokens)[len("Die") :]
    writer = TextWriter(tokenizer, Shown((text[:2],)), prompt=prompt)
    assert pieces_of(tokens, list(range(len(tokens))), writer)[-1].finish == "stop"


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (Shown(("b",)), "a"),
        (Shown(("b",), keeps_stop=True), "ab"),
        (Shown(("bc",), min_tokens=1), "a"),
        (Shown(("b",), min_tokens=2), "abca"),
        (Shown(("b",), min_tokens=5), "abcab"),
        (Shown(("x",), skips_special=False), "abcab"),
        (Shown(("x",), keeps_stop=True), "abcab"),
        (Shown(("x",), keeps_stop=True, skips_special=False), "abcab<|eot_id|>"),
    ],
)
def test_what_is_shown_at_the_end(byte_level, shown, text):
    tokens = [byte_level.find(letter) for letter in "abcab"] + [byte_level.eos_id]
    (whole,) = pieces_of(tokens, [], TextWriter(byte_level, shown), "stop")
    pieces = pieces_of(tokens, list(range(len(tokens))), TextWriter(byte_level, shown), "stop")
    assert whole.text == "".join(piece.text for piece in pieces) == text
    assert whole.finish == pieces[-1].finish == "stop"
    offsets = [each.offset for piece in pieces for each in piece.logprobs]
    assert offsets == [each.offset for each in whole.logprobs]


def test_special_tokens_in_a_text(byte_level):
    """After ignore_eos they are in the middle."""
    tokens = [*byte_level.encode("a"), byte_level.eos_id, *byte_level.encode("b")]
    (hidden,) = pieces_of(tokens, [], TextWriter(byte_level))
    assert hidden.text == "ab"
    assert [each.offset for each in hidden.logprobs] == [0, 1, 1]
    (shown,) = pieces_of(tokens, [], TextWriter(byte_level, Shown(skips_special=False)))
    assert shown.text == "a<|eot_id|>b"
    assert [each.offset for each in shown.logprobs] == [0, 1, 1 + len("<|eot_id|>")]


def test_prompt_offsets(byte_level):
    text = "Die Straße 🙂"
    ids = byte_level.encode(text)
    shown, offsets = prompt_offsets(byte_level, [byte_level.bos_id, *ids])
    assert shown == text
    assert offsets[:2] == [0, 0]
    begun = [0]
    for n in range(1, len(ids)):
        # A character is begun with the first of its tokens, and the space in front of it too.
        before = byte_level.decode(ids[:n])
        begun.append(begun[-1] if before.endswith(REPLACEMENT) else len(before))
    assert offsets[1:] == begun
    inside, _ = prompt_offsets(byte_level, [*ids, byte_level.think_start_id])
    assert inside == text + "<|think_start|>"


def test_offsets_of_a_prompt_that_the_tokenizer_normalises(tmp_path):
    """They are places in the text that was sent, which is what an echo shows."""
    words = {word: i for i, word in enumerate(["[UNK]", "[S]", "a", "##b", "c", ".", *"defg"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(words, unk_token="[UNK]"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(["[UNK]", "[S]"])
    roles = {"bos_token": "[S]", "eos_token": "[S]", "unk_token": "[UNK]"}
    tokenizer = Tokenizer.load(save(backend, tmp_path / "t", **roles))
    text = "AB  C ."
    ids = [tokenizer.bos_id, *tokenizer.encode(text)]
    assert prompt_offsets(tokenizer, ids, text) == (text, [0, 0, 1, 4, 6])
    assert prompt_offsets(tokenizer, ids) == ("ab c.", [0, 0, 1, 2, 4])


def test_the_first_token_of_an_echo_has_the_text_that_begins_it(tokenizer):
    ids = [tokenizer.bos_id, *tokenizer.encode("Die Straße")]
    text, offsets = prompt_offsets(tokenizer, ids, "Die Straße")
    entries = prompt_logprobs(ids, offsets, None, tokenizer.bos_id)
    assert [entry.begins for entry in entries] == [False]
    texts = TokenTexts(tokenizer)
    assert text.startswith(texts.first(ids[1]))


# --- single tokens --------------------------------------------------------------------------------


@pytest.mark.parametrize("text", MULTILINGUAL)
def test_the_bytes_of_tokens_join_to_the_text(tokenizer, text):
    texts = TokenTexts(tokenizer)
    raw = b"".join(bytes(texts.in_bytes(token) or []) for token in tokenizer.encode(text))
    # Some tokenizers put a space in front of a text, and take U+2581 for one.
    assert raw.decode("utf-8") in (text, f" {text}".replace("▁", " "))


def test_bytes_have_the_names_that_tokenizers_give_them(byte_level):
    alphabet = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    for byte in range(0x80):
        ((name, _),) = alphabet.pre_tokenize_str(chr(byte))
        assert bytes_of(name) == bytes([byte])
    for text in ("é", "€", "🙂"):
        ((name, _),) = alphabet.pre_tokenize_str(text)
        assert bytes_of(name) == text.encode("utf-8")
    assert bytes_of("<0xE2>") == b"\xe2"
    assert bytes_of("▁") is None


def test_parts_of_characters_and_special_tokens(byte_level):
    texts = TokenTexts(byte_level)
    (first, *_) = byte_level.encode("\U0001f9ff\U0001f9ff"[:1])
    assert texts[byte_level.eos_id] == "<|eot_id|>"
    parts = [t for t in range(256) if texts[t].startswith("bytes:")]
    assert len(parts) == 128
    assert len({texts[t] for t in parts}) == 128
    assert texts.in_bytes(first) is not None
    assert texts[byte_level.vocab_size] == ""
