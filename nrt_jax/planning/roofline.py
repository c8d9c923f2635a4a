"""The time of a step by rooflines: what a device computes, reads and sends, over what it can.

Rates that a device attains are assumed shares of the maker's peaks; `ASSUMED` says each in a line.
"""

from collections.abc import Mapping
from typing import NamedTuple

from nrt_jax.engine.decode_state import bucket
from nrt_jax.models.flops import Flops
from nrt_jax.planning.links import Link
from nrt_jax.planning.memory import (
    cache_bytes_per_token,
    rollout_weights_per_device,
    weights_per_device,
)
from nrt_jax.planning.setting import Setting
from nrt_jax.planning.traffic import (
    decode_step_traffic,
    prefill_traffic,
    scoring_traffic,
    sync_bytes,
    update_traffic,
)
from nrt_jax.planning.work import Lengths, Work

PRODUCTS = {"tpu": 0.8, "gpu": 0.7}
"""Share of the peak that large matrix products attain, by platform."""
READ = 0.8
"""Share of the memory's bandwidth."""
SENT = 0.9
"""Share of a link's bandwidth."""
SUM_S = 5e-6
"""Time until a sum over devices starts, seconds."""
HOST_LINK = 16e9
"""Bytes per second between a device and its host's memory."""
ASSUMED = (
    "large matrix products reach 80 % of the peak on TPUs and 70 % on GPUs, attention's half that",
    "memory is read at 80 % and links are used at 90 % of the maker's bandwidth",
    "norms, rotations and gates read and write memory while no product runs",
    "gathers of weights and sums of gradients run beside computation; sums over tensor and gathers "
    "over context do not; a sum starts in 5 microseconds",
    "a device and its host exchange 16 GB/s (optimizer.offload)",
    "traces and prompts have exponentially distributed lengths, up to the limits of the config",
    "data, evaluations, checkpoints, compilation and restarts take no time",
)
_ATTENTION = 0.5
"""Rate of attention's products, relative to others."""


class Time(NamedTuple):
    """Seconds of a phase, and what they are spent on."""

    compute: float
    """Matrix products."""
    memory: float
    """Reading and writing the device's memory."""
    network: float
    """Sending to other devices."""
    total: float

    @property
    def bound(self) -> str:
        """What takes longest."""
        return max(("compute", "memory", "network"), key=lambda name: getattr(self, name))


NOTHING = Time(0.0, 0.0, 0.0, 0.0)


class Step(NamedTuple):
    """Time of one step by phase."""

    rollout: Time
    scoring: Time
    update: Time
    sync: Time
    """Of new weights to the rollouts."""
    staleness: int

    @property
    def total(self) -> float:
        """Seconds; with `rollout.staleness` rollouts and updates share the same devices."""
        return sum(time.total for time in (self.rollout, self.scoring, self.update, self.sync))


def step(setting: Setting, work: Work, lengths: Lengths) -> Step:
    """Of these amounts of work on this setting."""
    return Step(
        rollout=_rollout(setting, work, lengths.within(setting.config)),
        scoring=_scoring(setting, work),
        update=_update(setting, work),
        sync=_sync(setting) if setting.config.method == "nrt" else NOTHING,
        staleness=setting.config.rollout.staleness,
    )


def _rate(setting: Setting) -> float:
    return setting.device_flops * PRODUCTS[setting.topology.chip.platform]


def _seconds(traffic: Mapping[str, float], links: Mapping[str, Link]) -> dict[str, float]:
    return {
        axis: bytes_ / (links[axis].bytes_per_s * SENT)
        for axis, bytes_ in traffic.items()
        if axis in links
    }


def _training_time(
    setting: Setting,
    flops: Flops,
    positions: int | float,
    traffic: Mapping[str, float],
    more: int | float,
) -> Time:
    """A pass over rows: products, then what is read between them; gathers beside both."""
    weights, attention, head = flops
    devices = setting.topology.devices
    compute = (weights + head + attention / _ATTENTION) / devices / _rate(setting)
    memory = _between_products(setting) * positions / devices / (setting.device_bandwidth * READ)
    memory += more
    sent = _seconds(traffic, setting.links())
    beside = sum(sent.get(axis, 0.0) for axis in ("data", "fsdp"))
    waited = sum(sent.get(axis, 0.0) for axis in ("tensor", "context"))
    total = max(compute + memory, beside) + waited
    return Time(compute, memory, beside + waited, total)


def _between_products(setting: Setting) -> float:
    """Bytes that norms, rotations, residuals and gates read and write per position, forward."""
    a, size = setting.architecture, setting.activation_bytes
    tensor = setting.mesh["tensor"]
    heads = a.head_dim * (a.num_attention_heads + a.num_key_value_heads) / tensor
    numbers = 8 * a.hidden_size + 2 * heads + 3 * a.intermediate_size / tensor
    return size * a.num_hidden_layers * numbers * tensor


