"""YAML to Python values and back, with the scalars of YAML 1.2 and no key twice.

PyYAML reads YAML 1.1, in which 1e-5 and 08 are strings, 010 is 8, 1:30 is 90 and `no` is false.
Here they are read as in YAML 1.2; every other plain scalar is a string, which pydantic validates.
"""

import re
from pathlib import Path
from typing import Any

import yaml

NULL = re.compile(r"~|null|Null|NULL|")
_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]{0,99})")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_INF_NAN = re.compile(r"([-+]?)\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class Text(str):
    """A string of a config, with the directory that it starts from if it is a relative path."""

    directory: Path

    @classmethod
    def of(cls, text: str, directory: Path) -> "Text":
        """`text` with its directory."""
        result = cls(text)
        result.directory = directory
        return result


class Dumper(yaml.SafeDumper):
    """Quotes strings that only YAML 1.2 reads as numbers, and escapes control characters."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # Only double quotes keep every character: elsewhere U+0085 reads back as a space.
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


Dumper.add_representer(str, _represent_text)
Dumper.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"(?:{_FLOAT.pattern})$"), None)


def read_yaml(text: str, directory: Path) -> Any:
    """The Python value of a YAML document, each string with its directory.

    Raises yaml.YAMLError, and RecursionError for a document that is nested too deeply.
    """
    node = yaml.compose(text, Loader=yaml.BaseLoader)
    return None if node is None else _plain(node, directory)


def _plain(node: yaml.Node, directory: Path) -> Any:
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, directory)
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item, directory) for item in node.value]
    if node.tag != yaml.BaseLoader.DEFAULT_SCALAR_TAG or not isinstance(node, yaml.ScalarNode):
        raise yaml.MarkedYAMLError(
            problem=f"unknown tag {node.tag!r}", problem_mark=node.start_mark
        )
    return _scalar(node.value, directory, quoted=node.style is not None)


def _mapping(node: yaml.MappingNode, directory: Path) -> dict[str, Any]:
    result = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise yaml.MarkedYAMLError(
                problem="a key that is no name", problem_mark=key_node.start_mark
            )
        if key_node.value in result:
            problem = f"the key {key_node.value!r} occurs twice"
            raise yaml.MarkedYAMLError(problem=problem, problem_mark=key_node.start_mark)
        result[key_node.value] = _plain(value_node, directory)
    return result


def _scalar(text: str, directory: Path, *, quoted: bool) -> Any:
    if not quoted:
        if NULL.fullmatch(text):
            return None
        if _BOOL.fullmatch(text):
            return text.lower() == "true"
        if _INT.fullmatch(text):
            return int(text)
        if _FLOAT.fullmatch(text):
            return float(text)
        if _INF_NAN.fullmatch(text):
            return float(text.replace(".", ""))
    return Text.of(text, directory)
