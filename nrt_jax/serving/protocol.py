"""JSON bodies in both directions, and errors as OpenAI's interface has them."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from nrt_jax.strict_json import parse_json

SHOWN_CHARACTERS = 400
"""Longest message of an error: values that a client sent may be of any length."""


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
        if len(message) > SHOWN_CHARACTERS:
            message = f"{message[: SHOWN_CHARACTERS - 3]}..."
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


def read_json(body: bytes) -> dict[str, Any]:
    """The object of a request; ApiError 400 for what is not JSON, or is ambiguous in it."""
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
