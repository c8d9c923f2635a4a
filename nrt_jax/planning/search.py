"""Settings of a run that fit its machines, by formula: the fastest, and the cheapest changes.

Tried: how `fsdp`, `tensor` and `context` divide the devices, what is recomputed, the size of a
micro-batch, the moments' place, the slots, the dtype of the caches, and the rollouts' mesh. None of
them changes a result but by rounding.
"""

import math
from collections.abc import Iterator
from itertools import product
from typing import Any, NamedTuple

from nrt_jax.config.mesh import MeshConfig
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.planning.plan import Plan, make_plan
from nrt_jax.planning.setting import Sizes, mesh_config, planned_architecture, weights_of
from nrt_jax.planning.work import Lengths
from nrt_jax.topologies import Topology

BEST = 10
_REMATS = ("none", "dots", "full")
_CONTEXTS, _TENSORS = (1, 2, 4, 8), (1, 2, 4, 8)
_SLOTS = (64, 128, 256, 512, 1024, 2048)

Changes = dict[str, Any]
"""Overrides of a config by their keys."""


class Candidate(NamedTuple):
    """Settings, and their plan."""

    changes: Changes
    plan: Plan


def search(
    config: RunConfig,
    topology: Topology,
    *,
    lengths: Lengths | None = None,
    price_per_hour: float | None = None,
) -> list[Candidate]:
    """The fastest settings that fit, at most `BEST`; training and rollouts are chosen apart.

    Raises InputError where none fits.
    """
    options = {"lengths": lengths, "price_per_hour": price_per_hour}
    trainings = list(_trainings(config, topology))
    if not trainings:
        raise InputError(
            f"train.mini_batch_prompts={config.train.mini_batch_prompts}: no mesh of the "
            f"{topology.devices} devices of {topology.name} divides it; use a multiple of 8"
        )
    rollouts = _rollouts(changed(config, trainings[0]), topology, options)
    found = []
    for changes in trainings:
        best = _first_fitting(config, topology, changes, rollouts, options)
        found += [] if best is None else [best]
    if not found:
        raise InputError(
            f"no mesh, model.remat, micro-batch, slots or cache of those tried fits "
            f"{topology.name}; {_remedy(config, topology)}"
        )
    return sorted(found, key=lambda candidate: candidate.plan.step.total)[:BEST]


def changed(config: RunConfig, changes: Changes) -> RunConfig:
    """The config with some keys set, `section.field` each."""
    values: dict[str, Any] = {}
    for key, value in changes.items():
        section, _, field = key.partition(".")
        values.setdefault(section, {})[field] = value
    sections = {name: getattr(config, name).model_copy(update=of) for name, of in values.items()}
    return config.model_copy(update=sections)


def changes_text(changes: Changes) -> str:
    """The overrides as on a command line."""
    words = []
    for key, value in changes.items():
        if isinstance(value, MeshConfig):
            sizes = value.model_dump()
            axes = {name: sizes[name] for name in ("data", "fsdp", "tensor", "context")}
            words += [f"{key}.{axis}={size}" for axis, size in axes.items()]
        else:
            words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return " ".join(words)


# --- what is tried -------------------------------------------------------------------------------


def _trainings(config: RunConfig, topology: Topology) -> Iterator[Changes]:
    """Meshes of training, with what fits in their devices' memory."""
    offloads = (False, True)
    for sizes in _meshes(config, topology):
        shards = sizes["data"] * sizes["fsdp"]
        micros = _micro_batches(config, shards)
        for remat, micro, offload in product(_REMATS, micros, offloads):
            yield {
                **{f"mesh.{axis}": size for axis, size in sizes.items()},
                "model.remat": remat,
                "train.micro_batch_prompts": micro,
                "optimizer.offload": offload,
            }


