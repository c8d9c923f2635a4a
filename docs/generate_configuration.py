"""Write docs/configuration.md, the reference of all config keys, from the schema: `make docs`."""

import types
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo

from nrt_jax.config.load import Section
from nrt_jax.config.run import RunConfig
from nrt_jax.config.serving import ServingConfig

TARGET = Path(__file__).with_name("configuration.md")
BOUNDS = {Ge: ("≥", "ge"), Gt: (">", "gt"), Le: ("≤", "le"), Lt: ("<", "lt")}
TYPES = {bool: "true, false", int: "integer", float: "number", str: "text", Path: "path"}

INTRODUCTION = """\
# Configuration reference

Made from the schema by `make docs`; edit the descriptions in [nrt_jax/config](../nrt_jax/config),
which has one file per section.

A config is one or more YAML files or presets, merged from left to right, followed by overrides:

```bash
nrt-jax config show quickstart/nrt methods/nrt_gm train.steps=10
nrt-jax config schema
```

- A preset is a file in [configs](../configs), named by its path there, with or without `.yaml`. It
  is part of the installed package. A file of the same name wins over the preset.
- `extends: other.yaml`, or a list, merges other files, relative to the file that names them, or
  presets. A file's own keys win over those; mappings merge, everything else replaces.
- An override is `section.field=value`, before, between or after the options of the command. The
  value is YAML, so `null`, `1e-5` and `[a, b]` work; for a field of text or a path it is the text
  as typed, so `data.think_start=[control_12]` works too. In a list, a text that YAML reads as
  something else needs double quotes, and the shell single ones:
  `'rollout.stop_tokens=["[control_12]"]'`.
- A path in a file starts from the directory of that file, a path in an override from the working
  directory; `run_dir` always starts from the working directory.
- An unknown key, a value out of range and a clash between two settings are errors of one line that
  name the file or the override, the key, the value and what is allowed. An integer without an upper
  bound in the tables is below 2³¹.
- A run directory holds the resolved config as `config.yaml`; training from it repeats the run.

The settings of `nrt-jax serve` are not part of a run's config: they are given on its command line,
as `field=value`. The [last table](#nrt-jax-serve) lists them.
"""


def render() -> str:
    """The whole page as Markdown."""
    parts = [INTRODUCTION, *_section("", RunConfig), *_section("nrt-jax serve", ServingConfig)]
    return "\n".join(parts)


def _section(name: str, section: type[Section]) -> Iterator[str]:
    """The heading and the table of a section, then those of the sections in it."""
    heading = f"## `{name}`" if name else "## Top level"
    yield f"{heading}\n\n{_one_line(section.__doc__)}\n"
    yield "| key | values | default | meaning |\n| --- | --- | --- | --- |"
    nested = []
    for key, field in section.model_fields.items():
        dotted = f"{name}.{key}" if name else key
        inner = _section_of(field.annotation)
        if inner is not None:
            nested.append((dotted, inner))
        yield _row(key, dotted, field, inner)
    yield ""
    for dotted, inner in nested:
        yield from _section(dotted, inner)


def _row(key: str, dotted: str, field: FieldInfo, inner: type[Section] | None) -> str:
    assert field.description, f"{dotted} has no docstring"
    values, default = _values(field.annotation, field.metadata), _default(field)
    if inner is not None:
        values = f"[section](#{dotted.replace('.', '')})" + values.removeprefix("section")
        default = "–" if isinstance(field.default, Section) else default
    cells = (f"`{key}`", values, default, _one_line(field.description))
    # A pipe ends a cell even inside code, such as that of <|think_start|>.
    escaped = [cell.replace("|", "\\|") for cell in cells]
    return f"| {' | '.join(escaped)} |"


def _section_of(annotation: Any) -> type[Section] | None:
    """The section that a field holds, also where it may be null."""
    members = get_args(annotation) if _is_union(annotation) else (annotation,)
    return next((m for m in members if isinstance(m, type) and issubclass(m, Section)), None)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)


def _values(annotation: Any, metadata: list[Any]) -> str:
    """The values that a field takes: its type with its range."""
    if _is_union(annotation):
        members = get_args(annotation)
        return ", ".join("null" if m is type(None) else _values(m, metadata) for m in members)
    if get_origin(annotation) is Annotated:
        inner, *more = get_args(annotation)
        for item in more:
            metadata = metadata + (item.metadata if isinstance(item, FieldInfo) else [item])
        return _values(inner, metadata)
    if get_origin(annotation) in (list, tuple):
        return f"list of {_values(get_args(annotation)[0], metadata)}"
    if get_origin(annotation) is dict:
        return f"mapping to {_values(get_args(annotation)[1], metadata)}"
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return "section"
    bounds = [_bound(item) for item in metadata if type(item) in BOUNDS]
    return " ".join([TYPES[annotation], ", ".join(bounds)]).strip()


def _bound(item: Any) -> str:
    sign, attribute = BOUNDS[type(item)]
    return f"{sign} {getattr(item, attribute):,}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is None or isinstance(value, bool):
        return {None: "`null`", True: "`true`", False: "`false`"}[value]
    if isinstance(value, tuple):
        return f"`{list(value)}`"
    if isinstance(value, float):
        return f"`{value:g}`"
    return f"`{value}`"


def _one_line(text: str | None) -> str:
    return " ".join((text or "").split())


if __name__ == "__main__":
    TARGET.write_text(render(), encoding="utf-8")
