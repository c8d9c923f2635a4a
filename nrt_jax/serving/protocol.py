"""The requests and errors of OpenAI's interface; a field beyond them is an error that names it."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, Literal, NoReturn, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.responses import Response

from nrt_jax.engine.sampling import MAX_STOP_IDS, Sampling
from nrt_jax.strict_json import parse_json

MAX_STOPS = 4

# OpenAI has these; they change nothing in what is written.
IGNORED = {
    "metadata",
    "parallel_tool_calls",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "user",
    "verbosity",
}
# OpenAI has these and this server does not; with the values that ask for nothing.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": (),
}


# --- errors and bodies ---------------------------------------------------------------------------


class ApiError(Exception):
    """Ends a request with a status and one line that says why.

    `param` names the wrong field of the request, `code` the kind of mistake.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = "rate_limit_error" if self.status == 429 else kind
        fields = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": fields}


def bad_request(param: str, message: str) -> ApiError:
    """Status 400 that names the field, the value and the remedy."""
    return ApiError(400, f"{param}: {message}", param=param)


class JsonResponse(Response):
    """JSON in ASCII, which any text of a client can be part of, even a lone surrogate."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes; ValueError for NaN and infinity, which JSON does not have."""
        return dump(content).encode("ascii")


def dump(content: Any) -> str:
    """`content` as one line of JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def error_response(error: ApiError) -> Response:
    """The response to a request that fails before its answer begins."""
    return JsonResponse(error.body, error.status, headers=error.headers)


def usage(prompt: int, sampled: int) -> dict[str, int]:
    """Numbers of tokens, including those that ended a sequence."""
    return {
        "prompt_tokens": prompt,
        "completion_tokens": sampled,
        "total_tokens": prompt + sampled,
    }


# --- requests ------------------------------------------------------------------------------------


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)


class StreamOptions(_Body):
    """Options of a streamed answer."""

    include_usage: bool = False
    """Whether a last chunk has the numbers of tokens."""


class SamplingFields(_Body):
    """The fields of both kinds of completion."""

    model: str
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    n: int = Field(default=1, ge=1, le=128)
    best_of: int | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**31)
    stop: list[str] = []
    stream: bool = False
    stream_options: StreamOptions | None = None
    top_k: int = Field(default=0, ge=-1)
    min_p: float = Field(default=0.0, ge=0, le=1)
    repetition_penalty: float = Field(default=1.0, gt=0, le=100)
    stop_token_ids: list[int] = Field(default=[], max_length=MAX_STOP_IDS)

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: list[str]) -> list[str]:
        if len(value) > MAX_STOPS or not all(value):
            raise ValueError(f"must be up to {MAX_STOPS} texts, none of them empty")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer; it is cut before them."""
        return tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def sampling(self) -> Sampling:
        """How the engine samples."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(self.top_k, 0),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            stop_ids=frozenset(self.stop_token_ids),
        )

    def check_stop_ids(self, vocab_size: int) -> None:
        """ApiError 400 for a stop id that is no token."""
        for token in self.stop_token_ids:
            if not 0 <= token < vocab_size:
                raise bad_request("stop_token_ids", f"{token}; token ids are 0 to {vocab_size - 1}")


class CompletionRequest(SamplingFields):
    """`POST /v1/completions`."""

    prompt: Any
    max_tokens: int | None = Field(default=None, ge=0)
    logprobs: int | None = Field(default=None, ge=0, le=5)
    echo: bool = False


class ChatMessage(_Body):
    """One turn."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[dict[str, Any]]


class ChatRequest(SamplingFields):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    max_reasoning_tokens: int | None = Field(default=None, ge=1)
    """An extension: a trace of this length is closed."""
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=20)


R = TypeVar("R", bound=SamplingFields)


def parse(schema: type[R], body: bytes) -> R:
    """Read a body; ApiError 400 that names the first wrong field."""
    fields = {key: value for key, value in _read_json(body).items() if value is not None}
    for name in [name for name in fields if name in UNSUPPORTED or name in IGNORED]:
        value = fields.pop(name)
        if name in UNSUPPORTED and not any(value == allowed for allowed in UNSUPPORTED[name]):
            raise bad_request(name, "is not supported here; leave it out")
    try:
        request = schema.model_validate(fields)
    except ValidationError as error:
        _refuse(error, schema)
    if request.best_of not in (None, request.n):
        raise bad_request("best_of", "is not supported here; leave it out or make it n")
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options", "needs stream=true")
    return request


def _read_json(body: bytes) -> dict[str, Any]:
    try:
        fields = parse_json(body)
        # Lone surrogates are not text, neither in values nor in names.
        json.dumps(fields, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ApiError(400, "the body has a lone surrogate; escape it as a pair") from None
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body must be JSON: {' '.join(str(error).split())}") from None
    if not isinstance(fields, dict):
        raise ApiError(400, "the body must be a JSON object")
    return fields


def _refuse(error: ValidationError, schema: type[BaseModel]) -> NoReturn:
    """ApiError 400 for the first mistake; an unknown field comes before others."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    param = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        near = get_close_matches(param, schema.model_fields, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise bad_request(param, f"is no field of this request{hint}")
    if first["type"] == "missing":
        raise bad_request(param, "is missing; set it")
    if first["type"] == "value_error":
        message = str(first.get("ctx", {}).get("error"))
    else:
        message = first["msg"].replace("Input should ", "must ").replace("List should", "must")
    raise bad_request(param, message)
