"""Bytes that one device sends over each mesh axis in a step, in rings, by formula.

Weights are gathered over `fsdp` in the dtype of the computation, once forward and once backward,
and their gradient is reduced in float32 once per micro-batch; over `data` it is summed as often.
With `tensor` the activations are summed twice per layer forward, twice backward, and once where
the layer is run again. With `context` the keys and values of a row are gathered where they are
attended to, and their gradients reduced.
"""

from collections.abc import Mapping

from nrt_jax.planning.setting import Setting, Sizes
from nrt_jax.planning.work import Work

Traffic = Mapping[str, float]
"""Bytes by axis; axes of one device are left out."""


def _share(size: int) -> float:
    """Of what a ring moves, what a device sends: (n - 1) / n."""
    return (size - 1) / size


def update_traffic(setting: Setting, work: Work) -> dict[str, float]:
    """Of all updates of a step."""
    sizes, a = setting.mesh, setting.architecture
    micro = work.updates * work.micro_batches
    per_device = 1 / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    trained, constant = work.micro_tokens * per_device, work.micro_baselines * per_device
    scored = work.micro_scored * per_device
    of_tensor = (setting.count - setting.weights.norms) / sizes["tensor"]
    size = setting.activation_bytes
    again = 1 if setting.config.model.remat == "full" else 0
    sums = (4 + again) * trained + 2 * constant + scored / a.num_hidden_layers
    exchanged = size * a.hidden_size * (2 * trained + constant)
    one = {
        "data": 2 * 4 * of_tensor / sizes["fsdp"] * _share(sizes["data"]),
        "fsdp": (of_tensor * (2 * size + 4) + exchanged) * _share(sizes["fsdp"]),
        "tensor": _summed(setting, sums, sizes),
        "context": _keys(setting, (3 + again) * trained + constant)
        + 2 * 4 * of_tensor / sizes["fsdp"] * _share(sizes["context"]),
    }
    return {axis: bytes_ * micro for axis, bytes_ in one.items() if sizes[axis] > 1}


def scoring_traffic(setting: Setting, work: Work) -> dict[str, float]:
    """Of the logprobs before the updates: one forward pass."""
    sizes = setting.mesh
    if not work.scored_tokens:
        return {axis: 0.0 for axis, size in sizes.items() if size > 1}
    tokens = work.scored_tokens / (sizes["data"] * sizes["fsdp"] * sizes["context"])
    of_tensor = (setting.count - setting.weights.norms) / sizes["tensor"]
    size, passes = setting.activation_bytes, work.updates * work.micro_batches
    embedded = size * setting.architecture.hidden_size * tokens
    one = {
        "data": 0.0,
        "fsdp": (of_tensor * size * passes + embedded) * _share(sizes["fsdp"]),
        "tensor": _summed(setting, 2 * tokens, sizes),
        "context": _keys(setting, tokens),
    }
    return {axis: bytes_ for axis, bytes_ in one.items() if sizes[axis] > 1}


def decode_step_traffic(setting: Setting, slots: int | float) -> dict[str, float]:
    """Of one decode step of so many sequences on one shard of the slots."""
    sizes = setting.rollout_mesh
    weights = setting.rollout_bytes * (setting.count - setting.weights.embedding)
    one = {
        "data": 0.0,
        "fsdp": weights / sizes["tensor"] * _share(sizes["fsdp"]),
        "tensor": _summed(setting, 2 * slots, sizes, setting.rollout_bytes),
        "context": 0.0,
    }
    return {axis: bytes_ for axis, bytes_ in one.items() if sizes[axis] > 1}


def prefill_traffic(setting: Setting, tokens: int | float, parts: int | float) -> dict[str, float]:
    """Of so many prompt tokens of a shard, run in so many parts."""
    one = decode_step_traffic(setting, tokens)
    return one | {"fsdp": one["fsdp"] * parts} if "fsdp" in one else one


def sync_bytes(setting: Setting) -> float:
    """Bytes that a device receives when the rollouts get new weights: what it does not hold."""
    if setting.shares_weights:
        return 0.0
    rollout, sizes = setting.rollout_mesh, setting.mesh
    here = 1 / (sizes["fsdp"] * sizes["tensor"])
    wanted = 1 / (rollout["fsdp"] * rollout["tensor"])
    return setting.rollout_bytes * setting.count * max(0.0, wanted - here * wanted)


def _summed(setting: Setting, tokens: int | float, sizes: Sizes, size: int | None = None) -> float:
    """One sum of the activations of so many tokens over `tensor`, in every layer."""
    a, size = setting.architecture, size or setting.activation_bytes
    each = 2 * size * tokens * a.hidden_size * _share(sizes["tensor"])
    return a.num_hidden_layers * each


def _keys(setting: Setting, tokens: int | float) -> float:
    """Keys and values of so many tokens of a device, sent to the other devices of `context`."""
    a, sizes = setting.architecture, setting.mesh
    width = 2 * a.num_key_value_heads * a.head_dim / sizes["tensor"]
    others = sizes["context"] - 1
    return a.num_hidden_layers * setting.activation_bytes * tokens * width * others
