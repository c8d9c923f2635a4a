"""One line for what is wrong in a config: the source, the key, the value and the remedy."""

import json
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

OVERRIDE = "override"
"""The source of what was given on the command line."""
QUOTES = (
    "put double quotes around a text that YAML reads as something else, and single quotes around "
    """the whole for the shell, such as 'section.field=["[x]"]'"""
)

Sources = Mapping[tuple[str, ...], str]
"""What set each key last: OVERRIDE or the name of a file."""


def describe(
    error: ValidationError,
    schema: type[BaseModel],
    values: Mapping[str, Any],
    sources: Sources,
    name: str,
) -> str:
    """One line for the first mistake; unknown keys come first, since they often cause the rest."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    keys = _keys(first["loc"], values)
    dotted = ".".join(keys)
    if first["type"] == "missing":
        dotted = ".".join([*keys, str(first["loc"][-1])])
        return f"{name}: {dotted}: required; set it in the file or with {dotted}=VALUE"
    source = _source(keys, sources, name)
    value = "" if isinstance(first["input"], dict | BaseModel) else f"={show(first['input'])}"
    if first["type"] == "extra_forbidden":
        value = value if source == OVERRIDE else ""
        return _place(source, dotted + value) + _unknown_key(keys, schema)
    # A value may fail each member of a union; together the messages say what is allowed.
    same = [detail for detail in details if _keys(detail["loc"], values) == keys]
    messages = list(dict.fromkeys(_message(detail) for detail in same))
    others = [message.removeprefix("must be ") for message in messages[1:]]
    message = " or ".join([messages[0], *others])
    if "a valid string" in message and not isinstance(first["input"], str | None):
        message += f"; {QUOTES}" if source == OVERRIDE else "; put it in quotes"
    return _place(source, dotted + value) + message


def _keys(loc: tuple[int | str, ...], values: Any) -> list[str]:
    """The keys of an error's location, without the names of union members that pydantic adds."""
    keys = []
    for part in loc:
        children: Any = dict(enumerate(values)) if isinstance(values, list) else values
        if isinstance(children, dict) and part in children:
            keys.append(str(part))
            values = children[part]
    return keys


def _source(keys: list[str], sources: Sources, name: str) -> str:
    prefixes = (tuple(keys[:end]) for end in range(len(keys), 0, -1))
    return next((sources[prefix] for prefix in prefixes if prefix in sources), name)


def _place(source: str, key: str) -> str:
    if source == OVERRIDE:
        return f"{source} {key}: "
    return f"{source}: {key}: " if key else f"{source}: "


_TYPES = {
    "model_type": "mapping",
    "dict_type": "mapping",
    "path_type": "path",
    "tuple_type": "list, such as [a, b]",
}


def _message(detail: Any) -> str:
    if detail["type"] in _TYPES:
        return f"must be a {_TYPES[detail['type']]}"
    if detail["type"] == "value_error":
        return one_line(str(detail["ctx"]["error"]))
    return one_line(detail["msg"].replace("Input should ", "must ").split(", unable to parse")[0])


def _unknown_key(keys: list[str], schema: type[BaseModel]) -> str:
    sections = [schema]
    for key in keys[:-1]:
        fields = [part.model_fields[key] for part in sections if key in part.model_fields]
        # The index of a list or the key of a dictionary is no field: the sections stay the same.
        sections = [part for field in fields for part in sections_of(field.annotation)] or sections
    names = list(dict.fromkeys(name for section in sections for name in section.model_fields))
    near = get_close_matches(keys[-1], names, n=1)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; must be one of {', '.join(names)}"


def sections_of(annotation: Any) -> list[type[BaseModel]]:
    """The config classes that a field's annotation allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_of(part)]


def show(value: Any) -> str:
    """A value as a line of text, cut where it is long."""
    plain = isinstance(value, str) and value.isprintable()
    text = value if plain else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def one_line(text: str) -> str:
    """The text with single spaces for its line breaks."""
    return " ".join(text.split())
