"""The messages of a chat request to the turns of a conversation.

Its rules are not those of training rows: what this server answered comes back as history, also
without text.
"""

from collections.abc import Sequence
from typing import Any

from nrt_jax.data.bad_rows import shorten
from nrt_jax.serving.protocol import bad_request

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
"""The role of a message, and that of its turn in the chat template."""
REMEDIES = {
    "tool": "send what a tool returned as text of a user turn",
    "function": "send what a function returned as text of a user turn",
}
UNSUPPORTED = {
    "tool_calls": "write the call into the content",
    "function_call": "write the call into the content",
    "audio": "send text",
    "refusal": "send it as content",
}
"""Fields of a message that must be empty, and what to do instead."""
TEXT_PARTS = ("text", "input_text", "output_text")


def read_turns(messages: Sequence[Any]) -> list[dict[str, str]]:
    """Role and content of each message; ApiError 400 that names what cannot be a turn.

    The reasoning of an earlier answer and names of participants are left out, as in training.
    """
    return [_turn(index, message) for index, message in enumerate(messages)]


def _turn(index: int, message: Any) -> dict[str, str]:
    name = f"messages.{index}"
    if not isinstance(message, dict):
        raise bad_request(name, f"{_shown(message)} must be an object with role and content")
    if message.get("role") is None:
        raise bad_request(f"{name}.role", "is missing; set it")
    role = message["role"]
    if not isinstance(role, str) or role not in ROLES:
        *others, last = map(repr, ROLES)
        remedy = REMEDIES.get(role, "") if isinstance(role, str) else ""
        allowed = f"must be {', '.join(others)} or {last}"
        raise bad_request(f"{name}.role", f"{allowed}; {remedy}" if remedy else allowed)
    for field, remedy in UNSUPPORTED.items():
        if message.get(field):
            raise bad_request(f"{name}.{field}", f"is not supported here; {remedy}")
    content = message.get("content")
    if content is None:
        if role != "assistant":
            raise bad_request(f"{name}.content", "is missing; set it")
        content = ""
    text = _text(f"{name}.content", content)
    if role == "user" and not text.strip():
        raise bad_request("messages", f"'messages[{index}].content' is {text!r}; write something")
    return {"role": ROLES[role], "content": text}


def _text(name: str, content: Any) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise bad_request(name, f"{_shown(content)} must be a text or a list of text parts")
    return "".join(_part(name, part) for part in content)


def _part(name: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type") if isinstance(part, dict) else None
    if kind in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    what = f"a part of type {shorten(kind)}" if isinstance(kind, str) else _shown(part)
    raise bad_request(name, f"has a part that is no text; send texts, not {what}")


def _shown(value: Any) -> str:
    """A wrong value in a message; nested ones by their kind, since they may be of any depth."""
    kinds = {list: "a list", dict: "an object"}
    return kinds.get(type(value)) or shorten(value)
