"""Paths as users write them: `~` expanded, and only of this machine; and the user's cache."""

import os
import re
from pathlib import Path

_ADDRESS = re.compile(r"[a-zA-Z][\w+.-]*://")


def local_path(text: str | Path) -> Path:
    """The path of a text, `~` and `~name` expanded; ValueError for what no path of this host is."""
    if _ADDRESS.match(str(text)):
        scheme, _, rest = str(text).partition("://")
        remedy = f"write /{rest.lstrip('/')}" if scheme == "file" else "copy or mount it first"
        raise ValueError(f"must be a path of this machine, not a {scheme}:// address; {remedy}")
    if "\0" in str(text):
        raise ValueError("must be a path, and a path has no NUL character")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        user = Path(text).parts[0]
        raise ValueError(f"{user}: no such user's home; write the path out") from None


def user_cache() -> Path:
    """nrt_jax in the user's cache folder. RuntimeError for a user without a home."""
    named = Path(os.environ.get("XDG_CACHE_HOME", ""))
    base = named if named.is_absolute() else Path.home() / ".cache"
    return base / "nrt_jax"
