"""Conversations: what this server answered, and what clients send beside the text."""

import openai
import pytest

from nrt_jax.serving.conversation import read_turns
from nrt_jax.serving.protocol import ApiError
from tests.serving.models import TRACE

USER = {"role": "user", "content": "Natalia sold clips to 48"}
AGAIN = {"role": "user", "content": "why?"}


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ["user", "assistant"] * len(contents)
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize(
    ("own", "content"),
    [
        ({"content": ""}, ""),
        ({"content": None}, ""),
        ({}, ""),
        ({"content": None, "reasoning_content": "z"}, ""),
        ({"content": "two", "reasoning": "z", "refusal": None, "tool_calls": []}, "two"),
        ({"content": "two", "function_call": None, "audio": None, "annotations": []}, "two"),
        ({"content": "two", "name": "tiny"}, "two"),
        ({"content": []}, ""),
        ({"content": ["a", {"type": "text", "text": "b"}]}, "ab"),
        ({"content": [{"type": "output_text", "text": "b", "annotations": []}]}, "b"),
    ],
)
def test_replies_as_history(live, own, content):
    messages = [USER, {"role": "assistant", **own}, AGAIN]
    expected = turns(USER["content"], content, AGAIN["content"])
    assert read_turns(messages) == expected
    answer = live.chat(messages)
    assert answer.status == 200, answer.text
    assert answer.json["choices"] == live.chat(expected).json["choices"]


@pytest.mark.parametrize("max_tokens", [TRACE, TRACE + 3])
def test_the_client_sends_back_what_it_got(live, max_tokens):
    """Also an answer that is empty because the trace used up the tokens."""
    with openai.OpenAI(base_url=live.url, api_key="none", max_retries=0) as client:
        fields = {"model": "tiny", "temperature": 0, "max_tokens": max_tokens}
        reply = client.chat.completions.create(messages=[USER], **fields).choices[0].message
        assert (reply.content == "") == (max_tokens == TRACE)
        for own in (reply, reply.model_dump(), reply.model_dump(exclude_none=True)):
            history = [USER, own, AGAIN]
            again = client.chat.completions.create(messages=history, **fields)
            assert again.choices[0].message.role == "assistant"


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": ""}, USER],
        [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, USER],
        [USER, USER],
        [USER, {"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}],
        [{"role": "assistant", "content": "a"}, USER],
        [{"role": "assistant", "content": "a"}],
        [USER | {"name": "Ann"}],
    ],
)
def test_orders_of_turns_are_for_the_template_to_refuse(live, messages):
    assert live.chat(messages).status == 200


@pytest.mark.parametrize(
    ("message", "param", "said"),
    [
        (5, "messages.0", "5 must be an object with role and content"),
        ({"content": "a"}, "messages.0.role", "is missing; set it"),
        (USER | {"role": "tool"}, "messages.0.role", "'assistant'; send what a tool returned as"),
        (USER | {"role": "function"}, "messages.0.role", "send what a function returned as text"),
        (USER | {"role": "bot"}, "messages.0.role", "must be 'system', 'developer', 'user' or"),
        (USER | {"role": ["user"]}, "messages.0.role", "must be 'system'"),
        (
            {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
            "messages.0.tool_calls",
            "is not supported here; write the call into the content",
        ),
        (
            {"role": "assistant", "refusal": "no"},
            "messages.0.refusal",
            "is not supported here; send it as content",
        ),
        ({"role": "user"}, "messages.0.content", "is missing; set it"),
        (USER | {"content": 5}, "messages.0.content", "5 must be a text or a list of text parts"),
        (USER | {"content": [5]}, "messages.0.content", "send texts, not 5"),
        (
            USER | {"content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "messages.0.content",
            "has a part that is no text; send texts, not a part of type 'image_url'",
        ),
        (USER | {"content": []}, "messages", "'messages[0].content' is ''; write something"),
    ],
)
def test_what_is_no_turn(message, param, said):
    with pytest.raises(ApiError) as refused:
        read_turns([message])
    assert refused.value.param == param
    assert said in refused.value.message


def test_a_template_may_refuse_the_order(live, served, monkeypatch):
    def refuses(*args, **options):
        raise ValueError("Conversation roles must alternate")

    monkeypatch.setattr(served.tokenizer.fast, "apply_chat_template", refuses)
    answer = live.chat([USER, USER])
    assert answer.status == 400
    said = "messages: the chat template refuses them: Conversation roles must alternate"
    assert answer.error["message"] == said
