"""Errors and bodies as OpenAI's interface has them."""

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response


class ApiError(Exception):
    """Ends a request with a status and one line that says why.

    `param` names the field of the request that is at fault, `code` the kind of mistake.
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
    """JSON in ASCII, so that no text of a client, a lone surrogate included, can break it."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The body's bytes; no NaN or infinity gets into it."""
        return dump(content).encode("ascii")


def dump(content: Any) -> str:
    """`content` as one line of JSON."""
    return json.dumps(content, allow_nan=False, separators=(",", ":"))


def error_response(error: ApiError) -> Response:
    """What a client gets for an error before its answer has begun."""
    return JsonResponse(error.body, error.status, headers=error.headers)
