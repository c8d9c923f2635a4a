"""The decode kernel for GPUs by itself: against plain attention in interpret mode, and lowered."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.engine import attention_kernels
from nrt_jax.engine.triton_attention import attend_to_filled
from nrt_jax.errors import InputError
from tests.engine.described_gpu import lowered
from tests.models.tiny import architecture, mesh


def plain(q_HGd, k_HTd, v_HTd):
    """The output before division, the sum of its weights, and the largest score, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q_HGd, k_HTd, v_HTd))
    scores = np.einsum("hgd,htd->hgt", q, k) / np.sqrt(q.shape[-1])
    highest = scores.max(-1)
    weights = np.exp(scores - highest[..., None])
    return np.einsum("hgt,htd->hgd", weights, v), weights.sum(-1), highest


@pytest.mark.parametrize("groups", [1, 5])
def test_it_sees_the_tokens_from_start_to_end(groups):
    """48 tokens are three splits of one block; starts and ends lie on and off their edges."""
    start_B = np.asarray([0, 0, 0, 0, 15, 16, 17, 40], np.int32)
    end_B = np.asarray([1, 16, 17, 48, 16, 48, 33, 41], np.int32)
    random = np.random.default_rng(0)
    q, k, v = (random.normal(size=(8, 2, n, 16)).astype(np.float32) * 3 for n in (groups, 48, 48))
    # What lies outside must not matter.
    outside_BT = (np.arange(48) < start_B[:, None]) | (np.arange(48) >= end_B[:, None])
    k, v = (np.where(outside_BT[:, None, :, None], 1e4, x).astype(np.float32) for x in (k, v))
    found = jax.jit(attend_to_filled, static_argnames="interpret")(
        q, k, v, start_B, end_B, interpret=True
    )
    for b, (start, end) in enumerate(zip(start_B, end_B, strict=True)):
        expected = plain(q[b], k[b, :, start:end], v[b, :, start:end])
        for actual, one in zip(found, expected, strict=True):
            np.testing.assert_allclose(actual[b], one, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("tokens", "d"), [(48, 16), (4096, 128)])
def test_it_lowers_for_cuda(dtype, tokens, d):
    S = jax.ShapeDtypeStruct
    keys = S((4, 2, tokens, d), dtype)
    arguments = S((4, 2, 5, d), dtype), keys, keys, S((4,), jnp.int32), S((4,), jnp.int32)
    text = lowered(attend_to_filled, *arguments)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1


def test_a_jax_without_the_backend_has_xla_s_attention(monkeypatch):
    monkeypatch.setattr(attention_kernels, "GPU_BACKEND", "jax.no_such_backend")
    choice = ("gpu", mesh(), architecture(head_dim=64), jnp.bfloat16)
    assert type(attention_kernels.kv_cache("auto", *choice)) is attention_kernels.KVCache
    with pytest.raises(InputError, match=r"pallas: this jax has no jax.no_such_backend; set it to"):
        attention_kernels.kv_cache("pallas", *choice)
