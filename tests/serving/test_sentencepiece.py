"""A model whose decoder drops the first space of a text: answers have it all the same."""

from collections.abc import Iterator

import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.data.detokenizer import REPLACEMENT
from nrt_jax.serving.server import make_server
from tests.serving.conftest import SETTINGS
from tests.serving.live import Live, listening
from tests.serving.models import TRACE, Reference, make_served

PROMPTS = ["Die", "Natalia sold", "数学的な", ""]


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    return make_served(tmp_path_factory.mktemp("pieces"), "nrt", "always")


@pytest.fixture(scope="module")
def written(pieces) -> Reference:
    return Reference(pieces)


@pytest.fixture(scope="module")
def live(pieces) -> Iterator[Live]:
    with listening(make_server(pieces, ServingConfig(**SETTINGS))) as server:
        yield server


def after(pieces, prompt: list[int], tokens: list[int]) -> str:
    """What transformers decodes of both without what it decodes of the prompt."""
    fast = pieces.tokenizer.fast
    return fast.decode([*prompt, *tokens]).removeprefix(fast.decode(prompt))


def drawn(pieces, written, prompt: list[int], **options) -> tuple[list[int], int]:
    """The first seed whose text begins with a space, and its tokens before."""
    for seed in range(300):
        ((tokens, _),) = written.tokens(prompt, 12, seed=seed, **options)
        if tokens and pieces.token_texts[tokens[0]][:1] == " ":
            return tokens, seed
    raise AssertionError("no text begins with a space")


@pytest.mark.parametrize("text", PROMPTS)
def test_answers_echoes_streams_and_offsets(live, pieces, written, text):
    prompt = pieces.text_prompt(text).tolist()
    tokens, seed = drawn(pieces, written, prompt, temperature=1.0)
    fields = {"temperature": 1, "seed": seed, "max_tokens": 12, "logprobs": 0}
    expected = after(pieces, prompt, tokens)
    assert expected.startswith(" ")
    (plain,) = live.complete(text, **fields).json["choices"]
    assert plain["text"] == expected
    (echoed,) = live.complete(text, echo=True, **fields).json["choices"]
    assert echoed["text"] == text + expected
    chunks = live.complete(text, echo=True, stream=True, **fields).chunks
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == text + expected
    scores = echoed["logprobs"]
    pairs = zip(scores["tokens"], scores["text_offset"], strict=True)
    for token, offset in list(pairs)[1 : len(prompt) + len(tokens)]:
        at = echoed["text"][offset:]
        # A byte that is part of no character shows as a replacement.
        assert at.startswith((token, REPLACEMENT)) or "bytes:" in token


def test_chats_and_stop_texts(live, pieces, written):
    turns = [{"role": "user", "content": "Die"}]
    opened = [*pieces.chat_prompt(turns).tolist(), pieces.tokenizer.think_start_id]
    ((trace, _),) = written.tokens(opened, TRACE)
    (choice,) = live.chat("Die", max_tokens=TRACE + 4).json["choices"]
    assert choice["message"]["reasoning_content"] == after(pieces, opened, trace)
    prompt = pieces.text_prompt("Die").tolist()
    tokens, seed = drawn(pieces, written, prompt, temperature=1.0)
    stop = after(pieces, prompt, tokens)[:2]
    fields = {"temperature": 1, "seed": seed, "max_tokens": 12, "stop": stop}
    (choice,) = live.complete("Die", **fields).json["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
