"""The chat template of an exported model: transformers then builds x as training did."""

import json
import re

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.chat_template import QUESTION, Messages, render_template, template_text
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError

_SYSTEM: Messages = [{"role": "system", "content": "Be brief."}]
_ANSWER: Messages = [{"role": "assistant", "content": "3"}]
SHAPES = [
    start + turns for turns in (QUESTION, QUESTION + _ANSWER + QUESTION) for start in ([], _SYSTEM)
]
"""Conversations of the shapes that templates tell apart."""


def chat_template_text(config: DataConfig, tokenizer: Tokenizer, opens_trace: bool) -> str:
    """Jinja with which `apply_chat_template(messages, add_generation_prompt=True)` gives x.

    The beginning-of-sequence token is in it once or not at all, as `config.add_bos` says. With
    `opens_trace` the ids of t_start follow x. Raises InputError when the config's template cannot
    be read. Names of special tokens in the messages are transformers' to deal with.
    """
    text = template_text(config, tokenizer)
    text = _plain(config, tokenizer) if text is None else _with_right_bos(text, config, tokenizer)
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


def _with_right_bos(text: str, config: DataConfig, tokenizer: Tokenizer) -> str:
    """The template itself where it writes what the config wants, else inside one that does."""
    text = re.sub(r"(\r\n|\r|\n)\Z", "", text)  # as Jinja ends a template
    if tokenizer.bos_id is None:
        return text
    bos = tokenizer.token(tokenizer.bos_id)
    samples = _samples(text, config, tokenizer)
    if all(written.startswith(bos) == config.add_bos for written in samples):
        return text
    if config.add_bos:
        out = "{{- '' if rendered.startswith(bos_token) else bos_token }}{{- rendered }}"
    else:
        out = "{{- rendered[bos_token | length:] if rendered.startswith(bos_token) else rendered }}"
    return f"{{%- set rendered %}}\n{text}{{%+ endset %}}{out}"


def _samples(text: str, config: DataConfig, tokenizer: Tokenizer) -> list[str]:
    """What the template writes for conversations of every shape that it takes."""
    written, refusals = [], []
    for messages in SHAPES:
        try:
            written.append(render_template(text, messages, tokenizer))
        except BadRow as bad:
            refusals.append(bad)
    if not written:
        place = config.template_file or f"data.template={config.template}"
        raise InputError(f"{place}: {refusals[0].detail}, here one turn of a user; set another")
    return written
