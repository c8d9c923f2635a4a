"""How to ask a Hugging Face or imported directory: prompts, think tokens, limits.

An export carries these settings of its run in two small files, which an import copies. For any
other directory they follow from its tokenizer and `config.json`.
"""

import json
import logging
from collections.abc import Sequence
from pathlib import Path

from nrt_jax.checkpoints.abstract_model import load_tokenizer
from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.data.chat_template import template_text
from nrt_jax.data.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SETTINGS_FILE, TEMPLATE_FILE = "nrt_jax.json", "nrt_jax_template.jinja"
DEFAULT_TOKENS = 1024
"""Longest prompt and longest response of a directory that sets no limits, where it has room."""
_KEPT = {
    "method": True,
    "model": {"dtype"},
    "data": {
        "template",
        "add_bos",
        "think_start",
        "think_end",
        "max_prompt_tokens",
        "max_answer_tokens",
    },
    "objective": {"scheme", "ws_normalisation", "weight_cap"},
    "rollout": {
        "max_trace_tokens",
        "max_response_tokens",
        "stop_tokens",
        "dtype",
        "cache_dtype",
    },
    "evaluation": {"max_answer_tokens"},
}
"""What an answer, or the reward of a reference answer, depends on."""


def write_settings(directory: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Write the settings and the prompt template of a run beside its exported weights.

    The template is the one of training, which does not open the trace; `chat_template.jinja`, for
    transformers, does.
    """
    settings = config.model_dump(mode="json", include=_KEPT)
    template = template_text(config.data, tokenizer)
    if template is not None:
        (directory / TEMPLATE_FILE).write_text(template, encoding="utf-8")
        settings["data"] |= {"template": "tokenizer", "template_file": TEMPLATE_FILE}
    text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
    (directory / SETTINGS_FILE).write_text(text, encoding="utf-8")


def has_settings(directory: Path) -> bool:
    """Whether the directory says itself how to ask it."""
    return (directory / SETTINGS_FILE).is_file()


def directory_config(directory: Path, overrides: Sequence[str]) -> tuple[RunConfig, Tokenizer]:
    """The config under which to ask a directory, after `section.field=value` overrides.

    Without settings of its own, a directory reasons (method nrt) if its tokenizer has both think
    tokens; its prompts follow the tokenizer's chat template if there is one; and its limits stay
    within max_position_embeddings. Raises InputError.
    """
    # A config must name a source of data; nothing reads it here.
    path = json.dumps(str(directory.absolute()), ensure_ascii=False)
    fixed = [f"model.path={path}", "data.source=chain_addition"]
    if has_settings(directory):
        config = load_config(RunConfig, [directory / SETTINGS_FILE], [*fixed, *overrides])
        return config, load_tokenizer(config)
    half = min(DEFAULT_TOKENS, read_architecture(directory).max_position_embeddings // 2)
    defaults = [
        *fixed,
        f"data.max_prompt_tokens={half}",
        f"rollout.max_response_tokens={half}",
        "data.template=tokenizer",
    ]
    # The method and the length of an answer depend on other settings: read those first.
    known = load_config(RunConfig, [], [*defaults, *overrides, "method=sft"])
    tokenizer = load_tokenizer(known)
    given = {word.partition("=")[0]: word.partition("=")[2] for word in overrides}
    method = given.get("method", "sft" if tokenizer.new_ids else "nrt")
    response = known.rollout.max_response_tokens
    answer = max(2, response // 2) if method == "nrt" else response
    found = [
        f"method={method}",
        *_prompt_format(known, tokenizer),
        f"data.max_answer_tokens={answer}",
        f"evaluation.max_answer_tokens={answer}",
        f"rollout.max_trace_tokens={max(1, response // 2)}",
    ]
    config = load_config(RunConfig, [], [*defaults, *found, *overrides])
    _tell(directory, config, tokenizer)
    return config, tokenizer


def _prompt_format(known: RunConfig, tokenizer: Tokenizer) -> list[str]:
    """The overrides under which prompts are those that transformers makes."""
    data, template = known.data, None
    needs_own = data.template == "tokenizer" and data.template_file is None
    if not needs_own or tokenizer.fast.chat_template:
        template = template_text(data, tokenizer)
    bos = None if tokenizer.bos_id is None else tokenizer.token(tokenizer.bos_id)
    if template is not None:
        writes_bos = "bos_token" in template or (bos is not None and bos in template)
        return [f"data.add_bos={str(writes_bos).lower()}"]
    first = tokenizer.backend.encode("1").ids[:1]
    return ["data.template=plain", f"data.add_bos={str(first == [tokenizer.bos_id]).lower()}"]


def _tell(directory: Path, config: RunConfig, tokenizer: Tokenizer) -> None:
    """Log what was concluded: without it a think token of another name would go unnoticed."""
    log.info(
        "%s: answers %s (its tokenizer %s %s and %s); data.template=%s",
        directory,
        "after a trace" if config.method == "nrt" else "directly",
        "lacks" if tokenizer.new_ids else "has",
        config.data.think_start,
        config.data.think_end,
        config.data.template,
    )
