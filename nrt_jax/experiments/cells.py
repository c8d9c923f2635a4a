"""The cells of a sweep: every combination of its options, each as the resolved config of a run."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from nrt_jax.config.load import dump_config, load_config
from nrt_jax.config.presets import find_config, find_sweep, sweeps
from nrt_jax.config.run import RunConfig
from nrt_jax.config.sweep import Axis, SweepConfig, Words
from nrt_jax.errors import InputError

MOST_CELLS = 10_000
"""More are hardly meant, and every one is a folder."""
_LONGEST_NAME = 150
_DIGEST_DIGITS = 8


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of a sweep."""

    options: Mapping[str, str]
    """The name of the chosen option by axis, `seed` last."""
    config: RunConfig
    """The resolved config, whose run_dir is the folder of the cell."""
    words: tuple[str, ...]
    """What `nrt-jax train` makes this config of."""
    files: tuple[Path, ...]
    """The config files among the words that are no presets."""

    @property
    def name(self) -> str:
        """The name of its folder: the options, and a digest of the config."""
        return self.config.run_dir.name

    @property
    def title(self) -> str:
        """Its options, to read."""
        return ", ".join(f"{axis}={option}" for axis, option in self.options.items())


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """The cells of a sweep, and the folder that holds them."""

    file: Path
    folder: Path
    cells: tuple[Cell, ...]


def read_sweep(name: Path, overrides: Sequence[str] = (), out: Path | None = None) -> Sweep:
    """The sweep in a file, or a preset such as `sweeps/table3`, with overrides for all cells.

    Raises InputError, with the cell, for a config that is not valid; for two cells that are one
    run; and for a sweep without cells.
    """
    file = find_sweep(name)
    if not file.exists():
        near = _nearest(name.stem, sorted(sweeps()))
        raise InputError(f"{name}: there is no such file and no such sweep{near}")
    if file.is_dir():
        raise InputError(
            f"{name}: is a directory; name the sweep's file or preset, with its overrides"
        )
    config = load_config(SweepConfig, [file])
    folder = out if out is not None else config.folder(file)
    cells = tuple(_cells(file, config, folder, overrides))
    if not cells:
        raise InputError(f"{file}: exclude leaves out every cell; remove one of its entries")
    _check_different(file, cells)
    return Sweep(file=file, folder=folder, cells=cells)


def _cells(
    file: Path, config: SweepConfig, folder: Path, overrides: Sequence[str]
) -> Iterator[Cell]:
    axes = [[{name: option} for option in _options(axis)] for name, axis in config.grid.items()]
    if config.zip:
        together = zip(*map(_options, config.zip.values()), strict=True)
        axes.append([dict(zip(config.zip, options, strict=True)) for options in together])
    axes.append([{"seed": str(seed)} for seed in config.seeds])
    count = 1
    for axis in axes:
        count *= len(axis)
    if count > MOST_CELLS:
        raise InputError(f"{file}: has {count:,} combinations, above {MOST_CELLS:,}; split it")
    excluded = [_excluded(file, config, entry) for entry in config.exclude]
    for chosen in itertools.product(*axes):
        options = {name: option for part in chosen for name, option in part.items()}
        if any(entry.items() <= options.items() for entry in excluded):
            continue
        words = [*_listed(config.base), *_words(config, options), *overrides]
        yield _resolve(file, words, options, folder)


def _options(axis: Axis) -> list[str]:
    """The names of the options of an axis."""
    return list(axis) if isinstance(axis, dict) else [_text(value) for value in axis]


def _text(value: Any) -> str:
    """A value as in an override: a text as it is, anything else as JSON, which YAML reads."""
    return value if isinstance(value, str) else json.dumps(value)


def _words(config: SweepConfig, options: Mapping[str, str]) -> Iterator[str]:
    for name, axis in {**config.grid, **config.zip}.items():
        if isinstance(axis, dict):
            yield from _listed(axis[options[name]])
        else:
            yield f"{name}={options[name]}"
    yield f"seed={options['seed']}"


def _listed(words: Words) -> tuple[str, ...]:
    return (words,) if isinstance(words, str) else words


def _resolve(file: Path, words: Sequence[str], options: Mapping[str, str], folder: Path) -> Cell:
    paths, overrides, files, configs = [], [], [], []
    for word in words:
        beside = file.parent / word
        if "=" in word and not beside.is_file():
            overrides.append(word)
            continue
        paths.append(find_config(beside, word))
        configs.append(str(beside) if beside.is_file() else word)
        files += [beside] if beside.is_file() else []
    title = ", ".join(f"{axis}={option}" for axis, option in options.items())
    try:
        config = load_config(RunConfig, paths, overrides)
    except InputError as error:
        raise InputError(f"{file}: cell {title}: {error}") from None
    run_dir = folder / _folder_name(options, config)
    return Cell(
        options=options,
        config=config.model_copy(update={"run_dir": run_dir}),
        words=(*configs, *overrides, f"run_dir={json.dumps(str(run_dir), ensure_ascii=False)}"),
        files=tuple(files),
    )


def _folder_name(options: Mapping[str, str], config: RunConfig) -> str:
    """Its options, cut where they are long, and a digest of all that the run does."""
    name = ",".join(f"{axis}={option}" for axis, option in options.items())
    name = re.sub(r"[^\w.+=,-]+", "_", name)[:_LONGEST_NAME]
    content = dump_config(config.model_copy(update={"run_dir": Path()}))
    return f"{name}-{hashlib.sha256(content.encode()).hexdigest()[:_DIGEST_DIGITS]}"


def _excluded(file: Path, config: SweepConfig, entry: Mapping[str, Any]) -> dict[str, str]:
    known = {name: _options(axis) for name, axis in {**config.grid, **config.zip}.items()}
    known["seed"] = [str(seed) for seed in config.seeds]
    chosen = {name: _text(value) for name, value in entry.items()}
    for name, option in chosen.items():
        if name not in known:
            raise InputError(f"{file}: exclude: {name} is no axis{_nearest(name, known)}")
        if option not in known[name]:
            near = _nearest(option, known[name])
            raise InputError(f"{file}: exclude: {name} has no option {option}{near}")
    if not chosen:
        raise InputError(f"{file}: exclude: {{}} would leave out every cell; name options")
    return chosen


def _nearest(word: str, known: Sequence[str] | Mapping[str, Any]) -> str:
    near = get_close_matches(word, list(known), n=1)
    return f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"


def _check_different(file: Path, cells: Sequence[Cell]) -> None:
    """Two cells with equal configs would be one run, whatever their options are called."""
    by_digest: dict[str, Cell] = {}
    for cell in cells:
        other = by_digest.setdefault(cell.name[-_DIGEST_DIGITS:], cell)
        if other is not cell:
            raise InputError(
                f"{file}: cells {other.title} and {cell.title} have the same config; an override "
                "hides their difference, or an option stands there twice"
            )
