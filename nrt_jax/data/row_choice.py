"""Which rows of a source are read, chosen before any is tokenised.

permuted    4 0 6 2 | 5 1 3 7        permutation_seed, 8 rows
evaluation  4 0                      eval_rows: 2
training    6 2 5                    train_rows: 2, of which max_bad_share: 0.3 may be unusable
"""

import math
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64

from nrt_jax.config.data import DataConfig
from nrt_jax.data.all_rows import count_rows, read_all, told_rows
from nrt_jax.data.bad_rows import BadRow
from nrt_jax.data.row_fields import root_of, value_of
from nrt_jax.data.rows import Keep
from nrt_jax.errors import InputError


class RowChoice(NamedTuple):
    """The rows of a source that are read, by their numbers."""

    name: str
    is_read: Bool[np.ndarray, "rows"]
    order: Int64[np.ndarray, "rows"] | None = None
    """The numbers of all rows in the permuted order; None without data.permutation_seed."""

    def keep(self, first: int) -> Keep:
        """Whether a row is read, where the numbers start from `first`."""
        read = self.is_read.tolist()

        def is_kept(number: int) -> bool:
            if number - first >= len(read):
                raise InputError(
                    f"{self.name}: has more rows than data.total_rows={len(read)}; correct it"
                )
            return read[number - first]

        return is_kept


def choose_rows(config: DataConfig) -> RowChoice | None:
    """The rows of a source that the config may train on or hold out; None for all of them.

    The number of rows must be known, and their sources where the config asks for these: both are
    read from the files first. Raises InputError for another number than data.total_rows, and for
    sources that have too few rows.
    """
    sources = None
    if config.exclude_licences or config.source_rows is not None:
        sources = _sources(config)
    if config.permutation_seed is None:
        return None if sources is None else RowChoice(config.location, _allowed(config, sources))
    counted = count_rows(config, config.path) if sources is None else len(sources.codes)
    order = row_order(config, counted)
    held_out, training = np.split(order, [0 if config.eval_path is not None else config.eval_rows])
    if sources is not None:
        allowed = _allowed(config, sources)
        held_out, training = held_out[allowed[held_out]], training[allowed[training]]
    if config.source_rows is not None:
        assert sources is not None, "source_rows reads the sources"
        training = _of_sources(config, training, sources)
    elif config.train_rows is not None:
        training = training[: _with_spare(config.train_rows, config.max_bad_share)]
    is_read = np.zeros(len(order), bool)
    is_read[held_out] = is_read[training] = True
    return RowChoice(config.location, is_read, order)


def rows_to_read(config: DataConfig, choice: RowChoice | None) -> int | None:
    """How many rows of a source are read; None where nothing tells it."""
    return told_rows(config, config.path) if choice is None else int(choice.is_read.sum())


def row_ranks(order: Int64[np.ndarray, "rows"]) -> Int64[np.ndarray, "rows"]:
    """The place of each row in a permuted order, by its number."""
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    return ranks


def row_order(config: DataConfig, counted: int | None) -> Int64[np.ndarray, "rows"]:
    """The numbers of all rows in the order of data.permutation_seed.

    `counted` is how many there are, None where that is not known. Raises InputError where it is not
    data.total_rows.
    """
    told = config.total_rows
    total = counted if told is None else told
    if total is None:
        raise InputError(
            f"{config.location}: does not tell how many rows it has, which its permutation depends "
            "on; set data.total_rows"
        )
    if counted not in (None, total):
        raise InputError(
            f"{config.location}: has {counted} rows and not data.total_rows={told}, and another "
            "number gives another permutation; name the release that was meant, or correct it"
        )
    return np.random.default_rng(config.permutation_seed).permutation(total)


# --- sources of rows -----------------------------------------------------------------------------


class _Sources(NamedTuple):
    names: list[str]
    codes: Int64[np.ndarray, "rows"]
    """Of each row, the place of its source among the names; a row without one has ""."""


def _sources(config: DataConfig) -> _Sources:
    """What every row names as its source."""
    field = config.source_field
    assert field is not None, "the config requires source_field"
    places: dict[str, int] = {"": 0}
    codes: list[int] = []
    for row in read_all(config, config.path, lambda names: (root_of(field, names),)):
        codes += [0] * (row.number - len(codes))
        codes.append(places.setdefault(_source(row.fields, field), len(places)))
    return _Sources(list(places), np.array(codes, np.int64))


def _source(fields: Any, field: str) -> str:
    """The source of a row; "" for one without, which is refused when it is read."""
    if isinstance(fields, BadRow):
        return ""
    try:
        value = value_of(fields, field)
    except BadRow:
        return ""
    return value if isinstance(value, str) else ""


def _allowed(config: DataConfig, sources: _Sources) -> Bool[np.ndarray, "rows"]:
    """Which rows are of sources whose licences are not excluded."""
    return ~np.array([config.excludes(name) for name in sources.names])[sources.codes]


def _of_sources(
    config: DataConfig, training: Int64[np.ndarray, "left"], sources: _Sources
) -> Int64[np.ndarray, "read"]:
    """Of each source its first rows, with a share of spare ones."""
    counts = config.rows_by_source
    assert counts is not None, "the config has source_rows"
    chosen = []
    for name, rows in counts.items():
        if name not in sources.names:
            near = get_close_matches(name, sources.names, n=1)
            meant = f"did you mean {near[0]!r}?" if near else "correct or remove it"
            raise InputError(
                f"{config.location}: data.source_rows names the source {name!r}, which no row has; "
                f"{meant}"
            )
        of_source = training[sources.codes[training] == sources.names.index(name)]
        if len(of_source) < rows:
            raise InputError(
                f"{config.location}: the source {name} has {len(of_source)} training rows, fewer "
                f"than data.source_rows={rows}; lower it"
            )
        chosen.append(of_source[: _with_spare(rows, config.max_bad_share)])
    return np.concatenate(chosen)


def _with_spare(rows: int, bad_share: float) -> int | None:
    """How many rows leave `rows` when a share of them is bad; None for all."""
    return None if bad_share >= 1 else math.ceil(rows / (1 - bad_share))
