"""What cannot be served is refused with one reason that names the field."""

import json

import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving.server import make_server
from tests.serving.live import listening
from tests.serving.models import DECODE_STEPS, NEW, PROMPT, SLOTS, TRACE

COMPLETION = {"model": "tiny", "prompt": "a", "max_tokens": 1}
CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
CONTEXT = PROMPT + NEW

BOTH = [
    ({"temperature": -0.1}, "temperature", "must be greater than or equal to 0"),
    ({"temperature": 2.1}, "temperature", "must be less than or equal to 2"),
    ({"temperature": "hot"}, "temperature", "must be a valid number"),
    ({"temperature": True}, "temperature", "must be a valid number"),
    ({"top_p": 0}, "top_p", "must be greater than 0"),
    ({"top_p": 1.01}, "top_p", "must be less than or equal to 1"),
    ({"min_p": -1}, "min_p", "must be greater than or equal to 0"),
    ({"top_k": 1.5}, "top_k", "must be a valid integer"),
    ({"top_k": -2}, "top_k", "must be greater than or equal to -1"),
    ({"repetition_penalty": 0}, "repetition_penalty", "must be greater than 0"),
    ({"n": 0}, "n", "must be greater than or equal to 1"),
    ({"n": 129}, "n", "must be less than or equal to 128"),
    ({"repetition_penalty": 1e-9}, "repetition_penalty", "must be 0.01 or more"),
    ({"top_k": 2**31}, "top_k", "must be less than 2147483648"),
    ({"min_tokens": 2**31}, "min_tokens", "must be less than 2147483648"),
    ({"min_tokens": 2}, "min_tokens", "2; max_tokens is 1"),
    ({"seed": -(2**63) - 1}, "seed", "must be greater than or equal to -9223372036854775808"),
    ({"seed": 2**63}, "seed", "must be less than 9223372036854775808"),
    ({"seed": 1.0}, "seed", "must be a valid integer"),
    ({"stop": ["a"] * 17}, "stop", "must be up to 16 texts, none of them empty"),
    ({"stop": ""}, "stop", "must be up to 16 texts, none of them empty"),
    ({"stop": [1]}, "stop.0", "must be a valid string"),
    ({"stop_token_ids": [9999]}, "stop_token_ids", "9999; token ids are 0 to 612"),
    ({"stop_token_ids": list(range(17))}, "stop_token_ids", "must have at most 16 items"),
    ({"stream": "yes"}, "stream", "must be a valid boolean"),
    ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream=true"),
    ({"best_of": 2}, "best_of", "is not supported here; leave it out or make it n"),
    ({"presence_penalty": 0.5}, "presence_penalty", "is not supported here; leave it out"),
    ({"frequency_penalty": -1}, "frequency_penalty", "is not supported here; leave it out"),
    ({"logit_bias": {"5": 1}}, "logit_bias", "is not supported here; leave it out"),
    ({"tools": [{"type": "function"}]}, "tools", "is not supported here; leave it out"),
    ({"response_format": {"type": "json_object"}}, "response_format", "is not supported here"),
    ({"temprature": 1}, "temprature", "is no field of this request; did you mean temperature?"),
    ({"model": 5}, "model", "must be a valid string"),
]
OF_COMPLETIONS = [
    ({"prompt": None}, "prompt", "is missing; set it"),
    ({"prompt": 5}, "prompt", "must be a text, token ids, or a list of one of these"),
    ({"prompt": []}, "prompt", "must be a text, token ids, or a list of one of these"),
    ({"prompt": [True]}, "prompt", "prompt 0 must be a text or a list of one or more token ids"),
    ({"prompt": ["a", 1]}, "prompt", "prompt 1 must be a text or a list of one or more token ids"),
    ({"prompt": ["a", []]}, "prompt", "prompt 1 must be a text or a list of one or more token ids"),
    ({"prompt": [[1], [613]]}, "prompt", "prompt 1 has 613; token ids are 0 to 612"),
    ({"prompt": [[-1]]}, "prompt", "prompt 0 has -1; token ids are 0 to 612"),
    ({"prompt": ["a"] * 129}, "prompt", "129 prompts; with this n 128 are the most"),
    ({"prompt": ["a"] * 50, "n": 3}, "prompt", "50 prompts; with this n 42 are the most"),
    (
        {"prompt": ["a", [5] * CONTEXT]},
        "prompt",
        f"prompt 1 has {CONTEXT} tokens; {CONTEXT - 1} is the most",
    ),
    (
        {"prompt": [5] * (CONTEXT + 1), "max_tokens": 0, "echo": True},
        "prompt",
        f"prompt 0 has {CONTEXT + 1} tokens; {CONTEXT} is the most",
    ),
    ({"max_tokens": NEW + 1}, "max_tokens", f"{NEW + 1}; after the 2 tokens of prompt 0 {NEW} are"),
    (
        {"prompt": [5] * (CONTEXT - 2), "max_tokens": 3},
        "max_tokens",
        f"3; after the {CONTEXT - 2} tokens of prompt 0 2 are the most",
    ),
    ({"max_tokens": 0}, "max_tokens", "0 writes nothing; set 1 or more, or echo=true"),
    ({"max_tokens": -1}, "max_tokens", "must be greater than or equal to 0"),
    ({"logprobs": 6}, "logprobs", "must be less than or equal to 5"),
    ({"logprobs": True}, "logprobs", "must be a valid integer"),
    ({"suffix": "b"}, "suffix", "is not supported here; leave it out"),
    ({"echo": 1}, "echo", "must be a valid boolean"),
]
OF_CHATS = [
    ({"messages": None}, "messages", "is missing; set it"),
    ({"messages": []}, "messages", "must have at least 1 item"),
    ({"messages": [{"role": "user"}]}, "messages.0.content", "is missing; set it"),
    ({"messages": [{"role": "tool", "content": "a"}]}, "messages.0.role", "must be 'system', "),
    ({"messages": [{"role": "user", "content": " "}]}, "messages", "'messages[0].content' is ' '"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages.0.content",
        "has a part that is no text; send texts",
    ),
    (
        {"messages": [{"role": "user", "content": "q " * 60}]},
        "messages",
        f"tokens; {PROMPT} are the most",
    ),
    ({"max_tokens": NEW}, "max_tokens", f"{NEW}; {NEW - 2} are the most"),
    ({"max_completion_tokens": NEW}, "max_completion_tokens", f"{NEW}; {NEW - 2} are the most"),
    (
        {"max_reasoning_tokens": TRACE + 1},
        "max_reasoning_tokens",
        f"{TRACE + 1}; {TRACE} are the most",
    ),
    ({"logprobs": 1}, "logprobs", "must be a valid boolean"),
    ({"top_logprobs": 2}, "top_logprobs", "needs logprobs=true"),
    ({"logprobs": True, "top_logprobs": 6}, "top_logprobs", "6; this server gives up to 5"),
]


