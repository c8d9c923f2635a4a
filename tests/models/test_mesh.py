"""Where the devices of a mesh are: near their neighbours along every axis, slice by slice."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
from jax.experimental import topologies

from nrt_jax.config.mesh import MeshConfig
from nrt_jax.errors import InputError
from nrt_jax.models.sharding import _slices_of_axes, lay_devices, make_mesh


@dataclass(frozen=True)
class Chip:
    """What jax says of a TPU chip."""

    id: int
    coords: tuple[int, int, int]
    process_index: int
    device_kind: str
    slice_index: int = 0
    core_on_chip: int = 0
    platform: str = "tpu"


def v5p(*dims: int, slice_index: int = 0) -> list[Chip]:
    """The chips of a slice; a host has 2 x 2 x 1 of them."""
    return _chips("TPU v5", *dims, slice_index=slice_index)


def v6e(*dims: int) -> list[Chip]:
    return _chips("TPU v6 lite", *dims, 1)


def _chips(kind: str, x: int, y: int, z: int, slice_index: int = 0) -> list[Chip]:
    """In jax's order: host by host, and on each host its 2 x 2 chips."""
    hosts = [(i, j, k) for k in range(z) for j in range(0, y, 2) for i in range(0, x, 2)]
    return [
        Chip(i + di + x * (j + dj + y * k), (i + di, j + dj, k), host, kind, slice_index)
        for host, (i, j, k) in enumerate(hosts)
        for dj in range(2)
        for di in range(2)
    ]


def hops(mesh: np.ndarray, axis: int, wraps: bool) -> tuple[float, int]:
    """Links from each device to the next along the axis, in a ring: the mean and the largest."""
    here = np.array([d.coords for d in mesh.flat])
    there = np.array([d.coords for d in np.roll(mesh, -1, axis).flat])
    distance = np.abs(here - there)
    if wraps:
        distance = np.minimum(distance, here.max(0) + 1 - distance)
    links = distance.sum(1)
    return float(links.mean()), int(links.max())


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ((1, 16, 4, 1), {1: (1.25, 2), 2: (1.0, 1)}),
        ((4, 4, 4, 1), {0: (1.0, 1), 1: (1.0, 1), 2: (1.0, 1)}),
        ((1, 4, 4, 4), {1: (1.0, 1), 2: (1.0, 1), 3: (1.0, 1)}),
        ((1, 64, 1, 1), {1: (1.3125, 3)}),
    ],
)
def test_neighbours_on_a_torus_are_one_or_two_links_apart(sizes, expected):
    """In jax's order, fsdp=16 has neighbours at 3.25 links, and at 5 the farthest."""
    mesh = lay_devices(sizes, (1, 1, 1, 1), v5p(4, 4, 4))
    assert mesh.shape == sizes
    assert len(set(mesh.flat)) == 64
    assert {axis: hops(mesh, axis, wraps=True) for axis in expected} == expected
    in_order = np.asarray(v5p(4, 4, 4)).reshape(1, 16, 4, 1)
    assert hops(in_order, 1, wraps=True) == (3.25, 5)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [((1, 16, 4, 1), {1: 2.25, 2: 1.5}), ((1, 8, 8, 1), {1: 1.75, 2: 1.75})],
)
def test_neighbours_on_a_grid_are_near(sizes, expected):
    """A v6e slice of 8 x 8 has no links around; in jax's order, fsdp=16 has 3.75."""
    mesh = lay_devices(sizes, (1, 1, 1, 1), v6e(8, 8))
    assert {axis: hops(mesh, axis, wraps=False)[0] for axis in expected} == expected


def test_the_rows_of_a_process():
    """A host of v5p has two rows of an fsdp of 16 with a tensor of 4, in two chips each."""
    mesh = lay_devices((1, 16, 4, 1), (1, 1, 1, 1), v5p(4, 4, 4))
    rows = [
        {place[1] for place, chip in np.ndenumerate(mesh) if chip.process_index == process}
        for process in range(16)
    ]
    assert {len(of_process) for of_process in rows} == {2}
    for row in range(16):
        assert sum(row in of_process for of_process in rows) == 2


def two_slices() -> list[Chip]:
    second = [replace(chip, id=8 + chip.id) for chip in v5p(2, 2, 2, slice_index=1)]
    return v5p(2, 2, 2) + second


@pytest.mark.parametrize(
    ("config", "along", "blocks"),
    [
        (MeshConfig(data=2, fsdp=8), 0, [2, 1, 1, 1]),
        (MeshConfig(data=1, fsdp=16), 1, [1, 2, 1, 1]),
        (MeshConfig(data=2, fsdp=8, dcn_fsdp=2), 1, [1, 2, 1, 1]),
        (MeshConfig(data=4, fsdp=1, tensor=4), 0, [2, 1, 1, 1]),
    ],
)
def test_slices_are_blocks_of_data_or_fsdp(config, along, blocks):
    sizes = (config.data, config.fsdp, config.tensor, config.context)
    assert _slices_of_axes(config, sizes, 2) == blocks
    mesh = lay_devices(sizes, blocks, two_slices())
    halves = np.split(mesh, 2, along)
    assert [{chip.slice_index for chip in half.flat} for half in halves] == [{0}, {1}]
    for axis in range(4):
        if axis != along:
            there = np.roll(mesh, -1, axis)
            same = [
                a.slice_index == b.slice_index for a, b in zip(mesh.flat, there.flat, strict=True)
            ]
            assert all(same), axis


@pytest.mark.parametrize(
    ("config", "slices", "message"),
    [
        (MeshConfig(data=1, tensor=16), 2, r"dcn_fsdp=2: 2 slices do not divide fsdp=1; .*data"),
        (MeshConfig(data=3, dcn_data=2), 2, "2 slices do not divide data=3"),
        (MeshConfig(data=8, dcn_data=2), 1, r"dcn_data=2, dcn_fsdp=0 must multiply to 1, the sli"),
        (MeshConfig(data=8, dcn_data=0), 2, "dcn_data=0, dcn_fsdp=2 must multiply to 2"),
    ],
)
def test_slices_that_the_axes_cannot_take_are_refused(config, slices, message):
    sizes = (config.data, config.fsdp, config.tensor, config.context)
    with pytest.raises(InputError, match=message):
        _slices_of_axes(config, sizes, slices)


def test_chips_that_form_no_box_keep_their_order(caplog):
    chips = v5p(2, 2, 2)[:6]
    mesh = lay_devices((1, 6, 1, 1), (1, 1, 1, 1), chips)
    assert mesh.flatten().tolist() == chips
    assert "the devices keep their order" in caplog.text


def test_devices_without_coordinates_keep_their_order():
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2))
    assert [device.id for device in mesh.devices.flat] == list(range(8))
    assert mesh.devices.shape == (2, 2, 2, 1)


@pytest.mark.slow
def test_the_chips_are_those_that_libtpu_describes(monkeypatch):
    pytest.importorskip("libtpu", reason="libtpu is installed on Linux only")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    for name, chips in {"v5p:4x4x4": v5p(4, 4, 4), "v6e:8x8": v6e(8, 8)}.items():
        topology = topologies.get_topology_desc(platform="tpu", topology_name=name)
        described = [
            (d.id, tuple(d.coords), d.process_index, d.device_kind) for d in topology.devices
        ]
        assert described == [(c.id, c.coords, c.process_index, c.device_kind) for c in chips]
