"""A client of `POST /v1/chat/completions`, of any server that speaks like OpenAI's."""

import http.client
import json
import logging
import os
import time
import urllib.parse
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from nrt_jax.errors import InputError, RunFailed

log = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
TRIES = 5
FIRST_WAIT_S = 1.0
"""Before the second try; it doubles for each other."""
_BUSY = {408, 409, 425, 429, 500, 502, 503, 504}
THINK_END = "</think>"
THINK_START = "<think>"


class ServerGone(RunFailed):
    """The server does not answer any more; the line says where and why."""


class ServerRefused(RunFailed):
    """The server refuses a request as it is; trying again would not help."""

    def __init__(self, message: str, status: int | None = None):
        super().__init__(message)
        self.status = status
        """Of the HTTP answer; None for one that is no chat completion."""


class ChatReply(NamedTuple):
    """One answer of a server."""

    text: str
    """What is after the reasoning."""
    reasoning: str | None
    """None where the server shows none."""
    closed: bool
    """Whether the reasoning came to its end; true without one."""
    finish: str
    """"stop" or "length", or a reason of the server's own."""
    tokens: int
    """All that were sampled."""
    reasoning_tokens: int
    """Of them, where the server counts them apart."""
    refusal: str | None = None
    """Why the model gives no answer; None where it gives one."""


@dataclass(frozen=True, kw_only=True)
class ChatClient:
    """Asks one model of one server; several threads may use it."""

    url: str
    """`http(s)://HOST[:PORT][/v1]`."""
    model: str
    timeout_s: float = 600.0
    tries: int = TRIES
    first_wait_s: float = FIRST_WAIT_S

    def __post_init__(self) -> None:
        parts = urllib.parse.urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--url {self.url}: must look like http://HOST:PORT/v1")

    def complete(self, messages: Sequence[dict[str, str]], **fields: Any) -> ChatReply:
        """The answer to a conversation; `fields` are those of the request, such as temperature.

        Raises ServerGone after some tries, and ServerRefused for a request that is refused.
        """
        body = {"model": self.model, "messages": list(messages), **fields}
        return _read_reply(self._post(json.dumps(body).encode()), self.url)

    def _post(self, body: bytes) -> Any:
        problem = ""
        for number in range(self.tries):
            if number:
                time.sleep(self.first_wait_s * 2 ** (number - 1))
            try:
                status, text = self._send(body)
            except (OSError, http.client.HTTPException) as error:
                problem = " ".join(str(error).split()) or type(error).__name__
                continue
            if status == http.client.OK:
                return text
            problem = f"status {status}: {_message(text)}"
            if status not in _BUSY:
                raise ServerRefused(f"{self.url}: refuses a request ({problem})", status)
        raise ServerGone(f"{self.url}: no answer after {self.tries} tries ({problem})")

    def _send(self, body: bytes) -> tuple[int, bytes]:
        parts = urllib.parse.urlsplit(self.url)
        kinds = {"http": http.client.HTTPConnection, "https": http.client.HTTPSConnection}
        path = parts.path.rstrip("/")
        path = path if path.endswith("/v1") else f"{path}/v1"
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        connection = kinds[parts.scheme](parts.hostname or "", parts.port, timeout=self.timeout_s)
        try:
            connection.request("POST", f"{path}/chat/completions", body, headers)
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()


def _read_reply(text: bytes, url: str) -> ChatReply:
    try:
        value = json.loads(text)
        choice = value["choices"][0]
        message, finish = choice["message"], str(choice.get("finish_reason") or "stop")
        content = message.get("content") or ""
        reasoning = message.get("reasoning_content") or message.get("reasoning")
        usage = value.get("usage") or {}
        tokens = int(usage.get("completion_tokens") or 0)
        details = usage.get("completion_tokens_details") or {}
        reasoning_tokens = int(details.get("reasoning_tokens") or 0)
        refusal = message.get("refusal")
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        shown = " ".join(text[:80].decode(errors="replace").split())
        raise ServerRefused(f"{url}: answers what is no chat completion ({shown!r})") from error
    closed = True
    if reasoning is None and THINK_END in content:
        reasoning, _, content = content.partition(THINK_END)
        reasoning = reasoning.removeprefix(THINK_START)
    elif reasoning is None and content.lstrip().startswith(THINK_START):
        reasoning, content, closed = content.lstrip().removeprefix(THINK_START), "", False
    elif reasoning is not None and not content and finish == "length":
        closed = False
    if refusal is None and finish == "content_filter":
        refusal = f"{content} [content_filter]"
    return ChatReply(content, reasoning, closed, finish, tokens, reasoning_tokens, refusal)


def _message(text: bytes) -> str:
    """The server's own words of an error."""
    try:
        error = json.loads(text)["error"]
        words = error["message"] if isinstance(error, dict) else error
    except (ValueError, KeyError, TypeError):
        words = text[:200].decode(errors="replace")
    return " ".join(str(words).split())[:200]