def refused(answer, param: str | None, said: str) -> None:
    assert answer.status == 400, answer.text
    error = answer.error
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert said in error["message"]
    assert param is None or error["message"].startswith(f"{param}: ")
    assert "\n" not in error["message"]


@pytest.mark.parametrize(("fields", "param", "said"), BOTH + OF_COMPLETIONS)
def test_completions(live, fields, param, said):
    refused(live.post("/v1/completions", COMPLETION | fields), param, said)


@pytest.mark.parametrize(("fields", "param", "said"), BOTH + OF_CHATS)
def test_chats(live, fields, param, said):
    refused(live.post("/v1/chat/completions", CHAT | fields), param, said)


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"", "the body must be JSON"),
        (b"{", "the body must be JSON"),
        (b"\xff\xfe", "the body must be JSON"),
        (b"[1]", "the body must be a JSON object"),
        (b"[" * 100_000, "the body must be JSON"),
        (b'{"model":"tiny","prompt":"a","temperature":NaN}', "NaN is no number of JSON"),
        (b'{"model":"tiny","prompt":"a","seed":' + b"1" * 5000 + b"}", "more than 4300 digits"),
        (b'{"model":"tiny","prompt":"a","prompt":"b"}', "the key 'prompt' occurs twice in one"),
        (
            b'{"model":"tiny","prompt":"a","stream":true,"stream_options":{"x":1,"x":1}}',
            "the key 'x' occurs twice in one object; keep one",
        ),
        (b'{"model":"tiny","prompt":"a","top_p":Infinity}', "Infinity is no number of JSON"),
        (b'{"model":"tiny","prompt":"\\ud800"}', "the body has a lone surrogate"),
        (b'{"model":"\\udc00","prompt":"a"}', "the body has a lone surrogate"),
    ],
)
def test_bodies(live, body, said):
    refused(live.post("/v1/completions", body), None, said)


def test_a_number_beyond_floats(live):
    body = json.dumps(COMPLETION).replace("}", ', "temperature": 1e999}').encode()
    refused(live.post("/v1/completions", body), "temperature", "must be a finite number")


def test_nulls_are_defaults_and_what_changes_nothing_is_taken(live):
    neutral = {
        "best_of": 1,
        "echo": None,
        "frequency_penalty": 0.0,
        "logit_bias": {},
        "logprobs": None,
        "presence_penalty": 0,
        "stop": None,
        "suffix": None,
        "user": "me",
    }
    answer = live.post("/v1/completions", COMPLETION | {"temperature": 0} | neutral)
    assert answer.status == 200
    plain = live.post("/v1/completions", COMPLETION | {"temperature": 0})
    assert answer.json["choices"] == plain.json["choices"]
    chat = live.post("/v1/chat/completions", CHAT | {"response_format": {"type": "text"}})
    assert chat.status == 200


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_another_model(live, path):
    body = {**(CHAT if "chat" in path else COMPLETION), "model": "gpt-4"}
    answer = live.post(path, body)
    assert answer.status == 404
    assert answer.error["code"] == "model_not_found"
    assert answer.error["message"] == "no model 'gpt-4' here; there is 'tiny'"


def test_another_path_and_method(live):
    answer = live.post("/v1/embeddings", {})
    assert (answer.status, answer.error["message"]) == (404, "POST /v1/embeddings: Not Found")
    answer = live.get("/v1/completions")
    assert (answer.status, answer.error["type"]) == (405, "invalid_request_error")
    assert live.metric("nrt_requests_total", route="other", status="404") >= 1


def test_a_large_body(served):
    with listening(
        make_server(
            served, ServingConfig(slots=SLOTS, decode_steps=DECODE_STEPS, max_body_bytes=1024)
        )
    ) as small:
        answer = small.complete("a" * 2000)
        assert answer.status == 413
        assert answer.error["message"] == "the body is larger than 1024 bytes; send less at a time"
        # Also one that does not say how long it is.
        connection = small.connect()
        connection.request("POST", "/v1/completions", iter([b"{" * 600] * 4), encode_chunked=True)
        assert connection.getresponse().status == 413
        connection.close()


def test_nothing_is_left_in_the_engine(live):
    assert live.api.engine.slots_in_use == 0
    assert live.api.admission.running == live.api.admission.waiting == 0
