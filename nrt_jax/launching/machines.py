"""What clouds and schedulers call the machines of a topology, and what jax is told on them."""

from typing import NamedTuple

from nrt_jax.errors import InputError
from nrt_jax.topologies import Topology


class GoogleTpu(NamedTuple):
    """Names of Google Cloud for the slices of one chip."""

    gke: str
    """`cloud.google.com/gke-tpu-accelerator`."""
    machine: str | None
    """Machine type of Compute Engine up to the chips per host; None without one."""
    accelerator: str
    """Accelerator type of the Cloud TPU API up to the number."""
    counted: int
    """That number per chip: cores of older chips."""
    runtime: str | None
    """Runtime version of the Cloud TPU API; None for chips that it does not have."""


TPUS = {
    "v4": GoogleTpu("tpu-v4-podslice", None, "v4-", 2, "tpu-ubuntu2204-base"),
    "v5e": GoogleTpu("tpu-v5-lite-podslice", None, "v5litepod-", 1, "v2-alpha-tpuv5-lite"),
    "v5p": GoogleTpu("tpu-v5p-slice", "ct5p-hightpu-", "v5p-", 2, "v2-alpha-tpuv5"),
    "v6e": GoogleTpu("tpu-v6e-slice", "ct6e-standard-", "v6e-", 1, "v2-alpha-tpuv6e"),
    "tpu7x": GoogleTpu("tpu7x", "tpu7x-standard-", "tpu7x-", 2, None),
}
GKE_GPUS = {
    "a3-high": "nvidia-h100-80gb",
    "a3-mega": "nvidia-h100-mega-80gb",
    "a3-ultra": "nvidia-h200-141gb",
    "a4": "nvidia-b200",
}
"""`cloud.google.com/gke-accelerator`; clusters elsewhere need no label."""
IMAGE_FAMILIES = {
    "v5p": "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e",
    "v6e": "ubuntu-accel-2204-amd64-tpu-v5e-v5p-v6e",
    "tpu7x": "ubuntu-accel-2404-amd64-tpu-tpu7x",
}
"""Of the project ubuntu-os-accelerator-images."""
SKY_GPUS = {"h100": "H100", "h200": "H200", "b200": "B200", "a100": "A100-80GB", "l4": "L4"}

_OVERLAPPED_GATHERS = (
    "--xla_enable_async_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
_OVERLAPPED_SLICES = (
    "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
    "--xla_tpu_data_parallel_opt_different_sized_ops=true",
)
_V6E_VMEM = "--xla_tpu_scoped_vmem_limit_kib=98304"


def libtpu_flags(topology: Topology, slices: int) -> str:
    """LIBTPU_INIT_ARGS; docs/launch.md explains each."""
    flags: list[str] = []
    if topology.chips > 1:
        flags += _OVERLAPPED_GATHERS
    if slices > 1:
        flags += _OVERLAPPED_SLICES
    if topology.chip.name == "v6e":
        flags.append(_V6E_VMEM)
    return " ".join(flags)


def gpu_settings(topology: Topology) -> dict[str, str]:
    """Variables of XLA and NCCL; docs/launch.md explains each."""
    settings = {
        "XLA_FLAGS": "--xla_gpu_enable_latency_hiding_scheduler=true",
        "XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92",
        "NCCL_DEBUG": "WARN",
    }
    if topology.chip.name in ("a100", "h100", "h200"):
        settings["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    return settings


def settings(topology: Topology, slices: int, cache: str | None = None) -> dict[str, str]:
    """The variables that a process gets; `cache` is the folder of compiled programs."""
    found = {"PYTHONUNBUFFERED": "1"}
    if cache is not None:
        found["JAX_COMPILATION_CACHE_DIR"] = cache
    if topology.chip.platform == "gpu":
        return found | gpu_settings(topology)
    flags = libtpu_flags(topology, slices)
    return found | ({"LIBTPU_INIT_ARGS": flags} if flags else {})


def google_tpu(topology: Topology) -> GoogleTpu:
    """The names of a TPU slice. Raises InputError for GPUs."""
    if topology.chip.platform != "tpu":
        raise InputError(f"topology {topology.name}: is of GPUs; name a TPU slice, as v6e:8x8")
    return TPUS[topology.chip.name]


def compute_engine_machine(topology: Topology) -> str:
    """The machine type of Compute Engine. Raises InputError for a chip that it does not have."""
    machine = google_tpu(topology).machine
    if machine is None:
        raise InputError(
            f"topology {topology.name}: Compute Engine has no {topology.chip.name}; use jobset, or "
            "tpu-vm (the legacy Cloud TPU API)"
        )
    return f"{machine}{topology.chips_per_host}t"


def cloud_tpu_type(topology: Topology) -> tuple[str, str]:
    """Accelerator type and runtime version of the Cloud TPU API. InputError where it has none."""
    names = google_tpu(topology)
    if names.runtime is None:
        raise InputError(
            f"topology {topology.name}: the legacy Cloud TPU API has no {topology.chip.name}; use "
            "jobset or gce"
        )
    return f"{names.accelerator}{topology.chips * names.counted}", names.runtime
