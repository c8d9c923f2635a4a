"""The chat template of an exported model: transformers then builds x as training did."""

import json
import re

import jinja2

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.chat_template import Messages, render_template
from nrt_jax.data.template_source import compile_template, template_text
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

_SYSTEM = {"role": "system", "content": "Be brief."}
_USER = {"role": "user", "content": "1+2"}
_ASSISTANT = {"role": "assistant", "content": "3"}
SAMPLES: tuple[Messages, ...] = (
    [_USER],
    [_SYSTEM, _USER],
    [_USER, _ASSISTANT, _USER],
    [_SYSTEM, _USER, _ASSISTANT, _USER],
)


def chat_template_text(config: DataConfig, tokenizer: Tokenizer, opens_trace: bool) -> str:
    """Jinja with which `apply_chat_template(messages, add_generation_prompt=True)` gives x.

    The beginning-of-sequence token is in it once or not at all, as `config.add_bos` says. With
    `opens_trace` the ids of t_start follow x. Raises InputError when the config's template cannot
    be read. Names of special tokens in the messages are transformers' to deal with.
    """
    source = template_text(config, tokenizer.directory)
    if source is None:
        text = _plain(config, tokenizer)
    else:
        text = _with_right_bos(*source, config, tokenizer)
    if opens_trace:
        name = json.dumps(tokenizer.token(tokenizer.think_start_id), ensure_ascii=False)
        # "+": what the template wrote before the block stays as it is.
        text += f"{{%+ if add_generation_prompt %}}{{{{ {name} }}}}{{% endif %}}"
    return text


def _plain(config: DataConfig, tokenizer: Tokenizer) -> str:
    contents = "messages | map(attribute='content') | join"
    if not config.add_bos or tokenizer.bos_id is None:
        return f"{{{{- {contents} }}}}"
    if tokenizer.inner is tokenizer.backend:
        return f"{{{{- bos_token }}}}{{{{- {contents} }}}}"
    # In training the question starts the sequence. In a chat it follows a token, where tokenizers
    # that put a space in front of a sequence alone put none: the template writes it.
    return (
        f"{{%- set text = {contents} %}}{{{{- bos_token }}}}"
        "{%- if text and text[0] not in ' ▁' %}{{ ' ' }}{% endif %}{{- text }}"
    )


def _with_right_bos(text: str, place: str, config: DataConfig, tokenizer: Tokenizer) -> str:
    """The template itself where it writes what the config wants, else inside one that does."""
    text = re.sub(r"(\r\n|\r|\n)\Z", "", text)  # as Jinja ends a template
    if tokenizer.bos_id is None:
        return text
    bos = tokenizer.token(tokenizer.bos_id)
    samples = _samples(compile_template(text, place), place, tokenizer.roles)
    if all(written.startswith(bos) == config.add_bos for written in samples):
        return text
    if config.add_bos:
        out = "{{- '' if rendered.startswith(bos_token) else bos_token }}{{- rendered }}"
    else:
        out = "{{- rendered[bos_token | length:] if rendered.startswith(bos_token) else rendered }}"
    return f"{{%- set rendered %}}\n{text}{{%+ endset %}}{out}"


def _samples(template: jinja2.Template, place: str, roles: dict[str, str]) -> list[str]:
    """What the template writes for conversations of every shape that it takes."""
    written, refusals = [], []
    for messages in SAMPLES:
        try:
            written.append(render_template(template, messages, roles))
        except BadRow as bad:
            refusals.append(bad)
    if not written:
        raise InputError(f"{place}: {refusals[0].detail}, here one turn of a user; set another")
    return written
