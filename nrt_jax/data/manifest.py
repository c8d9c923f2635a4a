"""manifest.json of prepared data: what it was made from and with, and which files hold it."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import location
from nrt_jax.data.bad_rows import Rejected
from nrt_jax.data.chat_template import template_text
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from nrt_jax.strict_json import parse_json

MANIFEST_FILE, REJECTED_FILE = "manifest.json", "rejected.jsonl"
_KIND = "nrt-jax prepared data"
FORMAT = f"{_KIND} 1"
NAMED = "named"
"""Key of where a tokenizer or template was found, which decides nothing."""
_AGAIN = "prepare the data again"
RESTORE = f"restore it or {_AGAIN}"
"""What to do about a damaged file."""


class Shard(NamedTuple):
    """A file of records."""

    path: str
    """From the directory of the manifest."""
    rows: int
    nbytes: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The manifest of a directory."""

    directory: Path
    content: dict[str, Any]
    remedy: str = RESTORE
    """What to do about a damaged file."""

    @cached_property
    def splits(self) -> dict[str, list[Shard]]:
        """The shards of "train" and "eval" in order."""
        splits = self.content["splits"]
        return {
            name: [Shard(**shard) for shard in split["shards"]] for name, split in splits.items()
        }

    @property
    def rejected(self) -> dict[str, int]:
        """Left-out rows by reason."""
        return self.content["rejected"]

    @property
    def train_rows(self) -> dict[str, int]:
        """The numbers of training rows by source."""
        found = self.content["examples_by_source"]
        return {name: of["train"]["rows"] for name, of in found.items() if "train" in of}

    def train_lengths(self, source: str, of: str) -> Int32[np.ndarray, "rows"]:
        """The lengths of the training rows of a source in tokens, the shortest first; `of` is
        prompt_tokens or answer_tokens."""
        histogram = self.content["examples_by_source"][source]["train"][of]
        return np.repeat(np.array([*map(int, histogram)], np.int32), [*histogram.values()])

    def read_rejected(self) -> list[Rejected]:
        """The rows that were left out, file by file."""
        path = self.directory / REJECTED_FILE
        if not path.exists():
            return []
        try:
            return [Rejected(**json.loads(line)) for line in path.read_bytes().splitlines()]
        except (ValueError, TypeError) as error:
            raise InputError(f"{path}: is damaged ({error}); {self.remedy}") from error

    def check_files(self) -> None:
        """InputError for the first shard that is missing or has another size."""
        for shard in (shard for shards in self.splits.values() for shard in shards):
            path = self.directory / shard.path
            try:
                size = path.stat().st_size
            except OSError as error:
                raise InputError(
                    f"{path}: a shard of prepared data is missing ({error.strerror}); {self.remedy}"
                ) from error
            if size != shard.nbytes:
                raise InputError(
                    f"{path}: has {size} bytes, and was written with {shard.nbytes}; {self.remedy}"
                )

    def check_tokens(self, config: DataConfig, tokenizer: Tokenizer) -> None:
        """InputError, with both values, when the data has other tokens than this config makes."""
        made, wanted = self.content["tokens"], token_settings(config, tokenizer)
        for name, value in wanted.items():
            if not _same(made[name], value):
                raise InputError(
                    f"{self.directory}: was prepared with {name}={shown(made[name])}, and this "
                    f"run has {name}={shown(value)}; set {name} as it was, or {_AGAIN}"
                )

    def check_filters(self, config: DataConfig) -> None:
        """InputError when this config filters rows by what the data was not prepared with."""
        made = self.content["config"]
        for name, value in filter_settings(config).items():
            if made.get(name) != value:
                raise InputError(
                    f"{self.directory}: was prepared with data.{name}={_filter(made.get(name))}, "
                    f"and this run has data.{name}={_filter(value)}; rows are filtered when they "
                    f"are prepared: leave data.{name} out, or {_AGAIN}"
                )


def filter_settings(config: DataConfig) -> dict[str, Any]:
    """The filters of training rows that a config sets, by the names of the settings."""
    names = {"duplicates"} if config.duplicates == "keep" else set()
    if config.contamination:
        names |= {"contamination", "contamination_ngram", "contamination_share"}
    if config.leave_out is not None:
        names.add("leave_out")
    return config.model_dump(mode="json", include=names)


def is_prepared(directory: Path) -> bool:
    """Whether a path is a directory with the manifest of prepared data."""
    try:
        with (directory / MANIFEST_FILE).open("rb") as file:
            return f'"{_KIND} '.encode() in file.read(128)
    except OSError:
        return False


def read_manifest(directory: Path) -> Manifest:
    """Raises InputError for a manifest that is missing, damaged or of another version."""
    path = directory / MANIFEST_FILE
    try:
        content = parse_json(path.read_bytes())
    except OSError as error:
        raise InputError(
            f"{path}: {error.strerror}; name the directory that nrt-jax data prepare has written, "
            "or run it again until it has finished"
        ) from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({error}); restore it or {_AGAIN}") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else content
        raise InputError(f"{path}: its format is {found!r}, not {FORMAT!r}; {_AGAIN}")
    return Manifest(directory, content)


def token_settings(config: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What decides the tokens of a row, by the names of the settings.

    The digest of a tokenizer is of what it does, so that a saved copy of it has the same. Think
    tokens stand first, since other ones change the digest too.
    """
    template = template_text(config, tokenizer)
    return {
        "data.think_start": config.think_start,
        "data.think_end": config.think_end,
        "data.tokenizer": {
            NAMED: str(tokenizer.directory),
            "sha256": tokenizer.digest,
        },
        "data.template": {
            NAMED: str(config.template_file or config.template),
            "sha256": _digest("" if template is None else template),
        },
        "data.add_bos": config.add_bos,
        "data.max_prompt_tokens": config.max_prompt_tokens,
        "data.max_answer_tokens": config.max_answer_tokens,
    }


def shown(value: Any) -> Any:
    """A setting on one line: of what has a digest its name, with the beginning of the digest."""
    if isinstance(value, dict):
        return f"{value[NAMED]} (sha256 {value['sha256'][:12]})"
    return value


def _filter(value: Any) -> Any:
    """A setting on one line: of benchmarks their files."""
    if isinstance(value, list):
        return ", ".join(location(benchmark["path"]) for benchmark in value) or "[]"
    return "null" if value is None else value


def _same(one: Any, other: Any) -> bool:
    """Whether two settings decide the same tokens; where a file stands does not."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one["sha256"] == other["sha256"]
    return one == other


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
