"""`/openapi.json`: what it says of requests is what the server does."""

import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving.app import KINDS, ROUTES
from nrt_jax.serving.openapi import REQUESTS, document
from nrt_jax.serving.unsupported import IGNORED, UNSUPPORTED

CHAT = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
TEXT = {"model": "tiny", "prompt": "a", "max_tokens": 2}
COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"


@pytest.fixture(scope="module")
def paths(live):
    answer = live.get("/openapi.json")
    assert answer.status == 200
    return answer.json["paths"]


@pytest.fixture(scope="module")
def valid(live):
    """Whether a body fits the schema of a path."""
    jsonschema = pytest.importorskip("jsonschema_rs")
    components = live.get("/openapi.json").json["components"]

    def check(path: str, body: dict) -> bool:
        name = REQUESTS[path][0].__name__
        schema = {"$ref": f"#/components/schemas/{name}", "components": components}
        return jsonschema.is_valid(schema, body)

    return check


def test_every_route_is_in_it(paths):
    assert paths.keys() == ROUTES | {"/v1/models/{name}"}
    assert {path: request for path, (request, *_) in REQUESTS.items()} == {
        path: schema for path, (schema, _) in KINDS.items()
    }


@pytest.mark.parametrize("path", REQUESTS)
def test_every_field_that_is_accepted_is_in_it(live, path):
    request = REQUESTS[path][0]
    properties = live.get("/openapi.json").json["components"]["schemas"][request.__name__]
    assert properties["additionalProperties"] is False
    assert properties["properties"].keys() == {*request.model_fields, *UNSUPPORTED, *IGNORED}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, TEXT),
        (COMPLETIONS, TEXT | {"prompt": [[5, 6], [7]], "stop": "x", "user": "me", "seed": None}),
        (COMPLETIONS, TEXT | {"stop": ["x", "y"], "logit_bias": {}, "stream_options": None}),
        (COMPLETIONS, TEXT | {"prompt": ["a", "b"], "n": 2, "logprobs": 2, "echo": True}),
        (CHATS, CHAT),
        (CHATS, CHAT | {"logprobs": True, "top_logprobs": 3, "tools": [], "tool_choice": "none"}),
        (CHATS, CHAT | {"response_format": {"type": "text"}, "max_reasoning_tokens": 3}),
    ],
)
def test_what_fits_is_served(live, valid, path, body):
    assert valid(path, body)
    assert live.post(path, body).status == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETIONS, {"model": "tiny"}),
        (COMPLETIONS, TEXT | {"model": None}),
        (COMPLETIONS, TEXT | {"prompt": []}),
        (COMPLETIONS, TEXT | {"prompt": [5, "a"]}),
        (COMPLETIONS, TEXT | {"prompt": [10**6]}),
        (COMPLETIONS, TEXT | {"stop": [""]}),
        (COMPLETIONS, TEXT | {"n": 0}),
        (COMPLETIONS, TEXT | {"logprobs": 6}),
        (COMPLETIONS, TEXT | {"max_tokens": 10**5}),
        (COMPLETIONS, TEXT | {"stop_token_ids": [10**6]}),
        (COMPLETIONS, TEXT | {"suffix": "x"}),
        (COMPLETIONS, TEXT | {"tempratur": 1}),
        (CHATS, CHAT | {"messages": []}),
        (CHATS, CHAT | {"messages": [{"role": "tool", "content": "a"}]}),
        (CHATS, CHAT | {"messages": [{"role": "user", "content": 5}]}),
        (CHATS, CHAT | {"tools": [{}]}),
        (CHATS, CHAT | {"max_completion_tokens": 10**5}),
        (CHATS, CHAT | {"temperature": "hot"}),
    ],
)
def test_what_does_not_fit_is_refused(live, valid, path, body):
    assert not valid(path, body)
    assert live.post(path, body).status == 400


@pytest.mark.parametrize("keys", [False, True])
def test_it_says_whether_a_key_is_wanted(served, keys):
    found = document(served, ServingConfig(), keys=keys)
    operations = {p: item.get("get") or item["post"] for p, item in found["paths"].items()}
    wanted = {path for path, operation in operations.items() if "security" in operation}
    assert wanted == (operations.keys() - {"/health"} if keys else set())
    assert all(
        ("401" in operation["responses"]) == (path in wanted)
        for path, operation in operations.items()
    )
    assert ("securitySchemes" in found["components"]) == keys
