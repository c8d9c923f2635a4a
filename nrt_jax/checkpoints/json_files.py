"""The JSON files of a model directory, with errors that name the file."""

import json
from pathlib import Path
from typing import Any

from nrt_jax.errors import InputError


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; InputError when it cannot be read or names a key twice."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except FileNotFoundError:
        raise InputError(f"{file}: no such file; give a Hugging Face model directory") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file}: cannot be read: {one_line(error)}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: must be JSON: {one_line(error)}") from None
    if not isinstance(value, dict):
        raise InputError(f"{file}: must be a JSON object")
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} occurs twice")
    return result


def write_json(file: Path, value: dict[str, Any]) -> None:
    """Write `value` indented, with a line break at the end."""
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def one_line(error: Exception) -> str:
    """The error's message without its file name and without line breaks."""
    text = getattr(error, "strerror", None) or str(error)
    return " ".join(text.split())
