"""The OpenAPI document of the HTTP interface: `/openapi.json`.

The schemas of requests are those that check them (request_fields.py), changed where the check does
more: null means that a field is absent, and other fields that ask for nothing are accepted.
"""

import copy
from typing import Any

from pydantic.json_schema import models_json_schema

import nrt_jax
from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving.conversation import ROLES, TEXT_PARTS
from nrt_jax.serving.request_fields import MAX_STOPS, ChatRequest, CompletionRequest
from nrt_jax.serving.served_model import ServedModel
from nrt_jax.serving.unsupported import IGNORED, UNSUPPORTED

REQUESTS = {
    "/v1/completions": (CompletionRequest, "Continue texts or token ids", "Completion"),
    "/v1/chat/completions": (ChatRequest, "Answer a conversation", "ChatCompletion"),
}
SCHEMAS = "#/components/schemas/"
TEXT, INTEGER, OBJECT = {"type": "string"}, {"type": "integer"}, {"type": "object"}
FAILURES = {
    "400": "A field, a body or a prompt that cannot be served; the message names the field.",
    "404": "Another model.",
    "413": "The body is larger than max_body_bytes.",
    "429": "The queue is full.",
    "500": "A mistake of the server; its log has more on the request's id.",
    "503": "The server is shutting down.",
    "504": "Not answered within request_timeout_s.",
}


def document(served: ServedModel, config: ServingConfig, *, keys: bool) -> dict[str, Any]:
    """The document for one model, with its limits; `keys` says whether requests need one."""
    paths = {path: {"post": _post(path)} for path in REQUESTS}
    paths |= {
        "/v1/models": {"get": _get("List the model", "ModelList")},
        "/v1/models/{name}": {"get": _get("Show the model", "Model", ("404",))},
        "/health": {"get": _get("Whether requests are taken", "Health", health=True)},
        "/metrics": {"get": _metrics()},
        "/openapi.json": {"get": _get("This document", None)},
    }
    name = {"name": "name", "in": "path", "required": True, "schema": TEXT}
    paths["/v1/models/{name}"]["parameters"] = [name]
    components: dict[str, Any] = {"schemas": _schemas(served, config)}
    if keys:
        components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, item in paths.items():
            for operation in (item[method] for method in ("get", "post") if method in item):
                if path == "/health":
                    continue
                operation["security"] = [{"key": []}]
                operation["responses"]["401"] = _failure("No API key, or a wrong one.")
    return {
        "openapi": "3.1.0",
        "info": {"title": "nrt-jax serve", "version": nrt_jax.__version__},
        "paths": paths,
        "components": components,
    }


# --- operations ----------------------------------------------------------------------------------


def _post(path: str) -> dict[str, Any]:
    request, summary, answer = REQUESTS[path]
    content = {
        "application/json": {"schema": _ref(answer)},
        "text/event-stream": {},
    }
    return {
        "summary": summary,
        "operationId": answer,
        "requestBody": {"required": True, "content": _json(_ref(request.__name__))},
        "responses": {
            "200": {"description": "The answer; events if `stream` is true.", "content": content}
        }
        | {status: _failure(what) for status, what in FAILURES.items()},
    }


def _get(
    summary: str, answer: str | None, failures: tuple[str, ...] = (), *, health: bool = False
) -> dict[str, Any]:
    schema = OBJECT if answer is None else _ref(answer)
    responses = {"200": {"description": summary, "content": _json(schema)}}
    if health:
        responses["503"] = {"description": "It drains, or an engine failed.", **responses["200"]}
    responses |= {status: _failure(FAILURES[status]) for status in failures}
    return {"summary": summary, "responses": responses}


def _metrics() -> dict[str, Any]:
    content = {"text/plain": {"schema": TEXT}}
    return {
        "summary": "Figures for Prometheus",
        "responses": {"200": {"description": "The figures.", "content": content}},
    }


def _failure(description: str) -> dict[str, Any]:
    return {"description": description, "content": _json(_ref("Error"))}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}


def _ref(name: str) -> dict[str, Any]:
    return {"$ref": SCHEMAS + name}


# --- schemas -------------------------------------------------------------------------------------


def _schemas(served: ServedModel, config: ServingConfig) -> dict[str, Any]:
    models = [(request, "validation") for request, _, _ in REQUESTS.values()]
    _, found = models_json_schema(models, ref_template=SCHEMAS + "{model}")
    schemas = found["$defs"]
    for request, _, _ in REQUESTS.values():
        _complete(schemas[request.__name__], served, config)
    return schemas | _answers(served)


