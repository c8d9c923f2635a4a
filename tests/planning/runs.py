"""Configs to plan: a published model's shape, a machine, the paper's hyper-parameters."""

from pathlib import Path

from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.planning.plan import Plan, make_plan
from nrt_jax.topologies import parse_topology

DATA = ("data/tulu3_200k", "data.path=tulu3/*.parquet")
TOPOLOGIES = {
    "v5e_64": "v5e:8x8",
    "v5p_32": "v5p:2x4x4",
    "v6e_64": "v6e:8x8",
    "h100x8": "h100x8",
    "h200x8": "h200x8",
    "h100x1": "h100x1",
}
"""That of each preset of hardware/."""


def load(*words: str) -> RunConfig:
    """Names of presets and overrides, with rows."""
    words = (*words, *DATA)
    names = [Path(word) for word in words if "=" not in word]
    return load_config(RunConfig, names, [word for word in words if "=" in word])


def plan(topology: str, *words: str) -> Plan:
    return make_plan(load(*words), parse_topology(topology))
