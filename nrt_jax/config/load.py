"""Config files: YAML that extends other YAML, dotted overrides, one-line errors, one resolved dump.

Each section is a subclass of `Section` in a file of its own; this module knows none of them.
"""

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, TypeVar, Union, get_args, get_origin

import yaml
from annotated_types import Le, Lt
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from nrt_jax.config.mistakes import OVERRIDE, QUOTES, describe, one_line, sections_of, show
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
        raise InputError(describe(error, schema, layer.values, layer.sources, name)) from None


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
        raise InputError(f"{path}: {show(values)}: must be a mapping of keys to values")
    layer = _EMPTY
    for parent in _parents(values.pop("extends", []), path):
        layer = _merge(layer, _read_file(parent, (*chain, path)))
    return _merge(layer, _Layer(values, dict.fromkeys(_key_paths(values), str(path))))


def _parents(extends: Any, path: Path) -> list[Path]:
    names = [extends] if isinstance(extends, str) else extends
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{path}: extends={show(extends)}: must be a path or a list of paths")
    return [find_config(_beside(path, name), name) for name in names]


def _beside(path: Path, name: str) -> Path:
    try:
        return Path(os.path.normpath(path.parent / local_path(name)))
    except ValueError as error:
        raise InputError(f"{path}: extends={show(name)}: {error}") from None


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
        raise InputError(f"{OVERRIDE} {override}: must look like section.field=value")
    kinds = _field_kinds(names, schema)
    texts = kinds - {kind for kind in kinds if get_origin(kind) is tuple}
    if texts and texts <= {str, Path, None}:
        values = _override_list(text) if texts < kinds else None
        values = values or _override_text(text, texts)
    else:
        values = _parse(text, Path(), f"{OVERRIDE} {override}")
    for name in reversed(names):
        values = {name: values}
    return _Layer(values, dict.fromkeys(_key_paths(values), OVERRIDE))


def _override_text(text: str, kinds: set[Any]) -> str | None:
    """The value of a field that takes text or null: as it is typed, without quotes around it.

    So [x], {x}, *x, #x, 5 and true, which are no text in YAML, are text here.
    """
    if NULL.fullmatch(text) and not (text and kinds == {str}):
        return None
    if text[:1] in ("'", '"'):
        try:
            quoted = _parse(text, Path(), OVERRIDE)
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
        value = _parse(text, Path(), OVERRIDE)
    except InputError:
        return None
    return value if isinstance(value, list) else None


def _field_kinds(names: Sequence[str], schema: type[Section]) -> set[Any]:
    """What a field takes: str (also for a choice of names), Path, None, or another annotation."""
    *outer, last = names
    sections = [schema]
    for name in outer:
        fields = [part.model_fields[name] for part in sections if name in part.model_fields]
        sections = [part for field in fields for part in sections_of(field.annotation)]
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
        if name.startswith(OVERRIDE):
            raise InputError(f"{name}: must be YAML: {error.problem}; {QUOTES}") from None
        line = f"line {mark.line + 1}: " if mark else ""
        raise InputError(f"{name}: {line}must be YAML: {error.problem}") from None
    except yaml.YAMLError as error:
        raise InputError(f"{name}: must be YAML: {one_line(str(error))}") from None
    except RecursionError:
        raise InputError(f"{name}: must be YAML: nested too deeply") from None
