"""The files of a Hugging Face tokenizer directory, read by transformers."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers

from nrt_jax.errors import InputError
from nrt_jax.file_kinds import check_text, read_head, why_missing
from nrt_jax.strict_json import parse_json

if TYPE_CHECKING:
    import transformers

TOKENIZER_FILE, SETTINGS_FILE = "tokenizer.json", "tokenizer_config.json"
TEMPLATE_FILE, OLD_TEMPLATE_FILE = "chat_template.jinja", "chat_template.json"
SENTENCEPIECE_FILE = "tokenizer.model"
LEGACY_FILES = ("special_tokens_map.json", "added_tokens.json")
TEMPLATE_FILES = (TEMPLATE_FILE, OLD_TEMPLATE_FILE, "additional_chat_templates/*.jinja")
DIRECTORY_NEEDS = f"a tokenizer directory holds {TOKENIZER_FILE} and {SETTINGS_FILE}"
AGAIN = "download the tokenizer again"


def fast_class() -> type["transformers.PreTrainedTokenizerFast"]:
    """The class of every tokenizer; imported here because the import takes a second.

    AutoTokenizer would take classes such as LlamaTokenizer, which build another pipeline than that
    of tokenizer.json and give other ids.
    """
    # Silences the advice to install torch, which nothing here needs.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from transformers import PreTrainedTokenizerFast, logging

    logging.set_verbosity_error()
    return PreTrainedTokenizerFast


def read_directory(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, Any]]:
    """tokenizer.json, and what the other files say as keyword arguments of `fast_class()`.

    Raises InputError for a file that is missing or cannot be read.
    """
    if not directory.is_dir():
        problem = "is a file, not a" if directory.exists() else "no such"
        raise InputError(
            f"{directory}: {problem} tokenizer directory; set data.tokenizer ({DIRECTORY_NEEDS})"
        )
    if (directory / SENTENCEPIECE_FILE).is_file() and not (directory / TOKENIZER_FILE).is_file():
        raise InputError(
            f"{directory}: has {SENTENCEPIECE_FILE} and no {TOKENIZER_FILE}, and a conversion can "
            f"lose the order of merges (double spaces get other ids); download {TOKENIZER_FILE} "
            "from the model's page, or save there the fast tokenizer that transformers loads"
        )
    for file in [directory / name for name in (*LEGACY_FILES, TEMPLATE_FILE, OLD_TEMPLATE_FILE)]:
        if file.is_symlink() and not file.exists():
            raise InputError(f"{file}: {why_missing(file)}; {DIRECTORY_NEEDS}")
    # Read here first: transformers does not name the file that it cannot read.
    optional = [file for name in (*LEGACY_FILES, *TEMPLATE_FILES) for file in directory.glob(name)]
    files = {file.name: _read_small(file) for file in [directory / SETTINGS_FILE, *optional]}
    backend = read_backend(directory)
    given = _described_roles(directory / SETTINGS_FILE, files[SETTINGS_FILE])
    if files.keys().isdisjoint(LEGACY_FILES):
        # Without this setting transformers would read tokenizer.json once more.
        given["added_tokens_decoder"] = files[SETTINGS_FILE].get("added_tokens_decoder", {})
    # The settings alone: the vocabulary has yet to get its think tokens.
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    with reading(directory, "transformers cannot read it", AGAIN):
        fast = fast_class().from_pretrained(directory, tokenizer_object=empty, **given)
    local = ("name_or_path", "is_local", "local_files_only", "vocab_file")
    settings = {key: value for key, value in fast.init_kwargs.items() if key not in local}
    # transformers reads this file for processors only.
    template = files.get(OLD_TEMPLATE_FILE, {}).get("chat_template")
    if template is not None and settings.get("chat_template") is None:
        settings["chat_template"] = template
    return backend, settings


def read_backend(directory: Path) -> tokenizers.Tokenizer:
    """tokenizer.json without truncation and padding; InputError when it cannot be read."""
    path = directory / TOKENIZER_FILE
    check_text(path, read_head(path))
    with reading(path, "not a tokenizer", "download it again"):
        text = path.read_text(encoding="utf-8")
        # The library keeps the last of two equal names, as in a vocabulary.
        parse_json(text)
        backend = tokenizers.Tokenizer.from_str(text)
    backend.no_truncation()
    backend.no_padding()
    return backend


@contextmanager
def reading(
    path: Path, problem: str, remedy: str, missing: str = DIRECTORY_NEEDS
) -> Iterator[None]:
    """Whatever a library raises about a file as an InputError; `missing` is for one not found."""
    try:
        yield
    except OSError as error:
        dangling = path.is_symlink() and not path.exists()
        reason = why_missing(path) if dangling else error.strerror or error
        raise InputError(f"{path}: {reason}; {missing}") from error
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"{path}: {problem} ({reason}); {remedy}") from error


def _read_small(path: Path) -> Any:
    """The JSON object, or of a template the text, in one of the small files."""
    check_text(path, read_head(path))
    with reading(path, "not UTF-8", "save the file as UTF-8"):
        text = path.read_text(encoding="utf-8")
    if path.suffix == ".jinja":
        return text
    with reading(path, "not JSON", AGAIN):
        value = parse_json(text)
    if not isinstance(value, dict):
        raise InputError(f"{path}: holds no JSON object; {AGAIN}")
    return value


def _described_roles(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """Names of the roles' tokens that old files describe without saying that they do."""
    roles = {role: settings.get(role) for role in fast_class().SPECIAL_TOKENS_ATTRIBUTES}
    for role, value in roles.items():
        if not isinstance(value, str | dict | None):
            raise InputError(f"{path}: {role} is {value!r}; write the name of a token")
    return {role: value.get("content") for role, value in roles.items() if isinstance(value, dict)}
