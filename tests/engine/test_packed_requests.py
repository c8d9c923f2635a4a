"""What is packed for an insert is what the program takes out again."""

import jax
import numpy as np

from nrt_jax.engine.decode_state import sample_keys, slot_sampling
from nrt_jax.engine.packed_requests import no_requests, packed_sampling, unpacked
from nrt_jax.engine.sampling import Sampling


def test_what_is_packed_comes_out():
    """Two samples in shard 1 of three, which each have room for four."""
    key = jax.random.key(2**31 + 5)
    sampling = Sampling(0.7, 0.9, 40, 0.05, 1.1, frozenset({7, 5}), True, 3, obeys_bans=False)
    key_data = np.asarray(jax.random.key_data(key))
    packed = no_requests(3, 4, len(key_data), prompt=6)
    packed.fill(
        1,
        slots=np.array([9, 2]),
        rows=[3, 0],
        first=5,
        limits=np.array([11, 12], np.int32),
        prompt=4,
        stream=-17,
        key_data=key_data,
        sampling=packed_sampling(sampling),
    )
    out = jax.jit(unpacked, static_argnums=1)(*packed)
    assert out.slot_K.tolist() == [[-1] * 4, [9, 2, -1, -1], [-1] * 4]
    assert out.prompt.tolist() == [6, 4, 6]
    assert out.row_K[1, :2].tolist() == [3, 0]
    assert out.limit_K[1, :2].tolist() == [11, 12]
    wanted = jax.random.key_data(sample_keys(key, -17, np.array([5, 6], np.int32)))
    assert np.array_equal(jax.random.key_data(out.key_K)[1, :2], wanted)
    for name, column in slot_sampling([sampling] * 4)._asdict().items():
        taken = getattr(out.sampling, name)[1]
        assert taken.dtype == column.dtype, name
        assert np.array_equal(taken, column), name
