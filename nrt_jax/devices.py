"""Platforms that this host has, settled before jax is imported."""

import glob
import os
import sys
from collections.abc import Sequence
from importlib.util import find_spec

TPU_FILES, GPU_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*"), ("/dev/nvidia[0-9]*",)
"""Device files of TPUs, and of NVIDIA GPUs."""
_OTHER_FILES = ("/dev/kfd", "/dev/dxg")
"""Those of AMD GPUs, and of GPUs inside a Windows host."""


def leave_out_absent_tpu() -> bool:
    """Let jax start on the CPU alone where libtpu is installed and the host has no accelerator.

    True where it does so.

    libtpu prints errors about the TPU that it does not find. What the environment says wins.
    """
    asked = "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ
    if asked or "jax" in sys.modules or find_spec("libtpu") is None:
        return False
    absent = not device_files((*TPU_FILES, *GPU_FILES, *_OTHER_FILES))
    if absent:
        os.environ["JAX_PLATFORMS"] = "cpu"
    return absent


def device_files(patterns: Sequence[str]) -> list[str]:
    """The files of this host that match, such as those of `GPU_FILES`."""
    return sorted(path for pattern in patterns for path in glob.glob(pattern))
