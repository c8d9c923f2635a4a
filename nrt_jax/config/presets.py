"""The config files that come with the package, by name: `quickstart/nrt`, `methods/rlpr`."""

from difflib import get_close_matches
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]
_SWEEPS = "sweeps"
_NO_CONFIGS = ("evals", _SWEEPS)
"""Folders of tables to compare with, and of sweeps."""
_INSTALLED, _CHECKOUT = _PACKAGE / "configs", _PACKAGE.parent / "configs"
DIRECTORY = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""Where the presets are: in the installed package, or beside the package in a checkout."""


def presets() -> dict[str, Path]:
    """Every preset by its name, the path in `configs/` without `.yaml`."""
    paths = (path for path in DIRECTORY.glob("*/*.yaml") if path.parent.name not in _NO_CONFIGS)
    return {path.relative_to(DIRECTORY).with_suffix("").as_posix(): path for path in sorted(paths)}


def find_config(path: Path, name: str) -> Path:
    """The preset that `name` names, with or without `.yaml`, unless `path` is a file: then that."""
    return path if path.is_file() else presets().get(name.removesuffix(".yaml"), path)


def suggest_preset(path: Path) -> str:
    """The end of an error about a missing file: the preset that may have been meant, or nothing."""
    name, names = "/".join(path.with_suffix("").parts[-2:]), list(presets())
    near = [known for known in names if known.split("/")[-1] == path.stem]
    near = near if len(near) == 1 else get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def sweeps() -> dict[str, Path]:
    """Every sweep that comes with the package by its name, without its folder."""
    return {path.stem: path for path in sorted((DIRECTORY / _SWEEPS).glob("*.yaml"))}


def find_sweep(path: Path) -> Path:
    """The sweep that `path` names, such as sweeps/quickstart_methods, unless it is a file."""
    is_name = path.parts[:-1] in ((), (_SWEEPS,)) and not path.is_file()
    return sweeps().get(path.name.removesuffix(".yaml"), path) if is_name else path
