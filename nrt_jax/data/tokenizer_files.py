"""The files of a Hugging Face tokenizer directory, read without transformers."""

import json
from pathlib import Path
from typing import Any

import tokenizers

from nrt_jax.errors import InputError

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
SENTENCEPIECE_FILE = "tokenizer.model"
DIRECTORY_NEEDS = f"a tokenizer directory holds {TOKENIZER_FILE} and {SETTINGS_FILE}"
ROLES = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)


def read_settings(directory: Path) -> dict[str, Any]:
    """tokenizer_config.json; InputError when there is none, or only a sentencepiece model."""
    if not directory.is_dir():
        raise InputError(
            f"{directory}: no such tokenizer directory; set data.tokenizer ({DIRECTORY_NEEDS})"
        )
    if (directory / SENTENCEPIECE_FILE).is_file() and not (directory / TOKENIZER_FILE).is_file():
        raise InputError(
            f"{directory}: has {SENTENCEPIECE_FILE} and no {TOKENIZER_FILE}, and a conversion can "
            f"lose the order of merges (double spaces get other ids); download {TOKENIZER_FILE} "
            "from the model's page, or save there the fast tokenizer that transformers loads"
        )
    path = directory / SETTINGS_FILE
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise InputError(f"{path}: holds no JSON object; download the tokenizer again")
    return settings


def read_json(path: Path) -> Any:
    """The value in one of the directory's small files; InputError when it cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {DIRECTORY_NEEDS}") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); download the tokenizer again") from error


def role_names(settings: dict[str, Any]) -> dict[str, str]:
    """What the settings call the token of each role, for the roles that have one."""
    names = {}
    for role in ROLES:
        value = settings.get(role)
        # Older files hold the name inside a description of the token.
        name = value.get("content") if isinstance(value, dict) else value
        if isinstance(name, str):
            names[role] = name
    return names


def read_tokenizer_json(directory: Path) -> str:
    """The text of tokenizer.json; InputError when it cannot be read."""
    path = directory / TOKENIZER_FILE
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {DIRECTORY_NEEDS}") from error
    except ValueError as error:
        raise InputError(f"{path}: not UTF-8 ({error}); download it again") from error


def build_backend(text: str, directory: Path) -> tokenizers.Tokenizer:
    """The tokenizer that a tokenizer.json describes, without truncation and padding."""
    try:
        backend = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises bare Exception for whatever it cannot read
        reason = " ".join(str(error).split())
        path = directory / TOKENIZER_FILE
        raise InputError(f"{path}: not a tokenizer ({reason}); download it again") from error
    backend.no_truncation()
    backend.no_padding()
    return backend
