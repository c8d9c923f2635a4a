"""Config files: YAML that extends other YAML, dotted overrides, one-line errors, one resolved dump.

Each section is a subclass of `Section` in a file of its own; this module knows none of them.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from nrt_jax.config.paths import local_path
from nrt_jax.config.presets import find_config, suggest_preset
from nrt_jax.config.yaml_values import NULL, Dumper, Text, read_yaml
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import check_text, read_head, why_missing

MOST_TOKENS, MOST_SLOTS = 2**24, 2**16
"""Upper bounds of a sequence's tokens and of sequences at once: sums and products of their sizes
are indices in int32."""


class Section(BaseModel):
    """Base of every config class: frozen, no unknown keys, fields described by their docstrings."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        validate_default=True,
        use_attribute_docstrings=True,
    )

    @field_validator("*", mode="after")
    @classmethod
    def _fits_int32(cls, value: Any, info: Any) -> Any:
        """Integers reach the devices as int32, unless a field has an upper bound of its own."""
        if type(value) is not int or -(2**31) <= value < 2**31:
            return value
        bounds = cls.model_fields[info.field_name].metadata
        if any(isinstance(bound, Le | Lt) for bound in bounds):
            return value
        raise ValueError(f"must be {-(2**31)} to {2**31 - 1}")


S = TypeVar("S", bound=Section)


def _local(value: Any) -> Any:
    return local_path(value) if isinstance(value, str | Path) else value


def resolve_path(value: Any) -> Any:
    """The whole path of a text, from the directory of the file that it stands in."""
    if not isinstance(value, str | Path):
        return value
    directory = value.directory if isinstance(value, Text) else Path()
    return Path(os.path.abspath(directory / local_path(value)))


LocalPath = Annotated[Path, BeforeValidator(_local)]
"""A path relative to the working directory, wherever it is named."""
ConfigPath = Annotated[Path, BeforeValidator(resolve_path)]
"""A path relative to the YAML file that names it; in an override, to the working directory."""


def _no_switch(value: Any) -> Any:
    """An override is text, and a folder with the name of a switch is hardly meant."""
    if str(value).lower() in ("false", "true", "no", "yes", "on", "none", "null", "0", "1"):
        raise ValueError("must be 'auto' or 'off' or a folder")
    return value


CacheFolder = Annotated[
    Literal["auto", "off"] | ConfigPath,
    Field(union_mode="left_to_right"),
    BeforeValidator(_no_switch),
]
"""auto for a folder in that of the user's cache, off for none, or a folder."""


class _Layer(NamedTuple):
    """Merged values, and the source that set each key last."""

    values: dict[str, Any]
    sources: dict[tuple[str, ...], str]


_EMPTY = _Layer({}, {})
_OVERRIDE = "override"
_QUOTES = (
    "put double quotes around a text that YAML reads as something else, and single quotes around "
    """the whole for the shell, such as 'section.field=["[x]"]'"""
)


