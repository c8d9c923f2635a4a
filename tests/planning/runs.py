"""Plans of presets."""

from benchmarks.plans import load
from nrt_jax.planning.plan import Plan, make_plan
from nrt_jax.topologies import parse_topology


def plan(topology: str, *words: str) -> Plan:
    """Of presets and overrides, with rows."""
    return make_plan(load(*words), parse_topology(topology))