def _meshes(config: RunConfig, topology: Topology) -> Iterator[Sizes]:
    """Sizes whose shards of prompts divide a mini-batch."""
    a, devices = planned_architecture(config), topology.devices
    for tensor, context in product(_TENSORS, _CONTEXTS):
        shards, rest = divmod(devices, tensor * context)
        if rest or config.train.mini_batch_prompts % shards or a.num_key_value_heads % tensor:
            continue
        fsdp = math.gcd(shards, a.hidden_size)
        yield {"data": shards // fsdp, "fsdp": fsdp, "tensor": tensor, "context": context}
        if fsdp > 8 and fsdp % 8 == 0:
            yield {"data": shards // 8, "fsdp": 8, "tensor": tensor, "context": context}


def _micro_batches(config: RunConfig, shards: int) -> list[int]:
    """One, two and four prompts per shard, where they divide a mini-batch."""
    sizes = (shards * n for n in (1, 2, 4))
    return [n for n in sizes if config.train.mini_batch_prompts % n == 0]


def _rollouts(
    config: RunConfig, topology: Topology, options: Changes
) -> list[tuple[float, Changes]]:
    """Meshes, slots and caches of the rollouts, by the time of a step's rollouts.

    `config` has a mesh of training that divides.
    """
    if config.method == "sft":
        return [(0.0, {})]
    found = []
    dtype = config.rollout.dtype or config.model.dtype
    for tensor, slots, cache in product(_TENSORS, _SLOTS, (dtype, "int8")):
        if topology.devices % tensor or slots % (topology.devices // tensor):
            continue
        data = topology.devices // tensor
        mesh = mesh_config({"data": data, "fsdp": 1, "tensor": tensor, "context": 1})
        changes = {"rollout.mesh": mesh, "rollout.slots": slots, "rollout.cache_dtype": cache}
        try:
            plan = make_plan(changed(config, changes), topology, **options)
        except InputError:
            continue
        found.append((plan.step.rollout.total, changes))
    return sorted(found, key=lambda one: one[0])


def _first_fitting(
    config: RunConfig,
    topology: Topology,
    training: Changes,
    rollouts: list[tuple[float, Changes]],
    options: Changes,
) -> Candidate | None:
    """These settings of training with the fastest rollouts that fit beside them."""
    for _, rollout in rollouts:
        changes = training | rollout
        try:
            plan = make_plan(changed(config, changes), topology, **options)
        except InputError:
            return None
        if plan.fits:
            return Candidate(changes, plan)
        if max(plan.memory.update, plan.memory.apply) > plan.usable:
            return None
    return None


# --- a plan that does not fit --------------------------------------------------------------------


def cheapest_changes(plan: Plan, count: int = 3) -> list[Candidate]:
    """Single and paired changes that make a plan fit, those that slow a step down least first."""
    config, topology = plan.setting.config, plan.setting.topology
    options: Changes = {"lengths": plan.lengths, "price_per_hour": plan.price_per_hour}
    single = list(_single_changes(plan))
    pairs = (
        a | b for i, a in enumerate(single) for b in single[i + 1 :] if not a.keys() & b.keys()
    )
    found: list[Candidate] = []
    for changes in [*single, *pairs]:
        if any(candidate.changes.items() <= changes.items() for candidate in found):
            continue
        try:
            other = make_plan(changed(config, changes), topology, **options)
        except InputError:
            continue
        if other.fits:
            found.append(Candidate(changes, other))
    return sorted(found, key=lambda candidate: candidate.plan.step.total)[:count]


def _single_changes(plan: Plan) -> Iterator[Changes]:
    config, topology = plan.setting.config, plan.setting.topology
    yield {"model.remat": "full"}
    yield {"optimizer.offload": True}
    yield {"rollout.cache_dtype": "int8"}
    for slots in _SLOTS:
        if slots < config.rollout.slots:
            yield {"rollout.slots": slots}
    for sizes in _meshes(config, topology):
        yield {f"mesh.{axis}": size for axis, size in sizes.items()} | {
            "train.micro_batch_prompts": sizes["data"] * sizes["fsdp"]
        }
    for tensor in _TENSORS:
        if topology.devices % tensor == 0:
            sizes = {"data": -1, "fsdp": 1, "tensor": tensor, "context": 1}
            yield {"rollout.mesh": mesh_config(sizes)}


def misfit(plan: Plan) -> str:
    """One line for a plan that does not fit: by how much, and what makes it fit."""
    memory, gb = plan.memory, 1e9
    over = memory.total - plan.usable
    what = {"rollout": "rollouts", "update": "a micro-batch", "apply": "an update"}[memory.phase]
    found = cheapest_changes(plan)
    remedy = _remedy(plan.setting.config, plan.setting.topology)
    if found:
        cheapest = (
            f"{changes_text(one.changes)} ({one.plan.memory.total / gb:.1f} GB, "
            f"{one.plan.step.total:.0f} s per step)"
            for one in found
        )
        remedy = f"the cheapest changes that fit: {'; '.join(cheapest)}"
    return (
        f"topology {plan.setting.topology.name}: {what} take{'s' if what[0] == 'a' else ''} "
        f"{memory.total / gb:.1f} GB of a device, {over / gb:.1f} GB more than the "
        f"{plan.usable / gb:.1f} GB that can be used; {remedy}"
    )


def _remedy(config: RunConfig, topology: Topology) -> str:
    states = 16 * _count(config) / topology.devices
    return (
        f"weights, moments and gradient alone are {states / 1e9:.1f} GB on each of "
        f"{topology.devices} devices; take more chips or larger ones, or a smaller model"
    )


def _count(config: RunConfig) -> int:
    a = planned_architecture(config)
    return weights_of(a, config.model.vocab_multiple).total(a.num_hidden_layers)
