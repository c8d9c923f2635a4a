"""Which files a data path means: lists, globs, folders, saved data sets, other places."""

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow
import pyarrow.ipc
import pytest
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem

from nrt_jax.config.data import DataConfig
from nrt_jax.data.files import find_files
from nrt_jax.data.training_rows import read_source
from nrt_jax.errors import InputError


@pytest.fixture
def shards(tmp_path) -> Callable[..., Path]:
    """A folder with a file of one row for each name, in the order of the names given."""

    def write(*names: str) -> Path:
        for i, name in enumerate(names):
            path = tmp_path / "rows" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps({"question": f"q{i}", "answer": name}) + "\n\n")
        return tmp_path / "rows"

    return write


def names(where, source=None) -> list[str]:
    return [file.path.name for file in find_files(where, source)]


def refusal(where, source=None) -> str:
    with pytest.raises(InputError) as caught:
        find_files(where, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_file_a_list_a_glob_and_a_folder(shards):
    folder = shards("b.jsonl", "a.jsonl", "c.json", ".hidden.jsonl", "README.md", "deep/d.jsonl")
    assert names(folder / "b.jsonl") == ["b.jsonl"]
    assert names((folder / "b.jsonl", folder / "a.jsonl")) == ["b.jsonl", "a.jsonl"]
    assert names(folder / "*.jsonl") == ["a.jsonl", "b.jsonl"]
    assert names(folder / "**/*.jsonl") == ["a.jsonl", "b.jsonl", "d.jsonl"]
    assert names(folder, "jsonl") == ["a.jsonl", "b.jsonl"]
    # A name with the characters of a glob is a file where there is one.
    shards("[a].jsonl")
    assert names(folder / "[a].jsonl") == ["[a].jsonl"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("x.jsonl", "jsonl"),
        ("x.NDJSON.gz", "jsonl"),
        ("x.json", "json"),
        ("x.csv.zst", "csv"),
        ("x.tsv", "tsv"),
        ("x.y.parquet", "parquet"),
        ("x.arrow", "arrow"),
    ],
)
def test_the_name_tells_the_format(name, expected):
    (file,) = find_files(Path("/nowhere") / name, None)
    assert file.format == expected
    (file,) = find_files(Path("/nowhere") / name, "tsv")
    assert file.format == "tsv"


def test_what_is_no_set_of_files(shards, tmp_path):
    folder = shards("a.jsonl", "b.csv", "notes.txt")
    assert refusal(folder).startswith(
        f"{folder}: holds files of several formats (jsonl, csv); set data.source to one"
    )
    assert refusal(folder, "parquet").startswith(f"{folder}: Is a directory without parquet files;")
    assert refusal(folder / "*.parquet") == (
        f"{folder}/*.parquet: matches no file; correct data.path or data.eval_path"
    )
    assert refusal(folder / "notes.txt").startswith(
        f"{folder}/notes.txt: the name tells no format; set data.source to jsonl, json, csv, tsv"
    )


def test_a_missing_shard_is_named(shards):
    folder = shards("train-00000-of-00003.jsonl", "train-00002-of-00003.jsonl")
    missing = f"{folder}/train-00001-of-00003.jsonl: this shard is missing; restore it"
    assert refusal(folder).startswith(missing)
    assert refusal(folder / "train-*").startswith(missing)
    # A glob that leaves it out on purpose is none.
    assert len(names(folder / "*-0000[02]-*")) == 2


def test_shards_of_several_sets_are_not_mixed(shards):
    folder = shards("train-00000-of-00001.jsonl", "test-00000-of-00001.jsonl")
    assert refusal(folder) == (
        f"{folder}: holds the shards of several sets (test, train); name one, as in "
        f"data.path='{folder}/test-*'"
    )


def test_rows_are_numbered_through_and_name_their_files(shards):
    folder = shards("a.jsonl", "b.jsonl")
    (folder / "b.jsonl").write_text('\n{"question": "q", "answer": "x"}\n{"question": "r"')
    config = DataConfig(path=folder)
    assert config.path == folder
    rows = list(read_source(config, folder))
    # Blank lines at the end of a file have no number.
    assert [row.number for row in rows] == [0, 2, 3]
    assert [row.place for row in rows] == [
        f"{folder}/a.jsonl line 1",
        f"{folder}/b.jsonl line 2",
        f"{folder}/b.jsonl line 3",
    ]
    (alone,) = read_source(config, folder / "a.jsonl", first=7)
    assert (alone.number, alone.place) == (7, "line 1")


