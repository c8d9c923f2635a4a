"""The devices that jax sees: memory, the rate of a matmul and of the attention, a collective."""

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from nrt_jax.chips import Chip, chip_of
from nrt_jax.doctor.finding import Finding, size
from nrt_jax.models.attention import attend, own_mask
from nrt_jax.models.attention_backend import FUSED, row_attention
from nrt_jax.models.rows import TokenRows

LEAST_SHARE = 0.4
"""Of the peak; a large matmul below it is wrong."""
_LEAST_MEMORY = 0.6
"""Of the chip's memory; XLA takes 0.75 of what is free on a GPU when it starts."""
_LARGEST_ERROR = 0.03
"""Of bfloat16 attention against float32, for values between -1 and 1."""


class Sizes(NamedTuple):
    """What is run on each device."""

    matmul: int
    """Rows and columns of the square matrices."""
    products: int
    """Matmuls in a row."""
    tokens: int
    """Of one row of the attention, whose layer is a Llama-3.1-8B's."""
    collective: int
    """Float32 values per device of the all-reduce."""


ACCELERATOR = Sizes(matmul=8192, products=16, tokens=4096, collective=2**26)
CPU = Sizes(matmul=256, products=4, tokens=128, collective=2**18)
_KV_HEADS, _QUERIES_PER_HEAD, _HEAD = 8, 4, 128


def check_devices(sizes: Sizes | None = None) -> Iterator[Finding]:
    """One finding per check; those of a device are made one device at a time."""
    try:
        devices = jax.local_devices()
    except RuntimeError as error:  # of the plugin: no device, or a driver that does not fit
        reason = " ".join(str(error).split())
        yield Finding(
            "devices", reason, "mend what the line says, or set JAX_PLATFORMS=cpu to use the CPU"
        )
        return
    platform = devices[0].platform
    sizes = sizes or (CPU if platform == "cpu" else ACCELERATOR)
    kinds = ", ".join(sorted({device.device_kind for device in jax.devices()}))
    runtime = " ".join(devices[0].client.platform_version.split())
    yield Finding(
        "devices",
        f"{len(devices)} of {jax.device_count()} {platform} devices here: {kinds} ({runtime})",
        None,
        {"local": len(devices), "all": jax.device_count(), "kinds": kinds, "runtime": runtime},
    )
    for device in devices:
        chip = chip_of(device.device_kind)
        yield _guarded(f"memory {device.id}", partial(check_memory, device, chip))
        yield _guarded(f"matmul {device.id}", partial(check_matmul, device, chip, sizes))
        yield _guarded(f"attention {device.id}", partial(check_attention, device, chip, sizes))
    yield _guarded("collective", partial(check_collective, jax.devices(), sizes.collective))


def _guarded(name: str, check: Callable[[], Finding]) -> Finding:
    """The finding of a check; an error of the device is one too."""
    try:
        return check()
    except jax.errors.JaxRuntimeError as error:
        reason = " ".join(str(error).split())[:300]
        return Finding(
            name, reason, "end other processes that use the device, or restart its host and driver"
        )


def check_memory(device: Any, chip: Chip | None) -> Finding:
    """Bytes that jax may use, against the chip's."""
    name, stats = f"memory {device.id}", device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return Finding(name, "the host's")
    limit, used = stats["bytes_limit"], stats.get("bytes_in_use", 0)
    figures = {"bytes": limit, "bytes_in_use": used}
    value = f"{size(limit)} for jax, {size(used)} in use"
    if chip is None:
        return Finding(name, value, None, figures)
    whole = chip.memory / chip.devices
    value += f", {size(whole)} on the chip"
    remedy = None
    if limit < _LEAST_MEMORY * whole:
        remedy = (
            "another process holds the memory, or XLA_PYTHON_CLIENT_MEM_FRACTION is low; end the "
            "other process (nvidia-smi names it), or raise the fraction"
        )
    return Finding(name, value, remedy, figures)


def check_matmul(device: Any, chip: Chip | None, sizes: Sizes) -> Finding:
    """A chain of bfloat16 matmuls whose result is known, and their rate."""
    n = sizes.matmul

    def chain(x: Any, y: Any) -> Any:
        step = lambda _, x: jnp.dot(x, y, preferred_element_type=jnp.bfloat16)  # noqa: E731
        return jax.lax.fori_loop(0, sizes.products, step, x)

    ones, shares = (
        jax.device_put(np.full((n, n), value, jnp.bfloat16), device) for value in (1.0, 1.0 / n)
    )
    seconds, out = _timed(jax.jit(chain), ones, shares)
    finding = _rate(f"matmul {device.id}", 2 * n**3 * sizes.products / seconds, chip)
    # Powers of two add up without rounding, so every product is all ones.
    if not bool(jnp.all(out == 1)):
        return finding._replace(remedy=f"device {device.id} computes wrong sums; replace its host")
    return finding


