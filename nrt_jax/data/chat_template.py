"""From a row's fields to the prompt x and the reference answer y*, as text."""

from typing import NamedTuple

from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.config import DataConfig

ROLES = ("system", "user", "assistant")


class Rendered(NamedTuple):
    """One row as text."""

    prompt: tuple[str, ...]
    """x in pieces; the end-of-sequence token, which no text can hold, goes between each two."""
    answer: str
    """y*, without the end-of-sequence token."""


def render(fields: dict, config: DataConfig) -> Rendered:
    """Apply the prompt template to a row; BadRow when it lacks what the template needs.

    plain: x is the question as it is.
    tulu: `<|user|>\\n{question}\\n<|assistant|>\\n`; a row with messages has all turns before the
    last assistant turn in x, and that turn as y*.
    """
    if config.template == "tulu" and config.messages_field in fields:
        return _render_messages(fields[config.messages_field], config.messages_field)
    question = _text(fields, config.question_field)
    answer = _text(fields, config.answer_field)
    if config.template == "tulu":
        return Rendered((f"<|user|>\n{question}\n<|assistant|>\n",), answer)
    return Rendered((question,), answer)


def _render_messages(messages: object, field: str) -> Rendered:
    if not isinstance(messages, list):
        raise BadRow(
            "messages not a list", f"'{field}' is {shorten(messages)}; give a list of turns"
        )
    turns = [_turn(message, f"{field}[{i}]") for i, message in enumerate(messages)]
    answers = [i for i, (role, _) in enumerate(turns) if role == "assistant"]
    if not answers or answers[-1] == 0:
        raise BadRow(
            "no answered turn",
            f"'{field}' has no assistant turn after another turn; give at least user, assistant",
        )
    pieces = [""]
    for role, content in turns[: answers[-1]]:
        pieces[-1] += f"<|{role}|>\n{content}"
        if role == "assistant":
            pieces.append("")
        pieces[-1] += "\n"
    pieces[-1] += "<|assistant|>\n"
    return Rendered(tuple(pieces), turns[answers[-1]][1])


def _turn(message: object, name: str) -> tuple[str, str]:
    if not isinstance(message, dict):
        raise BadRow("bad turn", f"'{name}' is {shorten(message)}; give {{role, content}}")
    role = message.get("role")
    if role not in ROLES:
        raise BadRow("bad role", f"'{name}.role' is {shorten(role)}; use {', '.join(ROLES)}")
    # An empty system turn is common, and says nothing wrong.
    return role, _text(message, "content", f"{name}.content", may_be_empty=role == "system")


def _text(fields: dict, key: str, name: str | None = None, *, may_be_empty: bool = False) -> str:
    name = name or key
    if key not in fields:
        has = ", ".join(map(repr, list(fields)[:5])) or "none"
        raise BadRow(f"without '{key}'", f"field '{name}' is missing (it has {has}); add it")
    value = fields[key]
    if not isinstance(value, str):
        raise BadRow(f"'{key}' not text", f"'{name}' is {shorten(value)}; write it as a string")
    if not value.strip() and not may_be_empty:
        raise BadRow(f"empty '{key}'", f"'{name}' is {shorten(value)}; fill it in or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = shorten(value[error.start : error.end])
        raise BadRow(
            f"'{key}' not Unicode", f"'{name}' has the lone surrogate {shown}; escape it as a pair"
        ) from error
    return value
