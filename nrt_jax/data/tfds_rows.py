"""Rows of a data set that TensorFlow Datasets has prepared, read by TFDS without TensorFlow."""

import importlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from nrt_jax.config.data import DataConfig
from nrt_jax.data.column_rows import columns_of
from nrt_jax.data.files import as_path, reaching
from nrt_jax.data.rows import FieldsOf, Row
from nrt_jax.errors import InputError

_METADATA = ("dataset_info.json", "features.json")


def is_tfds_directory(where: Any) -> bool:
    """Whether a data path is a directory with the metadata of TFDS."""
    if not isinstance(where, Path | str):
        return False
    path = as_path(where)
    with reaching(path):
        return all((path / name).is_file() for name in _METADATA)


class TfdsRows:
    """The rows of the config's split of one prepared data set.

    `where` is its directory, or its name in `data.data_dir`. Raises InputError for a set or a split
    that is not there, and for one in a format that TFDS reads with TensorFlow, where that is
    missing.
    """

    def __init__(self, config: DataConfig, where: Any):
        if not isinstance(where, Path | str):
            raise InputError(
                f"data.source=tfds reads one data set, not {len(where)}; use a mixture"
            )
        self.name, self._split = str(where), config.split
        self._builder = _builder(where, config.data_dir)
        self._info = _of_tfds(self._builder.info.splits.__getitem__, self._split, self.name)

    def count(self) -> int:
        """How many rows there are."""
        return self._info.num_examples

    def rows(self, fields_of: FieldsOf, keep: Callable[[int], bool]) -> Iterator[Row]:
        """The rows whose numbers are kept, with the fields `fields_of(names of all)`."""
        features = self._builder.info.features
        columns = columns_of(self.name, list(features), fields_of)
        for number, example in self._examples(keep):
            fields = {name: _plain(example[name], features[name]) for name in columns}
            yield Row(number, f"row {number}", fields, self.name)

    @property
    def files(self) -> dict[str, Any]:
        """The file with the types of the fields, and those that hold the split, by name."""
        directory = as_path(str(self._builder.data_dir))
        files = [as_path(str(file.filename)) for file in self._info.file_instructions]
        return {file.name: file for file in (directory / _METADATA[1], *files)}

    def _examples(self, keep: Callable[[int], bool]) -> Iterator[tuple[int, Any]]:
        try:
            examples: Any = self._builder.as_data_source(self._split)
        except NotImplementedError:
            examples = self._with_tensorflow()
        if isinstance(examples, Sequence):
            yield from ((i, examples[i]) for i in range(len(examples)) if keep(i))
        else:
            yield from ((i, example) for i, example in enumerate(examples) if keep(i))

    def _with_tensorflow(self) -> Any:
        """The examples of a format without random access, such as TFRecord, in order."""
        import tensorflow_datasets as tfds

        try:
            importlib.import_module("tensorflow")
        except ImportError:
            kind = self._builder.info.file_format.value
            raise InputError(
                f"{self.name}: is stored as {kind}, which TFDS reads with TensorFlow alone, and it "
                "is not installed; pip install tensorflow, or run tfds convert_format "
                f"--dataset_dir {self._builder.data_dir} --out_file_format array_record --out_path "
                "OUT where it is installed, and name OUT in data.path"
            ) from None
        # One file at a time, so that the order is that of the files.
        config = tfds.ReadConfig(interleave_cycle_length=1)
        return tfds.as_numpy(
            self._builder.as_dataset(self._split, shuffle_files=False, read_config=config)
        )


def _builder(where: Any, data_dir: Any) -> Any:
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core.read_only_builder import builder_from_files

    if data_dir is not None:
        try:
            return builder_from_files(str(where), data_dir=str(data_dir))
        except tfds.core.DatasetNotFoundError:
            raise InputError(
                f"{where}: no such prepared data set is in data.data_dir={data_dir}; correct the "
                f"name, or run tfds build {where} --data_dir {data_dir} --file_format array_record"
            ) from None
    path = as_path(where)
    if not is_tfds_directory(path if isinstance(path, Path) else where):
        raise InputError(
            f"{where}: has no {' and '.join(_METADATA)}; name the directory of a version of a "
            "prepared data set, or set data.data_dir and its name"
        )
    return _of_tfds(tfds.builder_from_directory, str(where), str(where))


def _of_tfds(call: Callable[[str], Any], value: str, name: str) -> Any:
    """What TFDS gives for a value; whatever it raises, which has many classes, as an InputError."""
    try:
        return call(value)
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        remedy = "restore it" if value == name else "correct data.split"
        raise InputError(f"{name}: {reason}; {remedy}") from error


def _plain(value: Any, feature: Any) -> Any:
    """A value of TFDS as that of a JSON row: text, numbers, lists, and objects in lists."""
    import numpy as np
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.FeaturesDict):
        return {name: _plain(value[name], feature[name]) for name in feature}
    if isinstance(feature, tfds.features.Sequence):
        inner = feature.feature
        if isinstance(inner, tfds.features.FeaturesDict):
            # TFDS has a list per field, in place of a list of objects.
            count = len(next(iter(value.values()), ()))
            value = [{name: value[name][i] for name in inner} for i in range(count)]
        return [_plain(one, inner) for one in value]
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if getattr(feature, "np_dtype", None) == np.float32 and np.ndim(value) == 0:
        # The shortest text of the stored precision: 0.1, not 0.10000000149011612.
        return float(str(np.float32(value)))
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value
