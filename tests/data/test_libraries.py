"""Data sets of TensorFlow Datasets, without TensorFlow, and of the Hugging Face hub, offline."""

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.config.load import Section, load_config
from nrt_jax.data import hub_rows
from nrt_jax.data.digests import digests_of_data
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.tfds_rows import TfdsRows
from nrt_jax.data.training_rows import evaluation_source, read_source
from nrt_jax.errors import InputError


class Run(Section):
    data: DataConfig


def config_of(*overrides: str) -> DataConfig:
    return load_config(Run, [], [f"data.{override}" for override in overrides]).data


def fields(config: DataConfig) -> list:
    assert config.path is not None
    return [row.fields for row in read_source(config, config.path)]


def refusal(config: DataConfig) -> str:
    with pytest.raises(InputError) as caught:
        fields(config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- TensorFlow Datasets -------------------------------------------------------------------------


def example(i: int) -> dict:
    turns = [{"role": "user", "content": f"{i}+ü"}, {"role": "assistant", "content": "yes"}]
    return {
        "question": f"{i}+ü",
        "answer": 0.1 + i,
        "count": i,
        "messages": turns,
        "right": ["a", "b"],
    }


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """A folder with the data set my_set 1.0.0: six training rows in two shards, two of a test."""
    import tensorflow_datasets as tfds
    from array_record.python.array_record_module import ArrayRecordWriter

    folder = tmp_path_factory.mktemp("sets")
    out = folder / "my_set" / "1.0.0"
    out.mkdir(parents=True)
    text = tfds.features.Text()
    features = tfds.features.FeaturesDict(
        {
            "question": text,
            "answer": np.float32,
            "count": np.int64,
            "messages": tfds.features.Sequence({"role": text, "content": text}),
            "right": tfds.features.Sequence(text),
        }
    )
    infos = []
    for split, lengths in {"train": [4, 2], "test": [2]}.items():
        template = tfds.core.ShardedFileTemplate(
            data_dir=out, dataset_name="my_set", split=split, filetype_suffix="array_record"
        )
        rows = iter(range(100))
        for shard, length in enumerate(lengths):
            name = template.sharded_filepath(shard_index=shard, num_shards=len(lengths))
            writer = ArrayRecordWriter(str(name), "group_size:1")
            for _ in range(length):
                encoded = features.encode_example(example(next(rows)))
                writer.write(features.serialize_example(encoded))
            writer.close()
        infos.append(
            tfds.core.SplitInfo(
                name=split, shard_lengths=lengths, num_bytes=0, filename_template=template
            )
        )
    tfds.folder_dataset.write_metadata(
        data_dir=out, features=features, split_infos=infos, check_data=False
    )
    return folder


@pytest.fixture
def directory(prepared) -> Path:
    return prepared / "my_set" / "1.0.0"


def test_a_prepared_set_is_told_by_its_files(directory):
    rows = fields(config_of(f"path={directory}", "answer_jinja=right"))
    assert [row["question"] for row in rows] == [f"{i}+ü" for i in range(6)]
    assert rows[0]["answer"] == ["a", "b"]
    assert "tensorflow" not in sys.modules


def test_values_of_tfds_are_those_of_json_rows(directory):
    rows = fields(config_of(f"path={directory}", "source=tfds", "answer_jinja=row"))
    assert rows[1]["answer"] == example(1) | {"answer": 1.1}
    one, *_ = fields(
        config_of(f"path={directory}", "preset=messages", "template=tulu", "split='test[1:]'")
    )
    assert one["messages"] == example(1)["messages"]


@pytest.mark.parametrize("name", ["my_set", "my_set:1.0.0"])
def test_a_name_in_a_folder_of_sets(name, prepared, directory):
    config = config_of("source=tfds", f"data_dir={prepared}", f"path={name}", "split=test")
    assert config.path == name
    assert fields(config) == fields(config_of(f"path={directory}", "split=test"))
    assert len(fields(config)) == 2


def test_an_evaluation_split(prepared, tokenizer, directory):
    given = config_of(
        f"path={directory}",
        f"eval_path={directory}",
        "eval_split=test",
        "split='train[2:]'",
        "question_jinja=count|string + '+1'",
        "answer_jinja=count",
    )
    dataset = load_dataset(given, tokenizer)
    assert [row.example.question for row in dataset.train] == ["2+1", "3+1", "4+1", "5+1"]
    assert sorted(row.example.question for row in dataset.eval) == ["0+1", "1+1"]


def test_digests_are_those_of_the_split(directory, tmp_path):
    copy = tmp_path / "1.0.0"
    shutil.copytree(directory, copy)
    config = config_of(f"path={copy}", "split=test", f"eval_path={copy}", "eval_split=train")
    before = digests_of_data(config, copy)
    shards = [
        "my_set-train.array_record-00000-of-00002",
        "my_set-train.array_record-00001-of-00002",
    ]
    assert sorted(before) == ["features.json", "my_set-test.array_record-00000-of-00001"]
    assert sorted(digests_of_data(evaluation_source(config), copy)) == ["features.json", *shards]
    shutil.copy(copy / shards[1], copy / "my_set-test.array_record-00000-of-00001")
    assert digests_of_data(config, copy) != before


def test_sets_that_cannot_be_read(prepared, directory, tmp_path):
    named = ("source=tfds", f"data_dir={prepared}")
    for overrides, said in (
        ([f"path={directory}", "split=validation"], "Unknown split 'validation'"),
        ([*named, "path=my_sets"], "my_sets: no such prepared data set is in data.data_dir"),
        ([*named, "path=[a, b]"], "data.source=tfds reads one data set, not 2"),
        (["source=tfds", f"path={directory.parent}"], "has no dataset_info.json and"),
        ([f"path={directory}", "answer_field=right_one"], "has no column 'right_one'"),
    ):
        assert said in refusal(config_of(*overrides))


def test_near_duplicates_of_a_set(directory, tmp_path):
    """The work knows the files of the split, and its tasks share the rows."""
    pytest.importorskip("datatrove")
    from nrt_jax.data.near_duplicates import RowReader, stages

    config = config_of(f"path={directory}", "answer_field=question", "split=train[:5]")
    stages(config, tmp_path / "out", 2)
    files = json.loads((tmp_path / "out" / "settings.json").read_text())["files"]
    assert [Path(name).name for name, *_ in files] == list(TfdsRows(config, directory).files)
    reader = RowReader(config)
    shares = [[doc.metadata["row"] for doc in reader.run(None, rank, 2)] for rank in range(2)]
    assert shares == [["row 0", "row 2", "row 4"], ["row 1", "row 3"]]


def test_duplicates_of_a_set(directory, tokenizer):
    same = ("question_jinja='1'", "answer_jinja='2'", "eval_rows=0")
    dataset = load_dataset(config_of(f"path={directory}", *same), tokenizer)
    assert (len(dataset.train), dataset.bad_rows) == (1, {"duplicate": 5})
    assert dataset.rejected[0].detail.startswith(
        f"has the prompt and the answer of {directory} row 0;"
    )


def test_tfrecord_needs_tensorflow(directory, tmp_path, monkeypatch):
    copy = tmp_path / "1.0.0"
    shutil.copytree(directory, copy)
    for file in copy.glob("*array_record*"):
        file.rename(copy / file.name.replace("array_record", "tfrecord"))
    info = json.loads((copy / "dataset_info.json").read_text())
    (copy / "dataset_info.json").write_text(json.dumps(info | {"fileFormat": "tfrecord"}))
    config = config_of(f"path={copy}")
    monkeypatch.setitem(sys.modules, "tensorflow", None)
    text = refusal(config)
    assert "is stored as tfrecord, which TFDS reads with TensorFlow alone" in text
    assert f"tfds convert_format --dataset_dir {copy} --out_file_format array_record" in text


# --- the hub -------------------------------------------------------------------------------------


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A local data set of the name owner/name, and its commit without asking the hub."""
    pytest.importorskip("datasets")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    monkeypatch.setattr(hub_rows, "commit_of", lambda name, revision: f"commit of {revision}")
    folder = tmp_path / "owner" / "name"
    folder.mkdir(parents=True)
    for split, count in (("train", 5), ("test", 2)):
        rows = [{"question": f"{i}+1", "answer": i, "source": split} for i in range(count)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return ("source=hub", "path=owner/name")


def test_rows_of_the_hub(hub, tokenizer):
    config = config_of(*hub, "split=test")
    assert (config.path, config.location) == ("owner/name", "owner/name")
    assert fields(config) == [{"question": f"{i}+1", "answer": i} for i in range(2)]
    dataset = load_dataset(
        config_of(*hub, "eval_path=owner/name", "eval_split=test", "shuffle=false"), tokenizer
    )
    assert [row.example.answer for row in dataset.train] == ["2", "3", "4"]
    assert dataset.bad_rows == {"question of the evaluation": 2}


def test_the_permuted_rows_of_the_hub(hub, tokenizer):
    order = np.random.default_rng(3).permutation(5).tolist()
    permuted = (*hub, "permutation_seed=3", "eval_rows=2", "train_rows=2")
    dataset = load_dataset(config_of(*permuted, "total_rows=5"), tokenizer)
    assert [row.example.index for row in dataset.train] == order[2:4]
    with pytest.raises(
        InputError, match=r"does not tell how many rows it has.*set data.total_rows"
    ):
        load_dataset(config_of(*permuted), tokenizer)
    with pytest.raises(InputError, match=r"owner/name: has more rows than data.total_rows=4"):
        load_dataset(config_of(*permuted, "total_rows=4"), tokenizer)


def test_the_commit_is_the_digest(hub):
    config = config_of(*hub, "revision=v2")
    assert digests_of_data(config, "owner/name") == {"": "commit of v2"}


def test_what_the_hub_does_not_have(hub):
    text = refusal(config_of(*hub, "split=validation"))
    assert "Available splits: ['train', 'test']; correct data.split=validation" in text
    assert "'german' not found" in refusal(config_of(*hub, "subset=german"))
    assert "has no column 'reply'" in refusal(config_of(*hub, "answer_field=reply"))
    assert "must be the name of a data set, OWNER/NAME" in refusal(
        config_of("source=hub", "path=name")
    )


def test_without_a_network(monkeypatch):
    pytest.importorskip("datasets")
    # A proxy that nothing listens at stands for the missing network.
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    text = refusal(config_of("source=hub", "path=owner/of-no-network"))
    assert "owner/of-no-network: the hub cannot be reached (" in text
    assert "run hf download --repo-type dataset owner/of-no-network" in text


def test_without_the_library(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    text = refusal(config_of("source=hub", "path=owner/without-library"))
    assert "needs the package datasets, which is not installed; pip install 'nrt-jax[hub]'" in text


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["source=jsonl", "subset=a"], "subset=a is a setting of the source hub"),
        (["data_dir=sets"], "is a setting of the source tfds; set data.source=tfds"),
        (["source=jsonl", "split=test"], "the source jsonl has no splits; leave it out"),
    ],
)
def test_settings_of_another_source(overrides, said):
    with pytest.raises(InputError) as caught:
        config_of("path=x", *overrides)
    assert said in str(caught.value)
