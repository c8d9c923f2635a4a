"""Settings of one source of rows: its files, and which of their fields are question and answer."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BeforeValidator, Field, model_validator

from nrt_jax.config.load import Section, resolve_path

FileFormat = Literal["jsonl", "json", "csv", "tsv", "parquet", "arrow"]
Library = Literal["tfds", "hub"]
Generator = Literal["chain_addition", "chain_documents", "hard_tokens", "hard_documents"]
GENERATORS: tuple[str, ...] = get_args(Generator)
Preset = Literal[
    "alpaca",
    "sharegpt",
    "messages",
    "prompt_completion",
    "nq_open",
    "commonsenseqa",
    "oasst",
]
CONVERSATIONS = ("sharegpt", "messages", "oasst")
"""Presets that make turns of a row."""
_REMOTE = re.compile(r"(gs|s3|az|hf)://[^/]")


def _data_paths(value: Any, info: Any) -> Any:
    """Paths, but the names of data sets as they are."""
    named = info.data.get("source") == "hub" or info.data.get("data_dir") is not None
    if named and (value is None or isinstance(value, str)):
        return None if value is None else str(value)
    if isinstance(value, list | tuple):
        return tuple(_data_path(item) for item in value)
    return _data_path(value)


def _data_path(value: Any) -> Any:
    if value is None or (isinstance(value, str) and _REMOTE.match(value)):
        return None if value is None else str(value)
    if not isinstance(value, str | Path):
        raise ValueError("must be a path or a list of paths")
    return resolve_path(value)


DataFolder = Annotated[Path | str | None, BeforeValidator(_data_path)]
"""A folder; text is an address such as gs://bucket/sets."""
DataPaths = Annotated[Path | str | tuple[Path | str, ...] | None, BeforeValidator(_data_paths)]
"""A file, a folder, a glob, or a list of these; text is an address such as gs://bucket/rows, or the
name of a data set."""


def location(where: Path | str | Sequence[Path | str]) -> str:
    """A data path in one name."""
    return str(where) if isinstance(where, Path | str) else ", ".join(map(str, where))


