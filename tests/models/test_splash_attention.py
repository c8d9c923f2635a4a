"""The splash kernels, in Pallas' interpreter, against XLA's attention: outputs and gradients."""

import inspect

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as library

from nrt_jax.models import splash_attention
from nrt_jax.models.attention import attend
from nrt_jax.models.splash_attention import splash_attend
from tests.models.packed_rows import PackedRows
from tests.models.tiny import close, mesh

ALL_AXES = {"data": 2, "tensor": 2, "context": 2}


def splash(rows: PackedRows, q, k, v, *prefix, **axes: int) -> jax.Array:
    before = (rows.prefix(*prefix), rows.continued_BT) if prefix else ()
    on = mesh(**axes) if axes else None
    return splash_attend(q, k, v, rows.segments_BT, *before, mesh=on, interpret=True)


@pytest.mark.parametrize(
    ("T", "d", "axes"),
    [(300, 64, {}), (640, 64, {}), (300, 128, ALL_AXES), (200, 64, {"context": 4, "data": 2})],
    ids=["one block", "blocks", "all axes", "context"],
)
def test_equals_attend(T, d, axes):
    rows = PackedRows(T, d)
    expected = rows.outputs_and_gradients(rows.reference, rows.arrays)
    actual = rows.outputs_and_gradients(lambda *x: splash(rows, *x, **axes), rows.arrays)
    close(actual, expected)


@pytest.mark.parametrize("axes", [{}, ALL_AXES], ids=["one device", "all axes"])
def test_bfloat16_is_as_close_to_float32_as_attend_is(axes):
    """bfloat16 keeps 8 bits: each output and gradient is off by some 2**-8 of the largest."""
    rows = PackedRows(300, 64, jnp.bfloat16)
    exact = tuple(x.astype(jnp.float32) for x in rows.arrays)
    expected = rows.outputs_and_gradients(rows.reference, exact)
    actual = rows.outputs_and_gradients(lambda *x: splash(rows, *x, **axes), rows.arrays)
    assert {x.dtype for x in actual[1]} == {jnp.dtype(jnp.bfloat16)}
    close(actual, expected, 0.02)


def test_without_a_prefix():
    rows = PackedRows(300, 64)
    arrays = rows.arrays[:3]
    expected = rows.outputs_and_gradients(lambda *x: attend(*x, rows.own_mask()), arrays)
    close(rows.outputs_and_gradients(lambda *x: splash(rows, *x), arrays), expected)


def test_padding_is_finite():
    """Also where the gradient reaches it."""
    rows = PackedRows(300, 64)
    out, gradients = jax.jit(jax.value_and_grad(lambda x: splash(rows, *x).sum(), allow_int=True))(
        rows.arrays
    )
    assert all(bool(jnp.isfinite(x).all()) for x in (out, *gradients))


def test_the_kernels_hold_no_scores():
    """No array of the program is as large as the scores of one head of one row."""
    rows = PackedRows(640, 64)
    jaxpr = jax.make_jaxpr(jax.grad(lambda x: splash(rows, *x).sum()))(rows.arrays)
    largest = max(x.size for x in rows.arrays)
    sizes = [v.aval.size for e in jaxpr.jaxpr.eqns for v in e.outvars if v.aval.shape]
    assert max(sizes) <= 2 * largest < 640 * 640 * rows.arrays[0].shape[0]


def test_the_backward_pass_is_the_library_s_of_this_signature():
    """It is private, and may change with jax."""
    assert splash_attention._backward_of_part is library._splash_attention_bwd
    assert list(inspect.signature(library._splash_attention_bwd).parameters) == [
        "save_residuals",
        "mask_value",
        "is_mqa",
        "block_sizes",
        "residual_checkpoint_name",
        "mask_function",
        "attn_logits_soft_cap",
        "interpret",
        "res",
        "do",
    ]
