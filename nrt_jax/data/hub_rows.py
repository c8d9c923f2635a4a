"""Rows of a data set of the Hugging Face hub, streamed by the library `datasets`."""

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

from nrt_jax.config.data import DataConfig
from nrt_jax.data.column_rows import columns_of
from nrt_jax.data.rows import FieldsOf, Row
from nrt_jax.errors import InputError

_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class HubRows:
    """The rows of the config's split of a data set, at the commit that its revision names now.

    Raises InputError for a name, a subset or a split that is not there, without the library, and
    without a network.
    """

    def __init__(self, config: DataConfig, where: Any):
        if not isinstance(where, str) or not _NAME.fullmatch(where):
            raise InputError(f"data.path={where}: must be the name of a data set, OWNER/NAME")
        self.name, self._config = where, config
        self.commit = commit_of(where, config.revision)

    def rows(self, fields_of: FieldsOf, keep: Callable[[int], bool]) -> Iterator[Row]:
        """The rows whose numbers are kept, with the fields `fields_of(names of all)`."""
        try:
            stream = self._stream()
            names = stream.column_names
            if names is not None:
                stream = stream.select_columns(columns_of(self.name, names, fields_of))
            for number, fields in enumerate(stream):
                if keep(number):
                    yield Row(number, f"row {number}", fields, self.name)
        except (InputError, GeneratorExit):
            raise
        except Exception as error:  # of the network, of the hub, and of each kind of file
            raise _unreachable(self.name, error) from error

    def count(self) -> int | None:
        """How many rows there are; None where the card of the data set does not tell it."""
        splits = self._stream().info.splits or {}
        split = splits.get(self._config.split)
        return None if split is None else split.num_examples or None

    def _stream(self) -> Any:
        import datasets

        config = self._config
        try:
            return datasets.load_dataset(
                self.name,
                config.subset,
                split=config.split,
                revision=self.commit,
                streaming=True,
            )
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise InputError(
                f"{self.name}: {reason}; correct data.split={config.split} or data.subset="
                f"{config.subset or 'null'}"
            ) from error
        except Exception as error:  # as above
            raise _unreachable(self.name, error) from error


@cache
def commit_of(name: str, revision: str | None) -> str:
    """The commit of a revision, the same in the whole process though the branch may move."""
    try:
        import datasets  # noqa: F401
        from huggingface_hub import HfApi
        from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    except ImportError as error:
        raise InputError(
            f"data.source=hub: needs the package {error.name}, which is not installed; "
            "pip install 'nrt-jax[hub]'"
        ) from error
    try:
        return str(HfApi().dataset_info(name, revision=revision).sha)
    except RevisionNotFoundError as error:
        raise InputError(
            f"{name}: the hub has no revision {revision!r} of it; correct data.revision"
        ) from error
    except RepositoryNotFoundError as error:
        raise InputError(
            f"{name}: the hub has no such data set, or not for you; correct data.path, or run "
            "hf auth login"
        ) from error
    except Exception as error:  # of the network, in classes of several packages
        raise _unreachable(name, error) from error


def _unreachable(name: str, error: Exception) -> InputError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return InputError(
        f"{name}: the hub cannot be reached ({reason}); check the network, or where there is one "
        f"run hf download --repo-type dataset {name} --local-dir DIR, copy DIR here, and name its "
        "files in data.path with data.source=null"
    )
