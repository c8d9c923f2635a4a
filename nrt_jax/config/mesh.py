"""The `mesh` section: how many devices each axis has."""

import re

from pydantic import Field

from nrt_jax.config.load import Section
from nrt_jax.errors import InputError

MESH_AXES = ("data", "fsdp", "tensor", "context")


class MeshConfig(Section):
    """Devices along each mesh axis; one of them may be -1, for all devices that are left."""

    data: int = Field(default=-1, ge=-1)
    """Replicas of the weights, each with its own prompts."""
    fsdp: int = Field(default=1, ge=-1)
    """Shards of the weights along the model dim, each with its own prompts."""
    tensor: int = Field(default=1, ge=-1)
    """Shards of the heads, the feed-forward and the vocabulary."""
    context: int = Field(default=1, ge=-1)
    """Shards of the tokens of every row in training; it does not speed up rollouts."""
    dcn_data: int = Field(default=-1, ge=-1)
    """Slices along `data`, where the devices are several slices with a slower network between them;
    -1 for as many as divide `data`."""
    dcn_fsdp: int = Field(default=-1, ge=-1)
    """Slices along `fsdp`; -1 for those that `data` leaves."""


def parse_mesh(text: str) -> MeshConfig:
    """The mesh that a command line names by sizes, `fsdp=4,tensor=2`; axes left out are 1."""
    sizes = dict.fromkeys(MESH_AXES, 1)
    for part in text.split(","):
        axis, _, size = part.partition("=")
        if axis not in MESH_AXES or not re.fullmatch(r"-1|[1-9]\d*", size):
            raise InputError(
                f"--mesh {text}: {part!r} must be one of {', '.join(MESH_AXES)}, =, and a size of "
                "1 or more, or -1 for what is left"
            )
        sizes[axis] = int(size)
    return MeshConfig(**sizes)
