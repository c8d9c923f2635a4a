"""Resolved configs and their JSON schema by dotted keys, which renames can be applied to."""

from collections.abc import Iterator
from typing import Any


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, by dotted keys."""
    result = {}
    for key, value in values.items():
        below = isinstance(value, dict) and value
        result |= flat(value, f"{prefix}{key}.") if below else {f"{prefix}{key}": value}
    return result


def schema_fields(schema: dict[str, Any]) -> dict[str, Any]:
    """Every field of a JSON schema by its dotted key: type, bounds and default.

    Descriptions, titles and the names of definitions are left out, and so are the defaults of
    sections, which their fields repeat.
    """
    return dict(_fields(schema, schema.get("$defs", {}), ""))


def _fields(section: Any, definitions: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for name, field in section["properties"].items():
        key = prefix + name
        options = [_resolved(option, definitions) for option in field.get("anyOf", [field])]
        sections = [option for option in options if "properties" in option]
        for below in sections:
            yield from _fields(below, definitions, f"{key}.")
        if not sections or len(options) > 1:
            yield key, _bare(field, definitions)


def _bare(value: Any, definitions: Any) -> Any:
    """A schema with its references put in, and without what is said for readers only."""
    if isinstance(value, list):
        return [_bare(item, definitions) for item in value]
    if not isinstance(value, dict):
        return value
    resolved = _resolved(value, definitions)
    if "properties" in resolved:
        return "section"
    told = {k: v for k, v in resolved.items() if k not in ("description", "title", "$ref")}
    return {key: _bare(item, definitions) for key, item in told.items()}


def _resolved(schema: Any, definitions: Any) -> Any:
    if "$ref" not in schema:
        return schema
    return definitions[schema["$ref"].rsplit("/", 1)[1]] | schema
