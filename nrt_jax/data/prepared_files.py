"""Prepared examples as files: ArrayRecord shards of tf.train.Example, with the metadata of TFDS."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from nrt_jax.types import Example, TokenizedExample

DATASET, VERSION = "prepared", "1.0.0"
"""Name and version by which TFDS finds the data; the version is that of the records."""
FOLDER = f"{DATASET}/{VERSION}"
_TEXTS = ("question", "answer", "user_text", "source", "messages")
_TOKENS = ("prompt_tokens", "answer_tokens", "after_start_tokens")
# A chunk of its own for each record, so that one can be read without its neighbours.
_WRITER_OPTIONS = "group_size:1"
# Threads for single records would take longer than the records.
_READER_OPTIONS, _READER_BUFFER_BYTES = "readahead_buffer_size:0,max_parallelism:0", 2**15


def encode(example: TokenizedExample, turns: Sequence[Mapping[str, str]] = ()) -> bytes:
    """A record: texts, and token ids as little-endian int32 bytes.

    `turns` are those of a row that is a conversation. The same example gives the same bytes in
    every process.
    """
    of = example.example
    messages = json.dumps(turns, ensure_ascii=False) if turns else ""
    texts = (of.question, of.answer, of.user_text, of.source, messages)
    record = _example_class()()
    feature = record.features.feature
    feature["index"].int64_list.value.append(of.index)
    for name, text in zip(_TEXTS, texts, strict=True):
        feature[name].bytes_list.value.append(text.encode())
    feature["aliases"].bytes_list.value.extend(alias.encode() for alias in of.aliases)
    for name in _TOKENS:
        ids = np.asarray(getattr(example, name), "<i4")
        feature[name].bytes_list.value.append(ids.tobytes())
    return record.SerializeToString(deterministic=True)


def decode(record: bytes) -> TokenizedExample:
    """The example of a record."""
    feature = _features_of(record)
    text = {name: _bytes(feature, name).decode() for name in _TEXTS if name != "messages"}
    tokens = {name: np.frombuffer(_bytes(feature, name), "<i4") for name in _TOKENS}
    aliases = tuple(alias.decode() for alias in feature["aliases"].bytes_list.value)
    return TokenizedExample(
        example=Example(index=feature["index"].int64_list.value[0], aliases=aliases, **text),
        **{name: ids.astype(np.int32) for name, ids in tokens.items()},
    )


def turns_of(record: bytes) -> list[dict[str, str]]:
    """The turns of a record; none where its row is a question and an answer."""
    messages = _bytes(_features_of(record), "messages")
    return json.loads(messages) if messages else []


def _features_of(record: bytes) -> Mapping[str, Any]:
    return _example_class().FromString(record).features.feature


def _example_class() -> Any:
    """tf.train.Example; imported here because TFDS takes half a second."""
    from tensorflow_datasets.proto import tf_example_pb2

    messages: Any = tf_example_pb2
    return messages.Example


def _bytes(feature: Mapping[str, Any], name: str) -> bytes:
    return feature[name].bytes_list.value[0]


# --- shards --------------------------------------------------------------------------------------


def shard_name(split: str, index: int, count: int) -> str:
    """The name by which TFDS finds a shard."""
    return f"{DATASET}-{split}.array_record-{index:05d}-of-{count:05d}"


def write_shard(path: Path, records: Iterable[bytes]) -> None:
    """Write the records and wait until they are on the disk; OSError with the name of the file."""
    from array_record.python.array_record_module import ArrayRecordWriter

    try:
        writer = ArrayRecordWriter(str(path), _WRITER_OPTIONS)
        for record in records:
            writer.write(record)
        writer.close()
        with path.open("rb") as file:
            os.fsync(file.fileno())
    except (RuntimeError, OSError) as error:
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        reason = str(error).removeprefix("write() failed: ").partition(";")[0]
        raise OSError(_error_number(reason), reason, str(path)) from error


def _error_number(reason: str) -> int | None:
    """The number of the system's error that a library tells by its message alone."""
    import errno

    return next((number for number in errno.errorcode if os.strerror(number) == reason), None)


def open_shard(path: Path) -> Any:
    """An ArrayRecordReader for records at random places."""
    from array_record.python.array_record_module import ArrayRecordReader

    return ArrayRecordReader(
        str(path), _READER_OPTIONS, file_reader_buffer_size=_READER_BUFFER_BYTES
    )


def write_metadata(folder: Path, rows_by_split: Mapping[str, Sequence[int]]) -> None:
    """features.json and dataset_info.json of TFDS, from the rows of each shard of each split."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import folder_dataset

    tokens = {name: tfds.features.Tensor(shape=(), dtype=np.bytes_) for name in _TOKENS}
    features = {
        "index": tfds.features.Scalar(np.int64),
        "aliases": tfds.features.Sequence(tfds.features.Text()),
        **{name: tfds.features.Text() for name in _TEXTS},
        **tokens,
    }
    splits = [
        tfds.core.SplitInfo(name=split, shard_lengths=list(rows), num_bytes=0)
        for split, rows in rows_by_split.items()
    ]
    folder_dataset.write_metadata(
        data_dir=folder, features=features, split_infos=splits, version=VERSION, check_data=False
    )