def check_attention(device: Any, chip: Chip | None, sizes: Sizes) -> Finding:
    """The attention of training on this platform: its rate, and its error against float32."""
    T, H, G, d = sizes.tokens, _KV_HEADS, _QUERIES_PER_HEAD, _HEAD
    backend = FUSED.get(device.platform, "xla")
    rng = np.random.default_rng(0)
    shapes = (1, T, H, G, d), (1, T, H, d), (1, T, H, d)
    q, k, v = (
        jax.device_put(rng.uniform(-1, 1, shape).astype(jnp.bfloat16), device) for shape in shapes
    )
    positions = jax.device_put(np.arange(T, dtype=np.int32)[None], device)
    segments = jnp.ones_like(positions)

    def fused(q: Any, k: Any, v: Any) -> Any:
        rows = TokenRows(positions, positions, segments)
        return row_attention(backend, None, None, rows, None)(q, k, v, None)

    def error(out: Any, q: Any, k: Any, v: Any) -> Any:
        # The last queries see the most keys, and their scores fit into memory.
        few = min(T, 128)
        q, k, v = (x.astype(jnp.float32) for x in (q[:, -few:], k, v))
        mask = own_mask(positions, segments, None)[:, -few:]
        return jnp.max(jnp.abs(out[:, -few:].astype(jnp.float32) - attend(q, k, v, mask)))

    seconds, out = _timed(jax.jit(fused), q, k, v)
    # Causal: half of the products of queries and keys.
    finding = _rate(f"attention {device.id}", 2 * H * G * d * T * T / seconds, chip, backend)
    difference = float(jax.jit(error)(out, q, k, v))
    if not difference < _LARGEST_ERROR:
        return finding._replace(
            remedy=f"{backend} attention is off by {difference:.3g}; set model.attention=xla"
        )
    return finding._replace(figures={**finding.figures, "largest_error": difference})


def check_collective(devices: list[Any], values: int) -> Finding:
    """A sum over all devices of all processes, and the bytes per second that each moves."""
    mesh = Mesh(np.array(devices), ("all",))
    split = NamedSharding(mesh, PartitionSpec("all"))
    whole = NamedSharding(mesh, PartitionSpec())
    n = len(devices)
    x = jax.jit(lambda: jnp.ones((n, values), jnp.float32), out_shardings=split)()
    seconds, out = _timed(jax.jit(lambda x: x.sum(0), out_shardings=whole), x)
    moved = 2 * (n - 1) / n * 4 * values
    value = f"all-reduce of {size(4 * values)} over {n} devices in {seconds * 1e3:.3g} ms"
    figures = {"seconds": seconds, "bytes_per_s": moved / seconds}
    if n > 1:
        value += f", {size(moved / seconds)}/s per device"
    if not bool(jnp.all(out.addressable_data(0) == n)):
        remedy = "the sum is wrong; check the network between the hosts, and replace the odd one"
        return Finding("collective", value, remedy, figures)
    return Finding("collective", value, None, figures)


def _rate(name: str, flops: float | int, chip: Chip | None, how: str = "") -> Finding:
    """A rate of computing, against the chip's peak where that is known."""
    value, figures = f"{flops / 1e12:.3g} TFLOP/s", {"flops_per_s": flops}
    value += f" ({how})" if how else ""
    if chip is None:
        return Finding(name, value, None, figures)
    peak = chip.flops / chip.devices
    share = flops / peak
    value += f", {100 * share:.0f} % of the peak of {peak / 1e12:.4g}"
    figures |= {"peak_flops_per_s": peak, "share_of_peak": share}
    remedy = None
    if share < LEAST_SHARE and not how:
        remedy = (
            "end other processes that use the device, and look whether its clock is held down "
            "(nvidia-smi -q -d PERFORMANCE)"
        )
    return Finding(name, value, remedy, figures)


def _timed(call: Callable[..., Any], *args: Any, repeats: int = 3) -> tuple[float, Any]:
    """Shortest time of several calls after the one that compiles, and the result."""
    out, seconds = jax.block_until_ready(call(*args)), []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call(*args))
        seconds.append(time.perf_counter() - start)
    return min(seconds), out