class RowsConfig(Section):
    """One source of rows."""

    source: FileFormat | Library | Literal["prepared"] | Generator | None = None
    """A file format, a library, prepared for what nrt-jax data prepare has written, or a built-in
    generator; null: told by the name of each file, such as rows.jsonl.gz, and by the metadata of
    prepared data. json: an array of objects, or JSON Lines; arrow: a file of a saved data set of
    the library datasets; tfds: TensorFlow Datasets; hub: a data set of the Hugging Face hub (pip
    install 'nrt-jax[hub]')."""
    data_dir: DataFolder = None
    """tfds: folder of prepared data sets, of which path names one, such as
    my_set/my_config:1.0.0; null: path is the directory of one."""
    path: DataPaths = None
    """A file, a folder of shards, a glob such as 'part-*.jsonl', a directory that the library
    datasets has saved, or a list of these. Text files may be packed with gzip or zstd. An address
    gs://, s3://, az:// or hf:// is read by the package that fsspec has for it. hub: the name of a
    data set, OWNER/NAME."""
    split: str = "train"
    """tfds and hub: the split that is read; of tfds also a part, such as 'train[:1000]'."""
    subset: str | None = None
    """hub: the configuration of a data set that has several."""
    revision: str | None = None
    """hub: branch, tag or commit; null: the main branch. A run records the commit."""
    columns: tuple[str, ...] = ()
    """csv and tsv: names of the columns of files without a header; empty: the first line has
    them."""
    unescape: bool = False
    r"""tsv: read \n, \t, \r and \\ in a field as the characters that they stand for."""
    preset: Preset | None = None
    """A known form of rows, which replaces the fields below."""
    question_field: str = "question"
    """Field of a row that holds the question; 'question.stem' and 'turns[0].text' lead into it."""
    answer_field: str = "answer"
    """Field of a row that holds the reference answer, or a list of right answers: the first is
    trained on, and an evaluation accepts any. It may lead into a row as question_field does."""
    question_jinja: str | None = None
    """Jinja that makes the question from the fields of a row and from row, which holds them all: a
    template where it has {{ or {%, else an expression."""
    answer_jinja: str | None = None
    """The same for the answer; an expression may give a list of right answers."""
    messages_field: str = "messages"
    """Field that holds a list of {role, content} turns; read where a chat template is used, unless
    question_jinja is set."""
    strip_suffixes: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """Endings to remove from answers, such as <|endoftext|>."""
    source_field: str | None = None
    """Field of a row that names its source, for counts, licences and logs; null: rows have none of
    their own."""
    licence: str | None = None
    """Licence of the rows, such as CC-BY-4.0, for the manifest of prepared data; null: none is
    stated. With source_field the sources of tulu-3 have their own."""

    @model_validator(mode="after")
    def _one_way_to_read_a_row(self) -> "RowsConfig":
        for name in ("question_jinja", "answer_jinja"):
            if self.preset is not None and getattr(self, name) is not None:
                raise ValueError(
                    f"preset={self.preset} and {name} both say how rows are read; leave one out"
                )
        return self

    @model_validator(mode="after")
    def _settings_of_the_library(self) -> "RowsConfig":
        for name, source in (("subset", "hub"), ("revision", "hub"), ("data_dir", "tfds")):
            if getattr(self, name) is not None and self.source != source:
                raise ValueError(
                    f"{name}={getattr(self, name)} is a setting of the source {source}; set "
                    f"data.source={source} or leave it out"
                )
        if self.split != "train" and self.source not in (None, "tfds", "hub"):
            raise ValueError(
                f"split={self.split} chooses from a data set of tfds or the hub, and the source "
                f"{self.source} has no splits; leave it out"
            )
        return self

    @property
    def location(self) -> str:
        """Where the rows come from, in one name: a path, a list of them, or a generator."""
        return str(self.source) if self.path is None else location(self.path)


class MixturePart(RowsConfig):
    """One source of a mixture."""

    name: str = Field(pattern=r"^[\w.-]+$")
    """Name of the source, which its rows keep."""
    weight: float | None = Field(default=None, gt=0)
    """Its share of the mixture relative to the weights of the others. The mixture is the largest in
    which no row is repeated."""
    rows: int | None = Field(default=None, ge=1)
    """How many of its rows are drawn by seed; null: all of them."""

    @model_validator(mode="after")
    def _reads_files(self) -> "MixturePart":
        if self.path is None or self.source in GENERATORS:
            raise ValueError(f"the source {self.name} needs files; set its path")
        if self.source == "prepared":
            raise ValueError(
                f"the source {self.name} is prepared data, which is no part of a mixture; prepare "
                "the mixture"
            )
        if self.weight is not None and self.rows is not None:
            raise ValueError(f"the source {self.name} has weight and rows; leave one out")
        return self


class Benchmark(RowsConfig):
    """Questions that a model is evaluated on; their answers are not read."""

    @model_validator(mode="after")
    def _reads_files(self) -> "Benchmark":
        if self.path is None or self.source in GENERATORS:
            raise ValueError("a benchmark needs files; set its path")
        if self.source == "prepared":
            raise ValueError(
                "a benchmark cannot be prepared data; name the files that it was prepared from"
            )
        return self


def _benchmarks(value: Any) -> Any:
    """A path alone stands for the files of a benchmark with the usual fields."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple({"path": one} if isinstance(one, str | Path) else one for one in values)


Benchmarks = Annotated[
    tuple[Benchmark, ...],
    BeforeValidator(_benchmarks, json_schema_input_type=str | list[str | Benchmark]),
]
"""Files of benchmarks: paths, or mappings with the keys of `RowsConfig`."""
