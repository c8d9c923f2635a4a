"""The requests of an insert as one array: each array that a program takes costs the host a copy per
device.

A row of int32 is what one shard starts; floats and keys are there by their bits:

    columns   4 x K                     1       1       words       rest
              slot, row, sample, limit  prompt  stream  key's data  sampling

Letters: R shards, K samples of one prompt.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, UInt

from nrt_jax.engine.decode_state import SlotRequests, sample_keys_of_rows, slot_sampling
from nrt_jax.engine.sampling import Sampling, SlotSampling

_ONE = slot_sampling([Sampling()])
"""Shapes and dtypes of the settings of one request."""
_SETTINGS = sum(column.size for column in _ONE)


class PackedRequests(NamedTuple):
    """What up to K samples in each shard are to do; the slot of an unused one is -1."""

    data_RC: Int[np.ndarray, "R columns"]
    samples: int
    """K."""

    def fill(
        self,
        shard: int,
        *,
        slots: Int[np.ndarray, "k"],
        rows: list[int],
        first: int,
        limits: Int[np.ndarray, "k"],
        prompt: int,
        stream: int,
        key_data: UInt[np.ndarray, "words"],
        sampling: Int[np.ndarray, "settings"],
    ) -> None:
        """Start samples `first`, `first + 1`, ... of one request in a shard."""
        data_C, K, k = self.data_RC[shard], self.samples, len(slots)
        columns = (slots, rows, np.arange(first, first + k), limits)
        for number, column in enumerate(columns):
            data_C[number * K : number * K + k] = column
        data_C[4 * K : 4 * K + 2] = prompt, stream
        data_C[4 * K + 2 : -_SETTINGS] = key_data.view(np.int32)
        data_C[-_SETTINGS:] = sampling


def no_requests(shards: int, samples: int, key_words: int, prompt: int) -> PackedRequests:
    """Requests to be filled; `prompt` is no prompt slot."""
    data_RC = np.zeros((shards, 4 * samples + 2 + key_words + _SETTINGS), np.int32)
    data_RC[:, :samples], data_RC[:, 4 * samples] = -1, prompt
    return PackedRequests(data_RC, samples)


def unpacked(data_RC: Int[Array, "R columns"], samples: int) -> SlotRequests:
    """The requests of all shards, inside a program."""
    K, settings = samples, data_RC.shape[1] - _SETTINGS
    slot_RK, row_RK, sample_RK, limit_RK = (data_RC[:, i * K : (i + 1) * K] for i in range(4))
    key_data_R = jax.lax.bitcast_convert_type(data_RC[:, 4 * K + 2 : settings], np.uint32)
    return SlotRequests(
        slot_K=slot_RK,
        row_K=row_RK,
        prompt=data_RC[:, 4 * K],
        key_K=sample_keys_of_rows(key_data_R, data_RC[:, 4 * K + 1], sample_RK),
        limit_K=limit_RK,
        sampling=_of_samples(data_RC[:, settings:], K),
    )


def packed_sampling(sampling: Sampling) -> Int[np.ndarray, "settings"]:
    """The settings of a request as int32, floats by their bits."""
    columns = [column.reshape(-1) for column in slot_sampling([sampling])]
    return np.concatenate(
        [c.view(np.int32) if c.dtype == np.float32 else c.astype(np.int32) for c in columns]
    )


def _of_samples(packed_RC: Int[Array, "R settings"], samples: int) -> SlotSampling:
    """The settings of K samples in each shard."""
    R, start, columns = len(packed_RC), 0, []
    for one in _ONE:
        part_RC, start = packed_RC[:, start : start + one.size], start + one.size
        if one.dtype == np.float32:
            part_RC = jax.lax.bitcast_convert_type(part_RC, np.float32)
        column = part_RC.astype(one.dtype).reshape(R, 1, *one.shape[1:])
        columns.append(jnp.broadcast_to(column, (R, samples, *one.shape[1:])))
    return SlotSampling(*columns)
