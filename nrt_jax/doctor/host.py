"""What can be told before jax starts: versions, accelerators and their drivers."""

import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from nrt_jax.devices import GPU_FILES, TPU_FILES, device_files
from nrt_jax.doctor.finding import Finding

PACKAGES = ("nrt-jax", "jax", "jaxlib", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


class Host(NamedTuple):
    """What this machine shows of accelerators, and what is installed for them."""

    tpu_files: Sequence[str]
    """Device files of TPUs."""
    gpu_files: Sequence[str]
    """Device files of NVIDIA GPUs."""
    libtpu: bool
    """Whether libtpu is installed."""
    cuda_plugin: int | None
    """CUDA generation of jax's plugin, 12 or 13; None without one."""
    driver_cuda: int | None
    """Newest CUDA version that the NVIDIA driver runs, 12090 for 12.9; None without a driver."""
    cpu_asked: bool
    """Whether JAX_PLATFORMS asks for the CPU alone."""


def look(*, cpu_asked: bool) -> Host:
    """Look at this machine, without jax."""
    return Host(
        tpu_files=device_files(TPU_FILES),
        gpu_files=device_files(GPU_FILES),
        libtpu=find_spec("libtpu") is not None,
        cuda_plugin=next((v for v in (13, 12) if find_spec(f"jax_cuda{v}_plugin")), None),
        driver_cuda=driver_cuda(),
        cpu_asked=cpu_asked,
    )


def driver_cuda(load: Callable[[str], ctypes.CDLL] = ctypes.CDLL) -> int | None:
    """The CUDA version that the NVIDIA driver says it runs; None where there is no driver."""
    version = ctypes.c_int()
    try:
        failed = load("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version))
    except OSError:
        return None
    return None if failed else version.value


def versions() -> Finding:
    """Versions of Python and of the packages that meet the accelerator."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return Finding(
        "versions", ", ".join(f"{name} {version}" for name, version in found.items()), None, found
    )


def environment() -> Finding:
    """Variables that steer jax, XLA, libtpu and NCCL."""
    prefixes = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "NCCL_", "CUDA_", "NRT_JAX_", "MEGASCALE_")
    named = {name: value for name, value in sorted(os.environ.items()) if name.startswith(prefixes)}
    return Finding("environment", " ".join(f"{n}={v}" for n, v in named.items()) or "nothing set")


def accelerators(host: Host) -> Finding:
    """Whether each accelerator that is there can be used, and each library finds one."""
    tpus, gpus = len(host.tpu_files), len(host.gpu_files)
    driver = "no NVIDIA driver"
    if host.driver_cuda is not None:
        driver = f"NVIDIA driver for CUDA up to {_dotted(host.driver_cuda)}"
    parts = [f"device files of {tpus} TPUs and {gpus} GPUs", driver]
    parts += ["libtpu"] if host.libtpu else []
    parts += [f"CUDA {host.cuda_plugin} plugin"] if host.cuda_plugin else []
    remedy = None if host.cpu_asked else _remedy(host)
    parts += ["JAX_PLATFORMS=cpu"] if host.cpu_asked else []
    return Finding("accelerators", ", ".join(parts), remedy)


def _remedy(host: Host) -> str | None:
    plugin, driver = host.cuda_plugin, host.driver_cuda
    if host.gpu_files and plugin is None:
        newest = 13 if driver is not None and driver >= 13000 else 12
        return (
            f"jax has no CUDA plugin for the GPUs; pip install 'jax[cuda{newest}]', or set "
            "JAX_PLATFORMS=cpu"
        )
    if host.tpu_files and not host.libtpu and not host.gpu_files:
        return "libtpu is not installed; pip install 'jax[tpu]', or set JAX_PLATFORMS=cpu"
    if plugin is not None and (host.gpu_files or not host.tpu_files):
        if driver is None:
            return (
                f"jax's CUDA {plugin} plugin finds no NVIDIA driver (libcuda.so.1); install the "
                "driver on the host and start the container with its GPUs (docker run --gpus all), "
                "or set JAX_PLATFORMS=cpu"
            )
        if driver < plugin * 1000:
            return (
                f"the NVIDIA driver runs CUDA {_dotted(driver)} and jax's plugin needs {plugin}; "
                f"install a newer driver, or pip install 'jax[cuda{driver // 1000}]' instead"
            )
        if not host.gpu_files:
            return (
                "the NVIDIA driver shows no GPU (/dev/nvidia0); ask the scheduler for GPUs, or "
                "start the container with them (docker run --gpus all)"
            )
    elif host.libtpu and not host.tpu_files and not host.gpu_files:
        return (
            "libtpu is installed and this host shows no TPU (/dev/accel0 or /dev/vfio/0); run on a "
            "TPU host and give the container its devices (docker run --privileged), or set "
            "JAX_PLATFORMS=cpu"
        )
    return None


def _dotted(version: int) -> str:
    """12090 is CUDA 12.9."""
    return f"{version // 1000}.{version % 1000 // 10}"
