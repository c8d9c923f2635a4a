"""The mesh that decoding chooses: few slots want many shards, many slots few; memory decides."""

import pytest

from nrt_jax.models.decode_mesh import DecodeLoad, decode_mesh
from tests.models.tiny import architecture

LLAMA_8B = architecture(
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
SMOLLM = architecture(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
)
GIB = 2**30


def sizes(a=LLAMA_8B, devices=8, *, slots=64, weights=8_030_261_248, cache=0, free=None, rows=None):
    load = DecodeLoad(
        slots=slots,
        weights=weights,
        vocab_rows=a.vocab_size if rows is None else rows,
        weight_bytes=2,
        cache_bytes=cache,
        free_bytes=free,
    )
    mesh = decode_mesh(a, load, devices)
    assert mesh.data * mesh.fsdp * mesh.tensor == devices
    return mesh.data, mesh.fsdp, mesh.tensor


def test_few_slots_read_weights_and_many_slots_send_activations():
    assert sizes(slots=64) == (1, 1, 8)
    assert sizes(slots=512) == (2, 1, 4)
    assert sizes(devices=64, slots=4096) == (16, 1, 4)


def test_a_small_model_is_replicated():
    """Starting its sums takes longer than reading its weights."""
    assert sizes(SMOLLM, weights=134_515_008) == (8, 1, 1)


@pytest.mark.parametrize(
    ("devices", "rows", "tensor"), [(6, None, 2), (8, 128_257, 1), (8, 128_260, 4)]
)
def test_tensor_divides_heads_vocabulary_and_devices(devices, rows, tensor):
    assert sizes(devices=devices, slots=devices, rows=rows)[2] == tensor


def test_slots_divide_over_the_replicas_where_they_can():
    assert sizes(SMOLLM, slots=3, weights=134_515_008, devices=9) == (3, 1, 3)
    assert sizes(slots=3, devices=64) == (8, 1, 8)


def test_memory_asks_for_more_shards():
    assert sizes(slots=512, free=16 * GIB) == (2, 1, 4)
    assert sizes(slots=512, free=3 * GIB) == (1, 1, 8)
    assert sizes(slots=512, free=6 * GIB, cache=20 * GIB) == (1, 1, 8)


def test_fsdp_is_the_last_resort():
    assert sizes(devices=16, slots=64, free=2 * GIB) == (1, 2, 8)
    assert sizes(devices=16, slots=64, free=GIB // 2) == (1, 2, 8), "nothing fits: the most shards"