def load_config(schema: type[S], paths: Sequence[Path], overrides: Sequence[str] = ()) -> S:
    """Merge the files left to right, then the overrides `section.field=value`, and validate.

    Mappings merge deep, everything else replaces. A file may name others in `extends` (a path or a
    list, relative to the file); its own keys win over theirs. In both places a preset may be named
    instead of a file. Raises InputError.
    """
    layer = _EMPTY
    for path in paths:
        layer = _merge(layer, _read_file(find_config(Path(path), str(path)), chain=()))
    for override in overrides:
        layer = _merge(layer, _read_override(override, schema))
    try:
        return schema.model_validate(layer.values)
    except ValidationError as error:
        name = str(paths[-1]) if paths else "config"
        raise InputError(_describe(error, schema, layer, name)) from None


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of nested dictionaries by dotted key."""
    values: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            values |= flat(value, f"{prefix}{key}.")
        else:
            values[prefix + key] = value
    return values


def dump_config(config: Section) -> str:
    """The whole config as YAML that load_config reads back to an equal config."""
    values = config.model_dump(mode="json")
    return yaml.dump(values, Dumper=Dumper, sort_keys=False, allow_unicode=True)


def config_schema(schema: type[Section]) -> dict[str, Any]:
    """The JSON schema of a config file, for editors.

    No key is required in it, since a file may leave it to the files that it extends.
    """
    result = schema.model_json_schema()
    for part in (result, *result.get("$defs", {}).values()):
        part.pop("required", None)
    path = {"type": "string", "format": "path"}
    result["properties"]["extends"] = {
        "description": "Presets, or files relative to this one, that its own keys are merged into.",
        "anyOf": [path, {"type": "array", "items": path}],
    }
    return result


# --- sources -------------------------------------------------------------------------------------


def _read_file(path: Path, chain: tuple[Path, ...]) -> _Layer:
    """The file merged onto those that it extends; `chain` holds the files that extend this one."""
    if path.resolve() in [link.resolve() for link in chain]:
        cycle = " -> ".join(str(link) for link in (*chain, path))
        raise InputError(f"{chain[-1]}: extends={path}: must not lead back to itself: {cycle}")
    values = _parse(_read_text(path, chain), path.parent, str(path))
    if values is None:
        return _EMPTY
    if not isinstance(values, dict):
        raise InputError(f"{path}: {_show(values)}: must be a mapping of keys to values")
    layer = _EMPTY
    for parent in _parents(values.pop("extends", []), path):
        layer = _merge(layer, _read_file(parent, (*chain, path)))
    return _merge(layer, _Layer(values, dict.fromkeys(_key_paths(values), str(path))))


def _parents(extends: Any, path: Path) -> list[Path]:
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: extends={_show(extends)}: must be a path or a list of paths")
    return [find_config(_beside(path, name), name) for name in names]


def _beside(path: Path, name: str) -> Path:
    try:
        return Path(os.path.normpath(path.parent / local_path(name)))
    except ValueError as error:
        raise InputError(f"{path}: extends={_show(name)}: {error}") from None


def _read_text(path: Path, chain: tuple[Path, ...]) -> str:
    origin = f" (extended by {chain[-1]})" if chain else ""
    check_text(path, read_head(path))
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        reason = why_missing(path) if path.is_symlink() else f"no such config file{origin}"
        raise InputError(f"{path}: {reason}{_meant(path)}") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}{origin}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: must be UTF-8 text; byte {error.start} is not") from None


def _meant(path: Path) -> str:
    """The end of an error about a missing file: an override without its sign, or a preset."""
    if re.fullmatch(r"[a-z_]+(\.[a-z_]+)+", str(path)) and path.suffix not in (".yaml", ".yml"):
        return f"; an override is written {path}=VALUE"
    return suggest_preset(path)


def _read_override(override: str, schema: type[Section]) -> _Layer:
    key, equals, text = override.partition("=")
    names = key.split(".")
    if not equals or not all(names):
        raise InputError(f"{_OVERRIDE} {override}: must look like section.field=value")
    kinds = _field_kinds(names, schema)
    texts = kinds - {kind for kind in kinds if get_origin(kind) is tuple}
    if texts and texts <= {str, Path, None}:
        values = _override_list(text) if texts < kinds else None
        values = values or _override_text(text, texts)
    else:
        values = _parse(text, Path(), f"{_OVERRIDE} {override}")
    for name in reversed(names):
        values = {name: values}
    return _Layer(values, dict.fromkeys(_key_paths(values), _OVERRIDE))


def _override_text(text: str, kinds: set[Any]) -> str | None:
    """The value of a field that takes text or null: as it is typed, without quotes around it.

    So [x], {x}, *x, #x, 5 and true, which are no text in YAML, are text here.
    """
    if NULL.fullmatch(text) and not (text and kinds == {str}):
        return None
    if text[:1] in ("'", '"'):
        try:
            quoted = _parse(text, Path(), _OVERRIDE)
        except InputError:
            quoted = None
        if isinstance(quoted, str):
            return quoted
    return Text.of(text, Path())


def _override_list(text: str) -> list[Any] | None:
    """The value of a field that also takes a list, where it is one in YAML: [a, b] but not [ab]*.x.

    A name in brackets is written in quotes.
    """
    if not (text.startswith("[") and text.endswith("]")):
        return None
    try:
        value = _parse(text, Path(), _OVERRIDE)
    except InputError:
        return None
    return value if isinstance(value, list) else None


def _field_kinds(names: Sequence[str], schema: type[Section]) -> set[Any]:
    """What a field takes: str (also for a choice of names), Path, None, or another annotation."""
    *outer, last = names
    sections = [schema]
    for name in outer:
        fields = [part.model_fields[name] for part in sections if name in part.model_fields]
        sections = [part for field in fields for part in _sections(field.annotation)]
    fields = [part.model_fields[last] for part in sections if last in part.model_fields]
    return {kind for field in fields for kind in _kinds(field.annotation)}


def _kinds(annotation: Any) -> set[Any]:
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, UnionType):
        return {kind for part in get_args(annotation) for kind in _kinds(part)}
    if origin is Literal:
        return {type(value) for value in get_args(annotation)}
    return {None if annotation is NoneType else annotation}


def _merge(base: _Layer, top: _Layer) -> _Layer:
    return _Layer(_merge_values(base.values, top.values), base.sources | top.sources)


def _merge_values(base: Any, top: Any) -> Any:
    if not isinstance(base, dict) or not isinstance(top, dict):
        return top
    return base | {
        key: _merge_values(base[key], value) if key in base else value for key, value in top.items()
    }


def _key_paths(values: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (key,)
        if isinstance(value, dict):
            yield from ((key, *rest) for rest in _key_paths(value))


def _parse(text: str, directory: Path, name: str) -> Any:
    """The Python value of a YAML document; InputError, with the line in a file, when it is none."""
    try:
        return read_yaml(text, directory)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        if name.startswith(_OVERRIDE):
            raise InputError(f"{name}: must be YAML: {error.problem}; {_QUOTES}") from None
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{name}: {line}must be YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{name}: must be YAML: {_one_line(str(error))}") from None
    except RecursionError:
        raise InputError(f"{name}: must be YAML: nested too deeply") from None


# --- errors --------------------------------------------------------------------------------------


def _describe(error: ValidationError, schema: type[Section], layer: _Layer, name: str) -> str:
    """One line for the first mistake; unknown keys come first, since they often cause the rest."""
    details = sorted(error.errors(), key=lambda detail: detail["type"] != "extra_forbidden")
    first = details[0]
    keys = _keys(first["loc"], layer.values)
    dotted = ".".join(keys)
    if first["type"] == "missing":
        dotted = ".".join([*keys, str(first["loc"][-1])])
        return f"{name}: {dotted}: required; set it in the file or with {dotted}=VALUE"
    source = _source(keys, layer, name)
    value = "" if isinstance(first["input"], dict | Section) else f"={_show(first['input'])}"
    if first["type"] == "extra_forbidden":
        value = value if source == _OVERRIDE else ""
        return _place(source, dotted + value) + _unknown_key(keys, schema)
    # A value may fail each member of a union; together the messages say what is allowed.
    same = [detail for detail in details if _keys(detail["loc"], layer.values) == keys]
    messages = list(dict.fromkeys(_message(detail) for detail in same))
    others = [message.removeprefix("must be ") for message in messages[1:]]
    message = " or ".join([messages[0], *others])
    if "a valid string" in message and not isinstance(first["input"], str | None):
        message += f"; {_QUOTES}" if source == _OVERRIDE else "; put it in quotes"
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


def _source(keys: list[str], layer: _Layer, name: str) -> str:
    prefixes = (tuple(keys[:end]) for end in range(len(keys), 0, -1))
    return next((layer.sources[prefix] for prefix in prefixes if prefix in layer.sources), name)


def _place(source: str, key: str) -> str:
    if source == _OVERRIDE:
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
        return _one_line(str(detail["ctx"]["error"]))
    return _one_line(detail["msg"].replace("Input should ", "must ").split(", unable to parse")[0])


def _unknown_key(keys: list[str], schema: type[Section]) -> str:
    sections = [schema]
    for key in keys[:-1]:
        fields = [part.model_fields[key] for part in sections if key in part.model_fields]
        # The index of a list or the key of a dictionary is no field: the sections stay the same.
        sections = [part for field in fields for part in _sections(field.annotation)] or sections
    names = list(dict.fromkeys(name for section in sections for name in section.model_fields))
    near = get_close_matches(keys[-1], names, n=1)
    if near:
        return f"unknown key; did you mean {near[0]!r}?"
    return f"unknown key; must be one of {', '.join(names)}"


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _show(value: Any) -> str:
    plain = isinstance(value, str) and value.isprintable()
    text = value if plain else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _one_line(text: str) -> str:
    return " ".join(text.split())
