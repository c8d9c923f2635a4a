"""The copy of a tokenizer that goes with a trained model, for AutoTokenizer of transformers."""

import json
import shutil
from pathlib import Path
from typing import Any

from nrt_jax.data.think_tokens import SPECIAL, ThinkTokens, edit_tokenizer_json, rename_values
from nrt_jax.data.tokenizer_files import (
    SETTINGS_FILE,
    TOKENIZER_FILE,
    read_json,
    read_settings,
    read_tokenizer_json,
)

TEMPLATE_FILE, OLD_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
SPECIAL_MAP_FILE = "special_tokens_map.json"
TOKEN_LISTS = ("additional_special_tokens", "extra_special_tokens")
# Every other class of transformers takes the vocabulary from tokenizer.json and builds the rest
# after its own idea, which for LlamaTokenizer gives other ids.
FAITHFUL_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def write_tokenizer(
    source: Path, target: Path, think: ThinkTokens, chat_template: str | None
) -> None:
    """Copy the files of `source`, with the think tokens in them and, if given, one chat template.

    A file in which nothing changes is copied byte for byte.
    """
    target.mkdir(parents=True, exist_ok=True)
    edited = edit_tokenizer_json(read_tokenizer_json(source), think)
    settings = read_settings(source)
    changed = dict(settings)
    if changed.get("tokenizer_class") not in FAITHFUL_CLASSES:
        changed["tokenizer_class"] = FAITHFUL_CLASSES[0]
    if edited is not None:
        changed = _add_to_settings(rename_values(changed, think.renamed), think)
    if chat_template is not None:
        changed.pop("chat_template", None)
    _write(source / TOKENIZER_FILE, target, edited)
    _write(source / SETTINGS_FILE, target, None if changed == settings else _dump(changed))
    if (source / SPECIAL_MAP_FILE).is_file():
        names = None
        if edited is not None:
            names = _dump(
                _add_to_lists(
                    rename_values(read_json(source / SPECIAL_MAP_FILE), think.renamed), think
                )
            )
        _write(source / SPECIAL_MAP_FILE, target, names)
    for name in (TEMPLATE_FILE, OLD_TEMPLATE_FILE):
        if chat_template is not None:
            (target / name).unlink(missing_ok=True)
        elif (source / name).is_file():
            _write(source / name, target, None)
    if chat_template is not None:
        (target / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


def _add_to_settings(settings: dict[str, Any], think: ThinkTokens) -> dict[str, Any]:
    described = settings.get("added_tokens_decoder")
    if isinstance(described, dict):
        new = {str(i): {"content": name, **SPECIAL} for name, i in think.ids.items()}
        settings = {**settings, "added_tokens_decoder": described | new}
    if isinstance(settings.get("extra_special_tokens"), dict):
        start, end = think.ids
        named = {"think_start_token": start, "think_end_token": end}
        extra = settings["extra_special_tokens"] | named
        return {**settings, "extra_special_tokens": extra}
    if not any(isinstance(settings.get(key), list) for key in TOKEN_LISTS):
        # The name that transformers 4 and 5 both read.
        settings = {**settings, TOKEN_LISTS[0]: []}
    return _add_to_lists(settings, think)


def _add_to_lists(settings: dict[str, Any], think: ThinkTokens) -> dict[str, Any]:
    """The settings with the think tokens in each list of special tokens that they have."""
    result = dict(settings)
    for key in TOKEN_LISTS:
        tokens = settings.get(key)
        if isinstance(tokens, list):
            # Older files hold descriptions of the tokens.
            names = [token.get("content") if isinstance(token, dict) else token for token in tokens]
            result[key] = [*tokens, *(name for name in think.ids if name not in names)]
    return result


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2) + "\n"


def _write(source: Path, target: Path, text: str | None) -> None:
    """Write `text` under the name of `source`; without one, copy the file."""
    if text is None:
        # Not `copy`: a read-only source must not make a read-only copy.
        shutil.copyfile(source, target / source.name)
    else:
        (target / source.name).write_text(text, encoding="utf-8")
