"""A mesh of one NVIDIA GPU that the machine does not have, to lower kernels for."""

import jax
from jax.sharding import AbstractDevice, AbstractMesh

from tests.models.tiny import mesh


def gpu_mesh() -> AbstractMesh:
    """Like `mesh()`, of an H100."""
    on = mesh()
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=None, platform="gpu")
    return AbstractMesh(
        tuple(on.shape.values()),
        tuple(on.shape),
        axis_types=on.axis_types,
        abstract_device=device,
    )


def lowered(function, *arguments) -> str:
    """The program for CUDA; it is neither compiled nor run."""
    with jax.sharding.use_abstract_mesh(gpu_mesh()):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()
