"""The JSON files of a model directory, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from nrt_jax.errors import InputError
from nrt_jax.file_kinds import HEAD_BYTES, check_text, why_missing
from nrt_jax.strict_json import parse_json


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; InputError when it cannot be read or is no strict JSON."""
    try:
        content = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        reason = why_missing(file)
        raise InputError(f"{file}: {reason}; give a Hugging Face model directory") from None
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {one_line(error)}") from None
    if not content:
        raise InputError(f"{file}: is empty; copy or download it again")
    check_text(file, content[:HEAD_BYTES])
    try:
        value = parse_json(content.decode("utf-8-sig"), allow_nan=True)
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: cannot be read: {one_line(error)}") from None
    except ValueError as error:
        raise InputError(f"{file}: must be JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: must be a JSON object")
    return value


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write `value` indented, with a line break at the end."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def one_line(error: Exception) -> str:
    """The error's message without its file name and without line breaks."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())
