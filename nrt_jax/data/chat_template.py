"""From a row's fields to the prompt x, as texts and control tokens, and the reference answer y*."""

from typing import Any, NamedTuple

import jinja2

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.control_split import ControlSplit, Text, unmark
from nrt_jax.data.template_source import compile_template, template_text
from nrt_jax.data.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")

Messages = list[dict[str, str]]


class Rendered(NamedTuple):
    """One row as text."""

    prompt: tuple[int | Text, ...]
    """x: texts, and ids of control tokens where these stand."""
    question: str
    """x as one text, without the beginning-of-sequence token in front."""
    answer: str
    """y*, without the end-of-sequence token."""


class PromptTemplate:
    """The template of one config, for one tokenizer.

    plain: x is the question as it is. Else x is what the chat template makes of all turns before
    the last assistant turn, with the header of the turn to come; that turn is y*. A row without
    messages is a conversation of its question.

    Raises InputError when the config's template cannot be read.
    """

    def __init__(self, config: DataConfig, tokenizer: Tokenizer):
        self._config = config
        self._roles = tokenizer.roles
        self._bos_id = tokenizer.bos_id
        self._bos = "" if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
        source = template_text(config, tokenizer.directory)
        self._template = None if source is None else compile_template(*source)
        self._controls = ControlSplit(tokenizer)

    @property
    def is_chat(self) -> bool:
        """Whether there is a chat template."""
        return self._template is not None

    def render(self, fields: dict) -> Rendered:
        """Apply the template to a row; BadRow when it lacks what the template needs."""
        config = self._config
        if self._template is not None and config.messages_field in fields:
            messages, answer = _read_messages(fields[config.messages_field], config.messages_field)
            return self._render_chat(self._template, messages, answer)
        question = _text(fields, config.question_field)
        answer = _text(fields, config.answer_field)
        if self._template is not None:
            messages = [{"role": "user", "content": question}]
            return self._render_chat(self._template, messages, answer)
        bos = () if self._bos_id is None or not config.add_bos else (self._bos_id,)
        return Rendered((*bos, Text(question, starts=True)), question, answer)

    def _render_chat(self, template: jinja2.Template, messages: Messages, answer: str) -> Rendered:
        marked = [turn | {"content": self._controls.mark(turn["content"])} for turn in messages]
        body = render_template(template, marked, self._roles).removeprefix(self._bos)
        if self._bos and body.lstrip().startswith(self._bos):
            raise BadRow(
                "begins twice",
                f"the chat template writes {self._bos} twice, or after white space; let it begin "
                "with one or with none",
            )
        pieces = self._controls.split(self._bos + body if self._config.add_bos else body)
        return Rendered(pieces, unmark(body), answer)


def render_template(template: jinja2.Template, messages: Messages, roles: dict[str, str]) -> str:
    """What the template makes of `messages` and the header of the next turn.

    Raises BadRow with the template's own words when it refuses them.
    """
    names: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": True}
    try:
        return template.render(messages=messages, **names, **roles)
    except Exception as error:  # a template is a program, and can fail in any way that one can
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRow(
            "refused by the template", f"the chat template refuses the row: {reason}"
        ) from error


def _read_messages(messages: object, field: str) -> tuple[Messages, str]:
    """The turns before the last assistant turn, and what that turn says."""
    if not isinstance(messages, list):
        raise BadRow(
            "messages not a list", f"'{field}' is {shorten(messages)}; give a list of turns"
        )
    turns = [_turn(message, f"{field}[{i}]") for i, message in enumerate(messages)]
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    if not answers or answers[-1] == 0:
        raise BadRow(
            "no answered turn",
            f"'{field}' has no assistant turn after another turn; give at least user, assistant",
        )
    return turns[: answers[-1]], turns[answers[-1]]["content"]


def _turn(message: object, name: str) -> dict[str, str]:
    if not isinstance(message, dict):
        raise BadRow("bad turn", f"'{name}' is {shorten(message)}; give {{role, content}}")
    role = message.get("role")
    if role not in ROLES:
        raise BadRow("bad role", f"'{name}.role' is {shorten(role)}; use {', '.join(ROLES)}")
    # An empty system turn is common, and says nothing wrong.
    content = _text(message, "content", f"{name}.content", may_be_empty=role == "system")
    return {"role": role, "content": content}


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