# --- saved data sets -----------------------------------------------------------------------------


def save(folder: Path, *shards: list[dict]) -> Path:
    """What `Dataset.save_to_disk` of the library datasets writes."""
    folder.mkdir(parents=True)
    described = []
    for i, rows in enumerate(shards):
        name = f"data-{i:05}-of-{len(shards):05}.arrow"
        described.append({"filename": name})
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_stream(folder / name, table.schema) as stream:
            stream.write_table(table)
    (folder / "state.json").write_text(json.dumps({"_data_files": described, "_split": "train"}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


ROW = {"question": "1+2", "answer": ["3", "=3"], "other": 1}


def test_a_saved_data_set(tmp_path):
    folder = save(tmp_path / "saved", [ROW] * 1500, [ROW])
    rows = list(read_source(DataConfig(path=folder), folder))
    assert len(rows) == 1501
    assert rows[-1].fields == {"question": "1+2", "answer": ["3", "=3"]}
    assert rows[-1].place == f"{folder}/data-00001-of-00002.arrow row 0"


def test_a_saved_data_set_with_splits(tmp_path):
    train = save(tmp_path / "saved" / "train", [ROW])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert refusal(tmp_path / "saved") == (
        f"{tmp_path}/saved: holds the splits train, test; name one of them, as in "
        f"{tmp_path}/saved/train"
    )
    assert names(train) == ["data-00000-of-00001.arrow"]
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    assert names(tmp_path / "saved") == ["data-00000-of-00001.arrow"]


def test_a_damaged_saved_data_set(tmp_path):
    folder = save(tmp_path / "saved", [ROW], [ROW])
    (folder / "data-00001-of-00002.arrow").unlink()
    assert refusal(folder) == (
        f"{folder}/data-00001-of-00002.arrow: this file of the data set is missing; restore it"
    )
    (folder / "state.json").write_text("{}")
    assert "state.json: names no data files; save the data set again" in refusal(folder)
    (folder / "state.json").write_text("{")
    assert "state.json: not JSON (" in refusal(folder)


# --- other places --------------------------------------------------------------------------------


class Bucket(DirFileSystem):
    """A folder that stands for gs://."""

    def _join(self, path):
        return super()._join(path.removeprefix("gs://") if isinstance(path, str) else path)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Path:
    files = Bucket(str(tmp_path), LocalFileSystem())
    monkeypatch.setattr(type(backend.fsspec_backend), "fs", lambda self, path: files)
    return tmp_path


@pytest.mark.parametrize("where", ["gs://rows/a.jsonl", "gs://rows", "gs://rows/*.jsonl"])
def test_an_address(where, bucket, shards):
    shards("a.jsonl")
    config = DataConfig.model_validate({"path": where})
    assert config.path == where
    (row,) = read_source(config, where)
    assert row.fields == {"question": "q0", "answer": "a.jsonl"}
    assert row.file == "gs://rows/a.jsonl"


def test_an_address_without_a_file(bucket):
    with pytest.raises(InputError, match=r"^gs://rows/b.jsonl: No such file or directory; set "):
        list(read_source(DataConfig(path="gs://rows/b.jsonl"), "gs://rows/b.jsonl"))


def test_an_address_whose_package_or_network_is_missing(monkeypatch):
    def fail(error):
        def fs(self, path):
            raise error

        monkeypatch.setattr(type(backend.fsspec_backend), "fs", fs)

    fail(ImportError("Please install gcsfs"))
    assert refusal("gs://b/x.jsonl") == (
        "gs://b/x.jsonl: cannot be reached (Please install gcsfs); install it"
    )
    fail(RuntimeError("no\nroute"))
    assert refusal("hf://datasets/o/n/x.jsonl") == (
        "hf://datasets/o/n/x.jsonl: cannot be reached (no route); check the address and the "
        "network, or copy the files"
    )
