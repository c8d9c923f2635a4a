"""From the fields of a row as it stands in a file to those that the config reads."""

import json
import re
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import jinja2
import jinja2.meta
import jinja2.sandbox

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow, shorten
from nrt_jax.data.row_presets import turns_reader
from nrt_jax.errors import InputError

_PATH = re.compile(r"[^.\[\]]+(\.[^.\[\]]+|\[-?\d+\])*")
_STEP = re.compile(r"[^.\[\]]+|\[-?\d+\]")
_WHOLE_ROW = "row"
"""Name in Jinja of all fields of the row, for those whose names are no names of Jinja."""


class RowFields:
    """The reader of one source's rows, whose preset `with_preset` has resolved.

    Raises InputError for an expression that is not Jinja.
    """

    def __init__(self, config: DataConfig):
        self._config = config
        self._chat = config.template != "plain"
        self._turns = turns_reader(config)
        self._question = _jinja(config.question_jinja, "question_jinja")
        self._answer = _jinja(config.answer_jinja, "answer_jinja")

    def columns(self, names: Sequence[str]) -> tuple[str, ...]:
        """Those of the columns `names` that are read: of chats the messages, else both sides."""
        config = self._config
        own = () if config.source_field is None else (root_of(config.source_field, names),)
        if self._reads_messages(names):
            return (root_of(config.messages_field, names), *own)
        question = _roots(self._question, config.question_field, names)
        return (*question, *_roots(self._answer, config.answer_field, names), *own)

    def read(self, fields: dict) -> dict:
        """The row with the values that the config's names stand for; BadRow where it has none.

        A name that leads nowhere, such as 'answer' of a row without one, is left to be refused with
        what the row has.
        """
        config, result = self._config, dict(fields)
        if config.source_field is not None:
            result[config.source_field] = value_of(fields, config.source_field)
        if self._reads_messages(fields):
            turns = value_of(fields, config.messages_field)
            if self._turns is not None:
                turns = self._turns(turns, config.messages_field)
            result[config.messages_field] = self._stripped_turns(turns)
            return result
        if self._chat:
            # The question's own expression goes before the turns.
            result.pop(config.messages_field, None)
        for make, name in ((self._question, "question_field"), (self._answer, "answer_field")):
            field = getattr(config, name)
            if make is not None:
                result[field] = make.of(fields)
            elif field in fields or _leads(field):
                result[field] = value_of(fields, field)
        if config.answer_field in result:
            result[config.answer_field] = self._stripped(result[config.answer_field])
        return result

    def _reads_messages(self, names: Collection[str]) -> bool:
        if not self._chat or self._question is not None:
            return False
        return self._turns is not None or root_of(self._config.messages_field, names) in names

    def _stripped_turns(self, turns: Any) -> Any:
        if not self._config.strip_suffixes or not isinstance(turns, list):
            return turns
        return [
            turn | {"content": self._stripped(turn.get("content"))}
            if isinstance(turn, dict) and turn.get("role") == "assistant"
            else turn
            for turn in turns
        ]

    def _stripped(self, answer: Any) -> Any:
        if isinstance(answer, list):
            return [self._stripped(one) for one in answer]
        if isinstance(answer, str):
            for suffix in self._config.strip_suffixes:
                answer = answer.removesuffix(suffix)
        return answer


# --- paths ---------------------------------------------------------------------------------------


def _leads(field: str) -> bool:
    """Whether a name leads into a field, as in question.stem and answers[0]."""
    return _PATH.fullmatch(field) is not None and len(_STEP.findall(field)) > 1


def root_of(field: str, names: Collection[str]) -> str:
    """The field of a row that a name or path starts from."""
    return field if field in names or not _leads(field) else _STEP.findall(field)[0]


def value_of(fields: dict, field: str) -> Any:
    """The value of a field by its name, or by the path that its name is."""
    if field in fields:
        return fields[field]
    value: Any = fields
    so_far = ""
    for step in _STEP.findall(field) if _leads(field) else [field]:
        inside = value
        try:
            value = inside[int(step[1:-1])] if step.startswith("[") else inside[step]
        except (KeyError, IndexError, TypeError):
            has = ", ".join(map(repr, list(fields)[:5])) or "none"
            where = f"'{so_far}' is {shorten(inside)}" if so_far else f"it has {has}"
            raise BadRow(
                f"without '{field}'", f"field '{field}' is missing ({where}); add it"
            ) from None
        so_far += step if step.startswith("[") or not so_far else f".{step}"
    return value


# --- Jinja ---------------------------------------------------------------------------------------


class _Jinja:
    """A template that writes text, or an expression with a value."""

    def __init__(self, text: str, name: str):
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        )
        environment.filters["fromjson"] = json.loads
        self._name = f"data.{name}"
        is_template = "{{" in text or "{%" in text
        try:
            source = text if is_template else f"{{{{ {text} }}}}"
            self.fields = jinja2.meta.find_undeclared_variables(environment.parse(source))
            self._make: Callable[..., Any] = (
                environment.from_string(text).render
                if is_template
                else environment.compile_expression(text, undefined_to_none=False)
            )
        except jinja2.TemplateSyntaxError as error:
            raise InputError(
                f"{self._name}={shorten(text)}: not Jinja ({error.message}); correct it"
            ) from error

    def of(self, fields: dict) -> Any:
        """What it makes of a row."""
        try:
            value = self._make({_WHOLE_ROW: fields} | fields)
            if isinstance(value, jinja2.Undefined):
                str(value)  # raises what is undefined
        except Exception as error:  # a template is a program, and can fail in any way that one can
            reason = " ".join(str(error).split()) or type(error).__name__
            has = ", ".join(map(repr, list(fields)[:5])) or "none"
            raise BadRow(
                f"refused by {self._name}",
                f"{self._name}: {reason} (the row has {has}); correct it or drop the row",
            ) from error
        return list(value) if isinstance(value, Iterator) else value


def _jinja(text: str | None, name: str) -> _Jinja | None:
    return None if text is None else _Jinja(text, name)


def _roots(make: _Jinja | None, field: str, names: Sequence[str]) -> tuple[str, ...]:
    """The columns that one side reads; of Jinja those that are there, since it may ask for them."""
    if make is None:
        return (root_of(field, names),)
    if _WHOLE_ROW in make.fields:
        return tuple(dict.fromkeys(names))
    found = tuple(name for name in dict.fromkeys(names) if name in make.fields)
    return found or tuple(sorted(make.fields))