def _complete(schema: dict[str, Any], served: ServedModel, config: ServingConfig) -> None:
    """What `parse` and `prepare` do beside the schema of the class."""
    properties = schema["properties"]
    texts = {"type": "string", "minLength": 1}
    known = {
        "model": {"type": "string", "const": served.name},
        "stop": {
            "anyOf": [texts, {"type": "array", "items": texts, "maxItems": MAX_STOPS}],
            "default": [],
        },
        "prompt": _prompt(served, config),
        "messages": {"type": "array", "items": _message(), "minItems": 1},
    }
    for name in properties.keys() & known.keys():
        properties[name] = known[name]
    properties["stop_token_ids"]["items"] = _token(served)
    most = {
        "n": config.max_sequences,
        "logprobs": config.top_logprobs,
        "top_logprobs": config.top_logprobs,
        "max_tokens": served.limits.context - 1,
        "max_completion_tokens": served.limits.new,
        "max_reasoning_tokens": served.limits.trace,
    }
    for name in properties.keys() & most.keys():
        _bound(properties[name], most[name])
    for name in properties.keys() - set(schema["required"]):
        properties[name] = _or_null(properties[name])
    for name, unsupported in UNSUPPORTED.items():
        properties.setdefault(name, {"enum": [*unsupported.neutral, None]})
    for name in IGNORED:
        properties.setdefault(name, {})


def _bound(schema: dict[str, Any], most: int) -> None:
    for member in schema.get("anyOf", [schema]):
        if member.get("type") == "integer":
            member["maximum"] = min(most, member.get("maximum", most))


def _token(served: ServedModel) -> dict[str, Any]:
    return {"type": "integer", "minimum": 0, "maximum": served.vocab_size - 1}


def _prompt(served: ServedModel, config: ServingConfig) -> dict[str, Any]:
    ids = {
        "type": "array",
        "items": _token(served),
        "minItems": 1,
        "maxItems": served.limits.context,
    }
    many = {"type": "array", "minItems": 1, "maxItems": config.max_sequences}
    return {"anyOf": [TEXT, {**many, "items": TEXT}, ids, {**many, "items": ids}]}


def _message() -> dict[str, Any]:
    part = _object(type={"enum": list(TEXT_PARTS)}, text=TEXT)
    parts = {"type": "array", "items": {"anyOf": [TEXT, part]}}
    content = {"anyOf": [TEXT, parts, {"type": "null"}]}
    message = _object(role={"enum": list(ROLES)})
    message["properties"]["content"] = content
    return message


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    schema = copy.deepcopy(schema)
    about = {name: schema.pop(name) for name in ("title", "description", "default") & schema.keys()}
    members = schema.pop("anyOf", [schema])
    if {"type": "null"} not in members:
        members = [*members, {"type": "null"}]
    return {"anyOf": members, **about}


def _answers(served: ServedModel) -> dict[str, Any]:
    or_null = {"anyOf": [TEXT, {"type": "null"}]}
    usage = _object(prompt_tokens=INTEGER, completion_tokens=INTEGER, total_tokens=INTEGER)
    choice = {"index": INTEGER, "finish_reason": {"enum": ["stop", "length"]}}
    logprobs = {"anyOf": [OBJECT, {"type": "null"}]}
    message = _object(role={"const": "assistant"}, content=TEXT)
    message["properties"]["reasoning_content"] = TEXT
    head = {"id": TEXT, "created": INTEGER, "model": {"const": served.name}, "usage": usage}

    def answer(kind: str, **fields: Any) -> dict[str, Any]:
        choices = {"type": "array", "items": _object(**choice, logprobs=logprobs, **fields)}
        return _object(**head, object={"const": kind}, choices=choices)

    model = _object(id={"const": served.name}, object={"const": "model"}, created=INTEGER)
    error = _object(message=TEXT, type=TEXT, param=or_null, code=or_null)
    return {
        "Completion": answer("text_completion", text=TEXT),
        "ChatCompletion": answer("chat.completion", message=message),
        "Model": model,
        "ModelList": _object(
            object={"const": "list"}, data={"type": "array", "items": _ref("Model")}
        ),
        "Health": _object(status=TEXT),
        "Error": _object(error=error),
    }


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)}
