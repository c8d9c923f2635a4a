"""Which chat template a config means, and Jinja set up for it as transformers does."""

import json
from datetime import datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from nrt_jax.config.data import DataConfig
from nrt_jax.data.tokenizer_export import OLD_TEMPLATE_FILE, TEMPLATE_FILE
from nrt_jax.data.tokenizer_files import SETTINGS_FILE, read_json, read_settings
from nrt_jax.errors import InputError

TODAY = datetime(2024, 7, 26)
"""What a template that asks for the date is told: Llama 3.2's own default, so that prompts are the
same on every day and a run that continues sees the same ids."""


def template_text(config: DataConfig, directory: Path) -> tuple[str, str] | None:
    """The Jinja text and the place it is from; None for template "plain".

    `directory` is the tokenizer's. Raises InputError when there is no template to be had.
    """
    if config.template == "plain":
        return None
    if config.template_file is not None:
        return _read(config.template_file, "set data.template_file to a file"), str(
            config.template_file
        )
    if config.template == "tulu":
        text = resources.files("nrt_jax.data").joinpath("tulu.jinja").read_text("utf-8")
        return text, "the template 'tulu'"
    return _of_tokenizer(directory)


def compile_template(text: str, place: str) -> jinja2.Template:
    """The template, sandboxed; InputError when it is not Jinja."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = TODAY.strftime
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as error:
        raise InputError(
            f"{place}: line {error.lineno}: not a Jinja template ({error.message}); set "
            "data.template=tulu, or data.template_file to a template that is one"
        ) from error


def _of_tokenizer(directory: Path) -> tuple[str, str]:
    path = directory / TEMPLATE_FILE
    if path.is_file():
        return _read(path, "make it readable"), str(path)
    template = _default(read_settings(directory).get("chat_template"))
    if template is not None:
        return template, f"{directory / SETTINGS_FILE}: chat_template"
    path = directory / OLD_TEMPLATE_FILE
    if path.is_file():
        content = read_json(path)
        template = _default(content.get("chat_template") if isinstance(content, dict) else None)
        if template is not None:
            return template, f"{path}: chat_template"
    raise InputError(
        f"{directory}: data.template=tokenizer, and the tokenizer has no chat template; set "
        "data.template=tulu, or data.template_file to a template of your own"
    )


def _default(value: Any) -> str | None:
    """The template, or of several named ones the default."""
    if isinstance(value, list):
        value = {item.get("name"): item.get("template") for item in value if isinstance(item, dict)}
    if isinstance(value, dict):
        value = value.get("default")
    return value if isinstance(value, str) else None


def _read(path: Path, remedy: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {remedy}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8; save the template as UTF-8") from error


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own escapes for HTML, which a prompt is not.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


class _Generation(jinja2.ext.Extension):
    """{% generation %} marks an assistant's words for a loss mask; here it is but a scope."""

    tags = {"generation"}  # noqa: RUF012 - the name and the type are Jinja's

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)
