"""The chat template of an exported model: transformers then builds x as training did."""

import json
import re
from collections.abc import Sequence

from nrt_jax.config.data import DataConfig
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.chat_template import (
    QUESTION,
    Messages,
    dated,
    render_template,
    template_text,
)
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
    `opens_trace` t_start follows x, once, and the white space that the config's template writes
    after it. Raises InputError when that template cannot be read. Names of special tokens in the
    messages are transformers' to deal with.
    """
    text, start = template_text(config, tokenizer), tokenizer.token(tokenizer.think_start_id)
    if text is None:
        text, may_open = _plain(config, tokenizer), False
    else:
        samples = _samples(text, config, tokenizer)
        may_open = start in text or any(sample.rstrip().endswith(start) for sample in samples)
        text = _with_right_bos(text, samples, config, tokenizer)
        text = dated(text) if "strftime_now" in text else text
    if may_open:
        return _with_right_start(text, tokenizer, opens_trace)
    if opens_trace:
        # "+": what the template wrote before the block stays as it is.
        text += f"{{%+ if add_generation_prompt %}}{{{{ {_quoted(start)} }}}}{{% endif %}}"
    return text


def _with_right_start(text: str, tokenizer: Tokenizer, opens_trace: bool) -> str:
    """The template inside one that writes t_start where it does not, or takes it off.

    A trace that the template has closed, as Qwen3's does when it is told not to think, stays so.
    """
    start, end = map(tokenizer.token, (tokenizer.think_start_id, tokenizer.think_end_id))
    opens = f"opened.rstrip().endswith({_quoted(start)})"
    out = f"opened.rstrip()[:-{len(start)}] if add_generation_prompt and {opens} else opened"
    if opens_trace:
        closes = f"opened.rstrip().endswith({_quoted(end)})"
        out = f"opened if not add_generation_prompt or {opens} or {closes} else opened ~ "
        out += _quoted(start)
    return f"{{%- set opened %}}\n{text}{{%+ endset %}}{{{{- {out} }}}}"


def _quoted(name: str) -> str:
    """A token's name as a string of Jinja."""
    return json.dumps(name, ensure_ascii=False)


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


def _with_right_bos(
    text: str, samples: Sequence[str], config: DataConfig, tokenizer: Tokenizer
) -> str:
    """The template itself where it writes what the config wants, else inside one that does."""
    text = re.sub(r"(\r\n|\r|\n)\Z", "", text)  # as Jinja ends a template
    if tokenizer.bos_id is None:
        return text
    bos = tokenizer.token(tokenizer.bos_id)
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
