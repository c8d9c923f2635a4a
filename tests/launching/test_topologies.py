"""Machines by name, and the nearest names of others."""

import re

import pytest

from nrt_jax.errors import InputError
from nrt_jax.topologies import names, parse_topology


@pytest.mark.parametrize(
    ("name", "hosts", "per_host", "devices"),
    [
        ("v5p:4x4x4", 16, 4, 64),
        ("v5p:2x2x1", 1, 4, 4),
        ("v5p:8x8x12", 192, 4, 768),
        ("v6e:1x1", 1, 1, 1),
        ("v6e:2x4", 1, 8, 8),
        ("v6e:8x8", 16, 4, 64),
        ("tpu7x:2x2x2", 2, 4, 16),
        ("h100x8", 1, 8, 8),
        ("h100x8:4", 4, 8, 32),
        ("a3-mega:4", 4, 8, 32),
        ("h100x1", 1, 1, 1),
    ],
)
def test_hosts_and_devices(name, hosts, per_host, devices):
    topology = parse_topology(name)
    assert (topology.hosts, topology.chips_per_host, topology.devices) == (hosts, per_host, devices)


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("v5p:4x4x5", "v5p:4x4x4"),
        ("v5p:8x4x4", "v5p:4x4x8"),
        ("v6e:8x16x1", "v6e:8x16"),
        ("v5p-128", "v5p:"),
        ("V6E:4x4", "v6e:4x4"),
        ("h100x16", "h100x8"),
        ("h100", "h100x8"),
        ("a3-meg:4", "a3-mega"),
        ("h100x8:0", "h100x8"),
        ("v5p:", "v5p:"),
        ("", "name a TPU slice such as v5p:4x4x4"),
        ("quantum", "name a TPU slice such as v5p:4x4x4"),
    ],
)
def test_an_unknown_one_names_the_nearest(name, near):
    with pytest.raises(InputError, match=rf"^topology {re.escape(name)}: unknown; .*{near}"):
        parse_topology(name)


def test_every_name_to_choose_from_is_known():
    assert all(parse_topology(name).name == name for name in names())
