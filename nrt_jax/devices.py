"""Platforms that this host has, settled before jax is imported."""

import glob
import os
import sys
from importlib.util import find_spec

_DEVICE_FILES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia[0-9]*", "/dev/kfd", "/dev/dxg")
"""Those of TPUs, and of GPUs, also inside a Windows host."""


def leave_out_absent_tpu() -> bool:
    """Let jax start on the CPU alone where libtpu is installed and the host has no accelerator.

    True where it does so.

    libtpu prints errors about the TPU that it does not find. What the environment says wins.
    """
    asked = "JAX_PLATFORMS" in os.environ or "JAX_FORCE_TPU_INIT" in os.environ
    if asked or "jax" in sys.modules or find_spec("libtpu") is None:
        return False
    absent = not any(glob.glob(pattern) for pattern in _DEVICE_FILES)
    if absent:
        os.environ["JAX_PLATFORMS"] = "cpu"
    return absent
