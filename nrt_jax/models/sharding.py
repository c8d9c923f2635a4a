"""The sharding of every array: one table from logical axes to mesh axes."""

import logging
import math
from collections.abc import Sequence
from itertools import combinations
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import unflatten_dict
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding
from jax.typing import DTypeLike
from jaxtyping import Array

from nrt_jax import distributed
from nrt_jax.config.architecture import Architecture
from nrt_jax.config.mesh import MESH_AXES, MeshConfig
from nrt_jax.errors import InputError

log = logging.getLogger(__name__)

LOGICAL_TO_MESH: dict[str, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),
    "looked_up": "data",
    "sequence": "context",
    "layers": None,
    "vocab": "tensor",
    "embed": "fsdp",
    "heads": "tensor",
    "kv_heads": "tensor",
    "head_dim": None,
    "mlp": "tensor",
    "norm": None,
}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """Mesh of all devices with the axes data, fsdp, tensor, context, laid out by `lay_devices`.

    Raises InputError when the sizes do not multiply to the number of devices, and when the slices
    do not divide over data and fsdp.
    """
    devices = jax.devices() if devices is None else devices
    shape = list(mesh_sizes(config, len(devices)).values())
    slices = len({_slice_index(device) for device in devices})
    mesh = Mesh(lay_devices(shape, _slices_of_axes(config, shape, slices), devices), MESH_AXES)
    _connect(mesh)
    return mesh


def _connect(mesh: Mesh) -> None:
    """Connect the processes of CPUs for every group of devices that sums over mesh axes may have.

    Gloo gives up unless all processes come to the first collective of a group within 30 s, and
    they may compile longer before it than each other.
    """
    processes = {device.process_index for device in mesh.devices.flat}
    if mesh.devices.flat[0].platform != "cpu" or len(processes) == 1:
        return
    axes = [axis for axis, size in mesh.shape.items() if size > 1]
    groups = [group for n in range(len(axes)) for group in combinations(axes, n + 1)]
    each = PartitionSpec(tuple(axes))
    sums = jax.shard_map(
        lambda x: [jax.lax.psum(x, group) for group in groups],
        mesh=mesh,
        in_specs=each,
        out_specs=each,
        check_vma=False,
    )
    ones = place(np.ones(mesh.size, np.float32), NamedSharding(mesh, each))
    program = jax.jit(sums).lower(ones).compile()
    distributed.wait_for_all("a mesh")
    jax.block_until_ready(program(ones))


def mesh_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """Devices along each axis, of so many; InputError when the sizes do not multiply to them."""
    sizes = [getattr(config, axis) for axis in MESH_AXES]
    known = math.prod(size for size in sizes if size != -1)
    said = ", ".join(f"{name}={size}" for name, size in zip(MESH_AXES, sizes, strict=True))
    if 0 in sizes or sizes.count(-1) > 1:
        raise InputError(f"mesh: {said}: sizes are positive, and one at most may be -1")
    if devices % known or (-1 not in sizes and known != devices):
        raise InputError(
            f"mesh: {said} does not cover {devices} devices; "
            f"the sizes must multiply to {devices} (-1 takes what is left)"
        )
    rest = devices // known
    shape = [rest if size == -1 else size for size in sizes]
    return dict(zip(MESH_AXES, shape, strict=True))


