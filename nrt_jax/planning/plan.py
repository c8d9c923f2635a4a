"""What a run takes on machines: memory, operations, traffic, time and cost, by formula."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from nrt_jax.config.run import RunConfig
from nrt_jax.planning.memory import USABLE, Memory, memory
from nrt_jax.planning.roofline import ASSUMED, Step, step
from nrt_jax.planning.setting import Setting, mesh_text, resolve
from nrt_jax.planning.traffic import scoring_traffic, sync_bytes, update_traffic
from nrt_jax.planning.work import Lengths, Work, work
from nrt_jax.topologies import Topology

if TYPE_CHECKING:
    from nrt_jax.planning.compiled import Compiled


class Plan(NamedTuple):
    """One run on one topology."""

    setting: Setting
    lengths: Lengths
    memory: Memory
    work: Work
    step: Step
    price_per_hour: float | None = None
    """Of one chip."""
    programs: "Mapping[str, Compiled] | None" = None
    """What was compiled; None for a plan by formula alone."""

    @property
    def usable(self) -> float:
        """Bytes of a device that programs may take."""
        return USABLE * self.setting.device_memory

    @property
    def fits(self) -> bool:
        """Whether the largest phase fits a device."""
        return self.memory.total <= self.usable

    @property
    def tokens_per_second(self) -> float:
        """Tokens of prompts, traces and answers, on all devices."""
        return self.work.tokens / self.step.total

    @property
    def update_mfu(self) -> float:
        """Operations of the model in the updates, over what the chips could do in their time."""
        peak = self.setting.device_flops * self.setting.topology.devices
        return self.work.update_model / (peak * self.step.update.total)

    @property
    def step_mfu(self) -> float:
        """The same of the whole step, with rollouts and scoring."""
        peak = self.setting.device_flops * self.setting.topology.devices
        work = self.work
        model = work.update_model + work.prefill.total + work.decode.total + work.scoring.total
        return model / (peak * self.step.total)

    @property
    def hours(self) -> float:
        """Of all steps of the run."""
        return self.setting.config.train.steps * self.step.total / 3600

    @property
    def cost(self) -> float | None:
        """Price of the whole run."""
        if self.price_per_hour is None:
            return None
        return self.price_per_hour * self.setting.topology.chips * self.hours


def make_plan(
    config: RunConfig,
    topology: Topology,
    *,
    lengths: Lengths | None = None,
    price_per_hour: float | None = None,
) -> Plan:
    """By formula. Raises InputError for sizes that do not divide over the mesh."""
    setting = resolve(config, topology)
    lengths = (lengths or Lengths()).within(config)
    amount = work(setting, lengths)
    times = step(setting, amount, lengths)
    return Plan(setting, lengths, memory(setting), amount, times, price_per_hour)


def with_programs(plan: Plan, programs: "Mapping[str, Compiled]") -> Plan:
    """The plan with the temporaries of compiled programs in the place of the formula's."""
    of_engine = [
        programs[name].temporaries for name in ("prefill", "decode step") if name in programs
    ]
    found = memory(plan.setting, programs["gradient"].temporaries, max(of_engine, default=0.0))
    return plan._replace(memory=found, programs=programs)


def traffic_of(plan: Plan) -> dict[str, float]:
    """Bytes that a device sends over each mesh axis in the updates and the scoring of a step."""
    setting, amount = plan.setting, plan.work
    found = update_traffic(setting, amount)
    for axis, bytes_ in scoring_traffic(setting, amount).items():
        found[axis] = found.get(axis, 0.0) + bytes_
    return found


def as_json(plan: Plan) -> dict[str, Any]:
    """All figures: bytes, operations and seconds, of one device unless the name says otherwise."""
    setting, amount, times = plan.setting, plan.work, plan.step
    phases = {name: getattr(times, name) for name in ("rollout", "scoring", "update", "sync")}
    return {
        "topology": setting.topology.name,
        "chips": setting.topology.chips,
        "mesh": mesh_text(setting.mesh),
        "rollout_mesh": mesh_text(setting.rollout_mesh),
        "weights": setting.count,
        "mean_tokens": plan.lengths._asdict(),
        "memory": plan.memory._asdict()
        | {"total": plan.memory.total, "of": setting.device_memory, "usable": plan.usable},
        "fits": plan.fits,
        "flops_of_all": {
            "update_model": amount.update_model,
            "update": amount.update.total,
            "scoring": amount.scoring.total,
            "prefill": amount.prefill.total,
            "decode": amount.decode.total,
        },
        "bytes_sent": traffic_of(plan) | {"weight sync": sync_bytes(setting)},
        "micro_batches_per_update": amount.micro_batches,
        "updates_per_step": amount.updates,
        "decode_steps": amount.decode_steps,
        "seconds": {name: time._asdict() | {"bound": time.bound} for name, time in phases.items()}
        | {"step": times.total},
        "update_mfu": plan.update_mfu,
        "step_mfu": plan.step_mfu,
        "tokens_per_second": plan.tokens_per_second,
        "tokens_per_second_per_chip": plan.tokens_per_second / setting.topology.chips,
        "hours": plan.hours,
        "cost": plan.cost,
        "assumed": list(ASSUMED),
        "programs": None
        if plan.programs is None
        else {name: one._asdict() for name, one in plan.programs.items()},
    }
