"""What a client makes of the answers of a server, and of its silence."""

import pytest

from nrt_jax.errors import InputError
from nrt_jax.evaluation.chat_client import ChatClient, ServerGone, ServerRefused
from tests.evaluation.stub_server import StubServer, completion

ASK = [{"role": "user", "content": "1+1"}]


def client(url: str, **options) -> ChatClient:
    return ChatClient(url=url, model="m", **{"first_wait_s": 0.01, "tries": 3} | options)


def test_a_request_has_the_fields_and_the_key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with StubServer(lambda _: (200, completion("2"))) as server:
        reply = client(server.url.removesuffix("/v1")).complete(ASK, temperature=0)
    assert (reply.text, reply.closed, reply.finish) == ("2", True, "stop")
    (asked,) = server.asked
    assert asked == {
        "model": "m",
        "messages": ASK,
        "temperature": 0,
        "path": "/v1/chat/completions",
    }
    assert server.headers[0]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize(
    ("body", "text", "reasoning", "closed"),
    [
        (completion("2"), "2", None, True),
        (completion("2", reasoning_content="z"), "2", "z", True),
        (completion("2", reasoning="z"), "2", "z", True),
        (completion("<think>z</think>2"), "2", "z", True),
        (completion("z</think>2</think>3"), "2</think>3", "z", True),
        (completion("<think>z, cut", finish="length"), "", "z, cut", False),
        (completion(None, finish="length", reasoning_content="z"), "", "z", False),
        (completion(""), "", None, True),
    ],
)
def test_the_answer_is_what_follows_the_reasoning(body, text, reasoning, closed):
    with StubServer(lambda _: (200, body)) as server:
        reply = client(server.url).complete(ASK)
    assert (reply.text, reply.reasoning, reply.closed) == (text, reasoning, closed)
    assert (reply.tokens, reply.reasoning_tokens) == (7, 4)


def test_a_busy_server_is_asked_again():
    statuses = iter([503, 0, 200])
    with StubServer(lambda _: (next(statuses), completion("2"))) as server:
        assert client(server.url).complete(ASK).text == "2"
    assert len(server.asked) == 3


def test_a_server_that_is_gone_is_told_in_one_line():
    with StubServer(lambda _: (500, {"error": {"message": "out of\nmemory"}})) as server:
        with pytest.raises(ServerGone, match=r"no answer after 3 tries \(status 500: out of mem"):
            client(server.url).complete(ASK)
        url = server.url
    with pytest.raises(ServerGone, match=r"http://127.0.0.1:\d+/v1: no answer after 3 tries \("):
        client(url).complete(ASK)


@pytest.mark.parametrize(
    ("reply", "problem"),
    [
        ((404, {"error": {"message": "no model m"}}), "status 404: no model m"),
        ((400, b"<html>"), "status 400: <html>"),
        ((200, b"<html>\nhello"), "is no chat completion|what is no chat completion"),
        ((200, {"choices": []}), "no chat completion"),
    ],
)
def test_a_refusal_is_not_tried_again(reply, problem):
    with (
        StubServer(lambda _: reply) as server,
        pytest.raises(ServerRefused, match=problem) as refused,
    ):
        client(server.url).complete(ASK)
    assert "\n" not in str(refused.value)
    assert len(server.asked) == 1


def test_a_url_must_be_one():
    with pytest.raises(
        InputError, match="--url localhost:8000: must look like http://HOST:PORT/v1"
    ):
        client("localhost:8000")