def _update(setting: Setting, work: Work) -> Time:
    again = 1 if setting.config.model.remat == "full" else 0
    micro = work.updates * work.micro_batches
    passes = (3 + again) * work.micro_tokens + work.micro_baselines
    weights = 4 * weights_per_device(setting)
    # The sum of gradients is read and written per micro-batch, the state per update.
    state = weights * (3 * micro + 7 * work.updates) / (setting.device_bandwidth * READ)
    if setting.config.optimizer.offload:
        state += 4 * weights * work.updates / HOST_LINK
    traffic = update_traffic(setting, work)
    return _training_time(setting, work.update, passes * micro, traffic, state)


def _scoring(setting: Setting, work: Work) -> Time:
    if not work.scored_tokens:
        return NOTHING
    traffic = scoring_traffic(setting, work)
    return _training_time(setting, work.scoring, work.scored_tokens, traffic, 0.0)


def _rollout(setting: Setting, work: Work, lengths: Lengths) -> Time:
    """Prefill, full decode steps, and the steps of the last sequences."""
    if not work.decode_steps:
        return NOTHING
    sizes, config = setting.rollout_mesh, setting.config
    shards = sizes["data"] * sizes["fsdp"]
    slots = work.slots / shards
    generated = config.train.batch_prompts * config.rollout.traces_per_prompt * lengths.trace
    full = generated / work.slots
    few = work.decode_steps - full
    prompts = -(-config.train.batch_prompts // shards)
    steps = [
        _prefill(setting, work, lengths, prompts),
        _times(_decode_step(setting, slots, lengths), full),
        _times(_decode_step(setting, max(1.0, slots / 8), lengths), few),
    ]
    return Time(*(sum(part) for part in zip(*steps, strict=True)))


def _times(time: Time, count: int | float) -> Time:
    return Time(*(count * part for part in time))


def _decode_step(setting: Setting, slots: int | float, lengths: Lengths) -> Time:
    """Every weight is read once, and the keys and values of all slots."""
    a = setting.architecture
    tensor, fsdp = setting.rollout_mesh["tensor"], setting.rollout_mesh["fsdp"]
    weights = rollout_weights_per_device(setting) * fsdp
    if not a.tie_word_embeddings:
        weights -= setting.rollout_bytes * setting.weights.embedding / tensor
    cached = _keys_read(setting, slots, lengths) * cache_bytes_per_token(setting)
    memory = (weights + cached) / (setting.device_bandwidth * READ)
    products = setting.weights.layer * a.num_hidden_layers + setting.weights.embedding
    compute = 2 * slots * products / tensor / _rate(setting)
    traffic = decode_step_traffic(setting, slots)
    sent = _seconds(traffic, setting.rollout_links())
    starts = SUM_S * (
        (2 * a.num_hidden_layers + 2) * (tensor > 1) + a.num_hidden_layers * (fsdp > 1)
    )
    network = sum(sent.values()) + starts
    return Time(compute, memory, network, max(compute, memory) + network)


def _keys_read(setting: Setting, slots: int | float, lengths: Lengths) -> float:
    """Tokens whose keys and values a step reads.

    The TPU's kernel reads what a slot sees, and its prompt for each slot. The GPU's reads a slot's
    own tokens; prompts are read by a product over their capacity, once for the slots that share
    one. XLA's attention reads the capacity of both, that of the longest trace so far.
    """
    rollout = setting.config.rollout
    own = lengths.trace / 2
    if setting.decoding == "paged":
        return slots * (lengths.prompt + own)
    shared = min(rollout.traces_per_prompt, max(1.0, slots))
    prompt = bucket(lengths.longest_prompt(setting.config)) / shared
    if setting.decoding == "xla":
        own = float(bucket(lengths.longest_trace(setting.config)))
    return slots * (prompt + own)


def _prefill(setting: Setting, work: Work, lengths: Lengths, prompts: int) -> Time:
    sizes, rollout = setting.rollout_mesh, setting.config.rollout
    parts = -(-lengths.prompt // (rollout.prefill_chunk or lengths.prompt)) * prompts
    weights, attention, head = work.prefill
    used = sizes["data"] * sizes["fsdp"] * sizes["tensor"]
    compute = (weights + head + attention / _ATTENTION) / used / _rate(setting)
    read = rollout_weights_per_device(setting) * sizes["fsdp"] * parts
    memory = read / (setting.device_bandwidth * READ)
    traffic = prefill_traffic(setting, prompts * lengths.prompt, parts)
    network = sum(_seconds(traffic, setting.rollout_links()).values())
    return Time(compute, memory, network, max(compute, memory) + network)


def _sync(setting: Setting) -> Time:
    """Weights cast on the device that holds them, and sent to those that decode with them."""
    if setting.shares_weights:
        return NOTHING
    read = 4 * weights_per_device(setting) + rollout_weights_per_device(setting)
    memory = read / (setting.device_bandwidth * READ)
    links = setting.links()
    rate = min((link.bytes_per_s for link in links.values()), default=0.0)
    network = sync_bytes(setting) / (rate * SENT) if rate else 0.0
    return Time(0.0, memory, network, max(memory, network))
