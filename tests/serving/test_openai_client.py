"""The openai package against a live server, unchanged."""

import openai
import pytest

TEXT = "Natalia sold clips to 48"


@pytest.fixture(scope="module")
def client(live):
    with openai.OpenAI(base_url=live.url, api_key="none", max_retries=0) as client:
        yield client


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "nrt-jax"


def test_completions(client, live):
    fields = {"model": "tiny", "prompt": TEXT, "temperature": 0, "logprobs": 2, "echo": True}
    whole = client.completions.create(**fields)
    expected = live.complete(TEXT, logprobs=2, echo=True).json["choices"][0]
    assert whole.choices[0].text == expected["text"]
    assert whole.choices[0].logprobs.tokens == expected["logprobs"]["tokens"]
    assert whole.usage.completion_tokens == 16
    stream = client.completions.create(**fields, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == expected["text"]


def test_extensions_go_into_the_body(client, live):
    more = {"top_k": 5, "min_p": 0.01, "repetition_penalty": 1.3, "stop_token_ids": [3]}
    got = client.completions.create(model="tiny", prompt=TEXT, seed=3, extra_body=more)
    expected = live.complete(TEXT, temperature=1, seed=3, **more).json["choices"][0]["text"]
    assert got.choices[0].text == expected


def test_chats(client, live):
    messages = [{"role": "user", "content": TEXT}]
    whole = client.chat.completions.create(model="tiny", messages=messages, temperature=0)
    expected = live.chat(TEXT).json["choices"][0]["message"]
    assert whole.choices[0].message.content == expected["content"]
    assert whole.choices[0].message.reasoning_content == expected["reasoning_content"]
    stream = client.chat.completions.create(
        model="tiny",
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    content, reasoning, usage = "", "", None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
    assert (content, reasoning) == (expected["content"], expected["reasoning_content"])
    assert usage.total_tokens == whole.usage.total_tokens


def test_errors_have_the_classes_of_the_client(client):
    with pytest.raises(openai.BadRequestError) as bad:
        client.completions.create(model="tiny", prompt="a", temperature=-1)
    assert bad.value.param == "temperature"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="a")
