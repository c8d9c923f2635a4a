"""The Pallas forms of the cache against float64 attention, in interpret mode."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.engine import engine as engine_module
from nrt_jax.engine.attention_kernels import kv_cache
from nrt_jax.engine.engine import Engine
from nrt_jax.engine.generate import generate_and_score
from nrt_jax.engine.kv_cache import KVCache, Sizes, SlotMap
from nrt_jax.engine.paged_kv_cache import PAGE_TOKENS, PagedCache
from nrt_jax.engine.requests import Request
from nrt_jax.engine.triton_kv_cache import TritonCache
from nrt_jax.errors import InputError
from nrt_jax.models.sharding import param_shardings
from tests.engine.cached_world import busy_world, check_moving_slots, check_resizing, close
from tests.engine.described_gpu import gpu_mesh, lowered
from tests.engine.toy import STOPS, assert_same, params, prompt
from tests.engine.tpu_interpreter import tpu_interpreter
from tests.models.tiny import LLAMA, WINDOW, architecture, decoder, mesh

SIZES = Sizes(prompts=8, prompt_tokens=256, own_tokens=128)
MESHES = [{}, {"data": 2, "fsdp": 2, "tensor": 2}]


def gathered_attention(q, pages, length_B, page_table_B, window):
    """What the TPU kernel computes, from all pages of a table at once."""
    (B, query_heads, d), H = q.shape, pages.shape[2] // 2
    kv = pages[page_table_B].reshape(B, -1, H, 2, d).astype(jnp.float32)
    q_BHGd = q.reshape(B, H, -1, d).astype(jnp.float32)
    scores = jnp.einsum("bhgd,bthd->bhgt", q_BHGd, kv[..., 0, :]) * d**-0.5
    position_1T = jnp.arange(kv.shape[1])[None]
    seen_BT = position_1T < length_B[:, None]
    if window is not None:
        seen_BT &= length_B[:, None] - 1 - position_1T < window
    weights = jax.nn.softmax(jnp.where(seen_BT[:, None, None], scores, -jnp.inf), axis=-1)
    out = jnp.einsum("bhgt,bthd->bhgd", weights, kv[..., 1, :])
    return out.reshape(B, query_heads, d).astype(q.dtype)


FORMS = {
    "paged": partial(PagedCache, kernel=gathered_attention),
    "triton": partial(TritonCache, interpret=True),
}


@pytest.fixture(params=FORMS)
def form(request):
    with jax.numpy_rank_promotion("allow"):
        yield FORMS[request.param]


@pytest.mark.parametrize(
    ("axes", "window"),
    [
        pytest.param(axes, window, marks=pytest.mark.slow if bool(axes) is bool(window) else ())
        for axes in MESHES
        for window in (None, 100)
    ],
    ids=str,
)
def test_attention_is_the_softmax_over_prompt_and_own_tokens(form, axes, window):
    """The prompts are 200, 101 and 1 tokens: with full pages and tails, and without."""
    world = busy_world(form(mesh(**axes), window), SIZES, longest=200, slots=16, window=window)
    for _ in range(70):
        outputs = world.step()
    close(*outputs, tolerance=1e-5)
    world.assert_reads()


def test_the_window_ends_inside_the_own_tokens(form):
    """After 30 tokens of its own a slot sees the last 20 of them and nothing of its prompt."""
    world = busy_world(form(mesh(), 20), Sizes(8, 64, 64), longest=40, window=20)
    for _ in range(30):
        outputs = world.step()
    close(*outputs, tolerance=1e-5)


@pytest.mark.parametrize(
    "length",
    [1, 63, 64, 65, 256, *(pytest.param(n, marks=pytest.mark.slow) for n in (16, 128))],
)
def test_prompts_that_end_with_a_page_or_beside_its_end(form, length):
    world = busy_world(form(mesh()), SIZES, longest=length)
    for _ in range(3):
        close(*world.step(), tolerance=1e-5)
    world.assert_reads()


def test_slots_that_are_not_active_keep_their_cache(form):
    world = busy_world(form(mesh(data=2)), SIZES, longest=130)
    for active in ([0, 1, 3], [1, 4, 5], [0, 1, 5, 7], [7]):
        close(*world.step(active), tolerance=1e-5)
    world.assert_reads()


def test_a_new_prompt_and_its_slots_leave_the_others_alone(form):
    world = busy_world(form(mesh(data=2)), SIZES, longest=256)
    world.step()
    del world.seen[1], world.seen[3]
    world.insert(0, 70, [3, 2])
    world.step()
    close(*world.step(), tolerance=1e-5)
    world.assert_reads()


def test_caches_grow_and_shrink_around_their_contents(form):
    """From prompt slots that hold no full page."""
    world = busy_world(form(mesh(data=2)), Sizes(4, 32, 16), longest=32)
    many_sizes = (
        Sizes(12, 32, 16),
        Sizes(12, 64, 16),
        Sizes(12, 64, 128),
        Sizes(12, 256, 128),
        Sizes(12, 256, 32),
    )
    check_resizing(world, many_sizes, prompt_tokens=199)


def test_a_slot_whose_tokens_were_cut_off_does_not_disturb_the_others(form):
    world = busy_world(form(mesh()), SIZES, longest=100)
    for _ in range(100):
        world.step([1])
    world.resize(SIZES._replace(own_tokens=32))
    del world.seen[1]
    close(*world.step(), tolerance=1e-5)


def test_slots_move_with_their_tokens_to_more_or_fewer_slots(form):
    world = busy_world(form(mesh(data=2)), SIZES, longest=130)
    check_moving_slots(world)


def test_a_prompts_full_pages_are_stored_once():
    cache = PagedCache(mesh())
    layers = [
        jax.eval_shape(lambda n=n: cache.empty(Sizes(n, 1024, 64), 8, 2, 16, jnp.float32))
        for n in (1, 8)
    ]
    one_prompt = 1024 * 2 * 2 * 16
    few, many = (layer.pages.size for layer in layers)
    assert many - few == 7 * one_prompt
    # A slot has room for its tokens and for the tail of a prompt.
    assert few == one_prompt + 8 * 2 * PAGE_TOKENS * 2 * 2 * 16


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_bfloat16_is_as_near_as_the_xla_form(form):
    worlds = [
        busy_world(make(mesh()), SIZES, longest=200, dtype=jnp.bfloat16) for make in (KVCache, form)
    ]
    with jax.numpy_rank_promotion("allow"):
        for _ in range(8):
            (xla, expected), (kernel, _) = (world.step() for world in worlds)
            close(kernel, expected, tolerance=2e-2)
            close(kernel, xla, tolerance=2e-2)


@pytest.mark.parametrize(
    ("dtype", "window", "tolerance"),
    [(jnp.float32, None, 1e-5), (jnp.float32, 100, 1e-5), (jnp.bfloat16, None, 2e-2)],
)
def test_the_tpu_kernel_itself_attends_to_prompt_and_own_tokens(dtype, window, tolerance):
    """Slots that share full pages, before and after the cache grows; the kernel takes d = 128."""
    options = {"slots": 4, "groups": 2, "head_dim": 128, "dtype": dtype, "window": window}
    cache = PagedCache(mesh(), window)
    world = busy_world(cache, Sizes(2, 128, 32), longest=100, **options)
    with tpu_interpreter():
        close(*world.step(), tolerance)
        world.resize(Sizes(3, 512, 64))
        world.insert(2, 330, [2])
        close(*world.step(), tolerance)


# What an engine decodes with


def engines(monkeypatch, a, on):
    """One with XLA's attention, and one with pages."""
    make = partial(
        Engine,
        nnx.split(decoder(a))[0],
        a,
        on,
        slots=8,
        max_prompt_tokens=100,
        max_new_tokens=40,
        stop_ids=STOPS,
        num_samples=4,
    )
    xla = make(attention="xla")
    paged = PagedCache(on, a.sliding_window, gathered_attention)
    monkeypatch.setattr(engine_module, "kv_cache", lambda *choice: paged)
    return xla, make(attention="pallas")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("axes", "window"), [({}, 5), ({"data": 2, "fsdp": 2, "tensor": 2}, None)], ids=str
)
def test_traces_and_scores_are_those_of_the_xla_form(monkeypatch, axes, window):
    """Over refilled slots, caches that grow, and groups that outnumber the slots."""
    a = architecture(**(WINDOW if window else LLAMA), vocab_size=64)
    lengths = (3, 70, 64, 100, 33)
    requests = [
        Request(prompt(n, seed=n), i, 3, 40, suffix_tokens=np.asarray([9, 3, 5], np.int32))
        for i, n in enumerate(lengths)
    ]
    on = mesh(**axes)
    weights = jax.device_put(nnx.to_pure_dict(params(a)), param_shardings(on, params(a)))
    xla, pallas = (
        generate_and_score(run, weights, requests, jax.random.key(0), steps=5)
        for run in engines(monkeypatch, a, on)
    )
    assert_same(xla[0], pallas[0])
    assert len({len(trace.tokens) for group in xla[0] for trace in group}) > 5
    for one, other in zip(xla[1], pallas[1], strict=True):
        np.testing.assert_allclose(one.samples_KA, other.samples_KA, atol=1e-5)
        np.testing.assert_allclose(one.empty_A, other.empty_A, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "changes", "axes", "dtype", "form"),
    [
        ("cpu", {}, {}, jnp.float32, KVCache),
        ("gpu", {}, {}, jnp.bfloat16, TritonCache),
        ("gpu", {}, {}, jnp.int8, KVCache),
        ("gpu", {"head_dim": 80}, {}, jnp.bfloat16, KVCache),
        ("tpu", {}, {}, jnp.bfloat16, PagedCache),
        ("tpu", {"num_key_value_heads": 8}, {"tensor": 8}, jnp.bfloat16, PagedCache),
        ("tpu", {"head_dim": 64}, {}, jnp.bfloat16, KVCache),
        ("tpu", {"num_key_value_heads": 3, "num_attention_heads": 6}, {}, jnp.bfloat16, KVCache),
        ("tpu", {}, {}, jnp.float16, KVCache),
    ],
)
def test_auto_takes_the_platforms_kernel_where_it_fits(platform, changes, axes, dtype, form):
    a = architecture(**{"num_attention_heads": 8, "head_dim": 128} | changes)
    on = mesh(**axes)
    assert type(kv_cache("auto", platform, on, a, dtype)) is form
    assert type(kv_cache("xla", platform, on, a, dtype)) is KVCache
    if form is KVCache:
        with pytest.raises(InputError, match=r"rollout\.attention: pallas: .*; set it to xla"):
            kv_cache("pallas", platform, on, a, dtype)
    else:
        assert type(kv_cache("pallas", platform, on, a, dtype)) is form


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_the_gpu_form_lowers_for_cuda(dtype):
    cache, sizes, S = (
        TritonCache(gpu_mesh(), window=1024),
        Sizes(8, 256, 4096),
        jax.ShapeDtypeStruct,
    )
    slot_map = SlotMap(*(S(n, jnp.int32) for n in ((8,), (8, 4), (16,), (16,))))
    layer = jax.eval_shape(lambda: cache.empty(sizes, 16, 8, 128, dtype))

    def attend(layer, slot_map, active_B, q_BHGd, k_BHd, v_BHd):
        step = cache.begin_step(slot_map, sizes, active_B)
        return cache.attend(layer, q_BHGd, k_BHd, v_BHd, step)

    arguments = [S((16, *shape), dtype) for shape in ((8, 4, 128), (8, 128), (8, 128))]
    with jax.numpy_rank_promotion("allow"):
        text = lowered(attend, layer, slot_map, S((16,), bool), *arguments)
    assert text.count("stablehlo.custom_call @__gpu$xla.gpu.triton") == 1