def lay_devices(
    shape: Sequence[int], slices: Sequence[int], devices: Sequence[Any]
) -> np.ndarray[Any, np.dtype[np.object_]]:
    """The devices as an array in which neighbours along an axis are near each other.

    TPU chips of a slice are laid along the physical axes of their torus, those of the last mesh
    axes nearest. `slices` are the slices along each axis, between which the network is slower than
    within them: the blocks of an axis, one per slice, follow each other. Other devices keep their
    order, and so do TPU chips that do not form a box.
    """
    try:
        if math.prod(slices) == 1:
            return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
        within = [size // blocks for size, blocks in zip(shape, slices, strict=True)]
        return mesh_utils.create_hybrid_device_mesh(
            within, slices, devices, allow_split_physical_axes=True
        )
    except (AssertionError, NotImplementedError, ValueError) as error:
        log.warning("mesh: the devices keep their order: %s", error)
        return np.asarray(devices).reshape(shape)


def _slices_of_axes(config: MeshConfig, shape: Sequence[int], slices: int) -> list[int]:
    """Slices along each mesh axis; data takes as many as it can where the config leaves it open."""
    sizes = dict(zip(MESH_AXES, shape, strict=True))
    data, fsdp = config.dcn_data, config.dcn_fsdp
    if data == -1:
        data = math.gcd(sizes["data"], slices if fsdp == -1 else slices // max(1, fsdp))
    if fsdp == -1:
        fsdp = slices // max(1, data)
    said = f"dcn_data={data}, dcn_fsdp={fsdp}"
    if data * fsdp != slices:
        raise InputError(
            f"mesh: {said} must multiply to {slices}, the slices of the devices (-1 takes them)"
        )
    for axis, blocks in (("data", data), ("fsdp", fsdp)):
        if sizes[axis] % blocks:
            raise InputError(
                f"mesh: {said}: {blocks} slices do not divide {axis}={sizes[axis]}; "
                f"data * fsdp must be a multiple of the {slices} slices"
            )
    return [data, fsdp, 1, 1]


def _slice_index(device: Any) -> int:
    """Which slice a device belongs to: a TPU slice, or GPUs with one fast network."""
    return getattr(device, "slice_index", 0)


def spread_mesh(architecture: Architecture) -> Mesh:
    """A mesh of all devices, with weights sharded over as many as the model dim divides over.

    For reading and writing weights on any machine, whatever mesh they were trained on.
    """
    return make_mesh(MeshConfig(fsdp=math.gcd(architecture.hidden_size, jax.device_count())))


def partition_spec(logical_axes: Sequence[str | None]) -> PartitionSpec:
    """Mesh axes of an array from the logical axes of its dims; None is not sharded.

    Raises ValueError for a name that is not in the table and for two dims on one mesh axis.
    """
    unknown = [name for name in logical_axes if name is not None and name not in LOGICAL_TO_MESH]
    if unknown:
        raise ValueError(f"logical axis {unknown[0]!r} is not in {sorted(LOGICAL_TO_MESH)}")
    axes = [None if name is None else LOGICAL_TO_MESH[name] for name in logical_axes]
    flat = [a for axis in axes if axis for a in ((axis,) if isinstance(axis, str) else axis)]
    if len(flat) != len(set(flat)):
        raise ValueError(f"logical axes {tuple(logical_axes)} claim a mesh axis twice: {flat}")
    return PartitionSpec(*axes)


def param_shardings(mesh: Mesh, abstract_state: nnx.State) -> dict:
    """Sharding of every weight, as a pure tree like the params.

    `abstract_state` is the state of a Decoder (abstract or not), whose variables have logical axes;
    weights under `layers` have a leading stacked dim. Raises InputError when a dim does not divide
    over its mesh axes.
    """

    def sharding(path: tuple, variable: nnx.Variable) -> NamedSharding:
        stacked = ("layers",) if path[0] == "layers" else ()
        spec = partition_spec(stacked + tuple(variable.logical_axes))
        _check_divides(".".join(map(str, path)), variable.shape, spec, mesh)
        return NamedSharding(mesh, spec)

    flat = nnx.to_flat_state(abstract_state)
    return unflatten_dict({path: sharding(path, variable) for path, variable in flat})


def abstract_params(mesh: Mesh, decoder: nnx.Module, dtype: DTypeLike | None = None) -> dict:
    """Shape, dtype and sharding of every weight of a decoder (abstract or not), as a pure tree."""
    state = nnx.state(decoder)
    return jax.tree.map(
        lambda weight, sharding: jax.ShapeDtypeStruct(
            weight.shape, dtype or weight.dtype, sharding=sharding
        ),
        nnx.to_pure_dict(state),
        param_shardings(mesh, state),
    )


def place(tree: Any, sharding: Sharding) -> Any:
    """Arrays on a mesh from NumPy arrays that every process has whole; each copies its shards."""
    if sharding.is_fully_addressable:
        return jax.device_put(tree, sharding)
    # device_put would first send the arrays around, to compare them.
    return jax.tree.map(
        lambda x: jax.make_array_from_callback(x.shape, sharding, lambda index: x[index]), tree
    )


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Sharding of an array whose first dim is that of prompts."""
    return NamedSharding(mesh, partition_spec(("batch",)))


def constrain(x: Array, mesh: Mesh | None, logical_axes: Sequence[str | None]) -> Array:
    """Constrain the sharding of `x` inside a compiled program by its logical axes.

    One device needs no constraint. Raises InputError when a dim does not divide over its mesh axes.
    """
    if mesh is None or mesh.size == 1:
        return x
    spec = partition_spec(logical_axes)
    _check_divides(f"{tuple(logical_axes)}", x.shape, spec, mesh)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


def check_rows(mesh: Mesh | None, rows: int, tokens: int) -> None:
    """Raise InputError unless rows of tokens divide over the mesh."""
    if mesh is not None:
        spec = partition_spec(("batch", "sequence"))
        _check_divides("a batch's rows", (rows,), PartitionSpec(spec[0]), mesh)
        _check_divides("a row's tokens", (tokens,), PartitionSpec(spec[1]), mesh)


def on_device(sharding: Sharding) -> bool:
    """Whether arrays of this sharding are in device memory, not in host memory."""
    return sharding.memory_kind in (None, "device")


def replicated(mesh: Mesh) -> NamedSharding:
    """Sharding of an array that every device holds entirely."""
    return NamedSharding(mesh, PartitionSpec())


def _check_divides(name: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh) -> None:
    for size, axis in zip(shape, spec, strict=True):
        names = () if axis is None else (axis,) if isinstance(axis, str) else axis
        shards = int(np.prod([mesh.shape[n] for n in names]))
        if size % shards:
            fits = [n for n in range(1, mesh.size + 1) if size % n == 0]
            of_vocabulary = name in ("embedding", "head") and axis == LOGICAL_TO_MESH["vocab"]
            padded = "; or set model.vocab_multiple" if of_vocabulary else ""
            raise InputError(
                f"mesh: {'*'.join(names)}={shards} does not divide {name} of size {size}; "
                f"sizes that do: {fits}{padded}"
            )
