"""Known forms of rows: settings that read them, and conversations as {role, content} turns."""

from collections.abc import Callable
from typing import Any, NamedTuple

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import Preset
from nrt_jax.data.bad_rows import BadRow, shorten

Turns = list[Any]
"""Turns as {role, content}; what is none of these is left for its reader to refuse."""

_SPEAKERS = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "developer": "system",
}
# Of the original files the choices are objects in the question; of the hub's, two lists beside it.
_CHOICES = """\
{% if question is mapping %}{{ question.stem }}\
{% for choice in question.choices %}\n({{ choice.label }}) {{ choice.text }}{% endfor %}\
{% else %}{{ question }}\
{% for label in choices.label %}\n({{ label }}) {{ choices.text[loop.index0] }}{% endfor %}\
{% endif %}"""


def with_preset(config: DataConfig) -> DataConfig:
    """The config with the fields that its preset stands for."""
    if config.preset is None:
        return config
    return config.model_copy(update=dict(_FORMS[config.preset].settings))


def turns_reader(config: DataConfig) -> Callable[[Any, str], Turns] | None:
    """How the preset makes turns of a field, whose name is for messages; None where it does not."""
    return None if config.preset is None else _FORMS[config.preset].turns


# --- conversations -------------------------------------------------------------------------------


def _messages(value: Any, name: str) -> Turns:
    """tulu-3 and OpenAI: {role, content}, in which content may be a list of parts of type text."""
    if not isinstance(value, list):
        raise BadRow("messages not a list", f"'{name}' is {shorten(value)}; give a list of turns")
    turns = []
    for i, turn in enumerate(value):
        if isinstance(turn, dict) and isinstance(turn.get("content"), list):
            turn = turn | {"content": _joined(turn["content"], f"{name}[{i}].content")}
        turns.append(_with_role(turn))
    return _in_order(turns, name)


def _sharegpt(value: Any, name: str) -> Turns:
    """{from, value}, from human and gpt."""
    if isinstance(value, list):
        value = [
            {"role": turn["from"], "content": turn.get("value")}
            if isinstance(turn, dict) and "from" in turn
            else turn
            for turn in value
        ]
    return _messages(value, name)


def _oasst(value: Any, name: str) -> Turns:
    """From the root of a tree along the reply of the best rank, to the last of the assistant.

    Deleted and refused messages are left out. Ranks start from 0, the best; a reply without a rank
    follows those with one.
    """
    if not isinstance(value, dict):
        raise BadRow("not a tree", f"'{name}' is {shorten(value)}; give {{text, role, replies}}")
    turns, node = [], value
    while node is not None:
        turns.append({"role": node.get("role"), "content": node.get("text")})
        replies = [reply for reply in node.get("replies") or [] if _is_usable(reply)]
        node = min(replies, key=_rank, default=None)
    turns = [_with_role(turn) for turn in turns]
    while turns and turns[-1]["role"] == "user":
        turns.pop()
    if not turns:
        raise BadRow("no answered turn", f"'{name}' has no reply of the assistant; drop the tree")
    return _in_order(turns, name)


def _is_usable(reply: Any) -> bool:
    return (
        isinstance(reply, dict)
        and not reply.get("deleted")
        and reply.get("review_result") is not False
    )


def _rank(reply: dict[str, Any]) -> float:
    rank = reply.get("rank")
    return float("inf") if rank is None else float(rank)


def _joined(parts: list[Any], name: str) -> str:
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            detail = f"'{name}' has the part {shorten(part)}; keep parts of type text"
            raise BadRow("content not text", detail)
    return "".join(part["text"] for part in parts)


def _with_role(turn: Any) -> Any:
    """The turn with the role that its speaker has."""
    if not isinstance(turn, dict) or not isinstance(turn.get("role"), str):
        return turn
    return turn | {"role": _SPEAKERS.get(turn["role"], turn["role"])}


def _in_order(turns: Turns, name: str) -> Turns:
    """BadRow unless a user and the assistant take turns, after a system turn or none."""
    roles = [turn.get("role") if isinstance(turn, dict) else None for turn in turns]
    if not roles or not set(roles) <= {"system", "user", "assistant"}:
        return turns
    if roles[-1] != "assistant":
        raise BadRow(
            "last turn not the assistant's",
            f"'{name}' ends with a turn of the {roles[-1]}; end it with the answer",
        )
    spoken = roles[1:] if roles[0] == "system" else roles
    wrong = next((i for i, role in enumerate(spoken) if role != ("user", "assistant")[i % 2]), None)
    if wrong is not None:
        place = wrong + len(roles) - len(spoken)
        raise BadRow(
            "broken role order",
            f"'{name}[{place}]' is a turn of the {roles[place]}; let user and assistant take turns "
            "after one system turn or none",
        )
    return turns


class _Form(NamedTuple):
    settings: dict[str, Any]
    turns: Callable[[Any, str], Turns] | None = None


_FORMS: dict[Preset, _Form] = {
    "alpaca": _Form(
        {
            "question_jinja": "{{ instruction }}{% if input %}\n\n{{ input }}{% endif %}",
            "answer_field": "output",
        }
    ),
    "prompt_completion": _Form({"question_field": "prompt", "answer_field": "completion"}),
    "nq_open": _Form({"question_field": "question", "answer_field": "answer"}),
    "commonsenseqa": _Form({"question_jinja": _CHOICES, "answer_field": "answerKey"}),
    "messages": _Form({}, _messages),
    "sharegpt": _Form({"messages_field": "conversations"}, _sharegpt),
    "oasst": _Form({"messages_field": "prompt"}, _oasst),
}
