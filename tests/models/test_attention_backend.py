"""Which attention is chosen, and cuDNN's arguments; no cuDNN runs here."""

import jax
import jax.numpy as jnp
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from nrt_jax.errors import InputError
from nrt_jax.models.attention_backend import choose_backend
from nrt_jax.models.cudnn_attention import cudnn_attend
from tests.models.packed_rows import PackedRows
from tests.models.tiny import WINDOW, architecture, close, mesh

BF16, F32 = jnp.bfloat16, jnp.float32


@pytest.mark.parametrize(
    ("platform", "dtype", "changes", "expected"),
    [
        ("cpu", F32, {}, "xla"),
        ("tpu", BF16, {"head_dim": 128}, "splash"),
        ("tpu", F32, {"head_dim": 64}, "splash"),
        ("tpu", BF16, {"head_dim": 16}, "xla"),
        ("tpu", BF16, {"head_dim": 64} | WINDOW | {"sliding_window": 99}, "xla"),
        ("tpu", BF16, {"head_dim": 64} | WINDOW | {"sliding_window": 100}, "splash"),
        ("gpu", BF16, {}, "cudnn"),
        ("gpu", BF16, WINDOW, "cudnn"),
        ("gpu", F32, {}, "xla"),
        ("gpu", BF16, {"head_dim": 192}, "xla"),
    ],
)
def test_auto(platform, dtype, changes, expected):
    a = architecture(**changes)
    assert choose_backend("auto", platform, a, dtype, longest=100) == expected
    assert choose_backend("xla", platform, a, dtype, longest=100) == "xla"
    if expected != "xla":
        assert choose_backend(expected, platform, a, dtype, longest=100) == expected


@pytest.mark.parametrize(
    ("asked", "platform", "dtype", "changes", "reason"),
    [
        ("splash", "cpu", F32, {}, "it does not run on a cpu"),
        ("cudnn", "tpu", BF16, {}, "it does not run on a tpu"),
        ("splash", "tpu", BF16, {}, "head_dim 16 is no multiple of 64"),
        (
            "splash",
            "tpu",
            BF16,
            WINDOW | {"head_dim": 64},
            "a sliding_window of 5 tokens hides some of up to 100 before",
        ),
        ("cudnn", "gpu", F32, {}, "it computes in bfloat16 and float16, not model.dtype float32"),
        ("cudnn", "gpu", BF16, {"head_dim": 20}, "head_dim 20 is no multiple of 8 up to 128"),
    ],
)
def test_what_cannot_run_and_is_asked_for(asked, platform, dtype, changes, reason):
    with pytest.raises(InputError) as raised:
        choose_backend(asked, platform, architecture(**changes), dtype, longest=100)
    expected = f"model.attention: {asked}: {reason}; set it to xla or auto"
    assert str(raised.value) == expected


def cudnn_of(rows: PackedRows, on=None):
    def run(q, k, v, *prefix):
        before = rows.prefix(*prefix)
        return cudnn_attend(q, k, v, rows.own_mask(), before, rows.prefix_mask(before), mesh=on)

    return run


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2, "context": 2}], ids=str)
def test_cudnn_gets_the_arguments_of_attend(axes, monkeypatch):
    """jax's own attention takes the same arguments; here it computes in cuDNN's place."""
    plain = jax.nn.dot_product_attention

    def instead(*args, implementation, **kwargs):
        assert implementation == "cudnn"
        return plain(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", instead)
    rows = PackedRows(126, 16)
    expected = rows.outputs_and_gradients(rows.reference, rows.arrays)
    attention = cudnn_of(rows, mesh(**axes) if axes else None)
    close(rows.outputs_and_gradients(attention, rows.arrays), expected)


@pytest.mark.parametrize("axes", [{}, {"data": 2, "tensor": 2, "context": 2}], ids=str)
def test_cudnn_takes_the_shapes(axes, monkeypatch):
    """Forward and backward lower to its custom calls; the program is neither compiled nor run."""
    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)
    rows = PackedRows(126, 64, BF16)
    attention = cudnn_of(rows, mesh(**axes) if axes else None)
    gradient = jax.jit(jax.grad(lambda x: attention(*x).astype(F32).sum()))
    text = gradient.trace(rows.arrays).lower(lowering_platforms=("cuda",)).as_text()
    assert "__cudnn$fmhaScaleBiasSoftmax(" in text
    assert "__cudnn$fmhaScaleBiasSoftmaxBackward(" in text
