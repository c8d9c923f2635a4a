"""Memory of a device by formula: what each phase of a step holds at its largest.

Dims: those of decoder.py; q = H G d and kv = H d are the widths of queries, and of keys or values.
"""

from typing import NamedTuple

from nrt_jax.engine.decode_state import bucket
from nrt_jax.planning.setting import Setting

USABLE = 0.95
"""Share of a chip's memory that a program may take; the runtime keeps the rest."""
_PAGE = 64


class Memory(NamedTuple):
    """Bytes on one device; of a phase all that lies there while it runs."""

    weights: float
    moments: float
    gradient: float
    """The sum over the micro-batches of an update."""
    activations: float
    """What a micro-batch of the largest shape adds, its own gradient included."""
    rollout_weights: float
    caches: float
    decoding: float
    """Logits, and what prefill and decoding compute with."""
    rollout: float
    """Weights, moments, the rollouts' weights, caches."""
    update: float
    """Weights, moments, gradient, activations of a micro-batch."""
    apply: float
    """Weights, moments and gradient, with the moments on the device."""

    @property
    def total(self) -> float:
        """Of the phase that takes most."""
        return max(self.rollout, self.update, self.apply)

    @property
    def phase(self) -> str:
        """The phase that takes most."""
        return max(("rollout", "update", "apply"), key=lambda name: getattr(self, name))


def memory(
    setting: Setting, activations: float | None = None, decoding: float | None = None
) -> Memory:
    """By formula; the temporaries of compiled programs take the place of the formula's."""
    config = setting.config
    weights = 4 * weights_per_device(setting)
    moments = 0.0 if config.optimizer.offload else 2 * weights
    if activations is None:
        activations = micro_batch(setting)
    rollout_weights, caches = 0.0, 0.0
    if config.method == "nrt":
        rollout_weights = 0.0 if setting.shares_weights else rollout_weights_per_device(setting)
        caches = _caches(setting)
    if decoding is None:
        decoding = _decoding(setting) if config.method == "nrt" else 0.0
    reference = weights if config.method == "nrt" and config.objective.kl_coefficient else 0.0
    kept = weights + moments + reference
    rollout = rollout_weights + caches + decoding
    # Rollouts run beside the update where they may be one step behind it.
    beside = rollout if config.rollout.staleness and config.method == "nrt" else 0.0
    return Memory(
        weights=weights + reference,
        moments=moments,
        gradient=weights,
        activations=activations,
        rollout_weights=rollout_weights,
        caches=caches,
        decoding=decoding,
        rollout=kept + rollout,
        update=kept + weights + activations + beside,
        apply=reference + 4 * weights + beside,
    )


def weights_per_device(setting: Setting) -> float:
    """Weights of training that lie on one device."""
    shards = setting.mesh["fsdp"] * setting.mesh["tensor"]
    norms = setting.weights.norms
    return (setting.count - norms) / shards + norms


def rollout_weights_per_device(setting: Setting) -> float:
    """Bytes of the rollouts' weights on one device; norms stay in float32."""
    sizes, norms = setting.rollout_mesh, setting.weights.norms
    shards = sizes["fsdp"] * sizes["tensor"]
    return setting.rollout_bytes * (setting.count - norms) / shards + 4 * norms


def micro_batch(setting: Setting) -> float:
    """Bytes that the largest micro-batch adds to weights and summed gradient, its own included."""
    trained, baselines = largest_positions(setting)
    saved = _saved_per_position(setting) * trained * setting.architecture.num_hidden_layers
    gradient = 4 * weights_per_device(setting)
    return gradient + saved + _layer(setting, trained, baselines) + _head(setting, trained)


def largest_positions(setting: Setting) -> tuple[float, float]:
    """Of the largest micro-batch on one device: those with a gradient, those of the baselines."""
    shape, sizes = setting.shape, setting.mesh
    shards = sizes["data"] * sizes["fsdp"] * sizes["context"]
    pack = shape.prompt_tokens + shape.rows * shape.row_tokens
    return shape.packs * pack / shards, shape.packs * shape.baseline_tokens / shards


def _widths(setting: Setting) -> tuple[int, float, float, float]:
    """D, and q, kv and F of one device."""
    a, tensor = setting.architecture, setting.mesh["tensor"]
    q, kv = a.num_attention_heads * a.head_dim, a.num_key_value_heads * a.head_dim
    return a.hidden_size, q / tensor, kv / tensor, a.intermediate_size / tensor


def _saved_per_position(setting: Setting) -> float:
    """Bytes that each layer keeps of a position for the backward pass, by `model.remat`."""
    D, q, kv, F = _widths(setting)
    size = setting.activation_bytes
    match setting.config.model.remat:
        case "full" | "offload":
            return float(size * D)
        case "dots":
            return size * (3 * D + q + 2 * kv + 2 * F)
        case _:
            return size * (4 * D + 2 * q + 2 * kv + 2 * F)


def _layer(setting: Setting, trained: int | float, baselines: int | float) -> float:
    """Bytes of one layer's backward pass: its activations, their gradients, its whole weights."""
    D, q, kv, F = _widths(setting)
    size, sizes = setting.activation_bytes, setting.mesh
    again = setting.config.model.remat == "full"
    forward = (4 * D + 2 * q + 2 * kv + 2 * F) if again else 0.0
    backward = 2 * D + F
    context = sizes["context"]
    gathered_keys = 2 * kv * (context - 1) * trained * size
    weights = setting.weights.layer / sizes["tensor"]
    gathered = 2 * size * weights if sizes["fsdp"] > 1 or size < 4 else 0.0
    baseline = size * (2 * D + q + F) * baselines
    return size * (forward + backward) * trained + gathered_keys + gathered + 4 * weights + baseline


def _head(setting: Setting, trained: int | float) -> float:
    """Bytes of the gathered head, its float32 gradient, and a chunk's logits and their gradient."""
    a, sizes = setting.architecture, setting.mesh
    rows = setting.weights.embedding / a.hidden_size / sizes["tensor"]
    whole = rows * a.hidden_size
    gathered = setting.activation_bytes * whole
    chunk = min(trained, setting.config.model.logprob_chunk_tokens)
    return gathered + 4 * whole + 2 * 4 * chunk * rows


# --- rollouts ------------------------------------------------------------------------------------


def cache_bytes_per_token(setting: Setting) -> float:
    """Bytes of the keys and values of one token on one device, in all layers."""
    a, size = setting.architecture, setting.cache_bytes
    scale = 4 if size == 1 else 0
    heads = a.num_key_value_heads / setting.rollout_mesh["tensor"]
    return 2 * a.num_hidden_layers * heads * (a.head_dim * size + scale)


def _slots_per_device(setting: Setting) -> float:
    sizes = setting.rollout_mesh
    return setting.config.rollout.slots / (sizes["data"] * sizes["fsdp"])


def _caches(setting: Setting) -> float:
    """Full slots: a prompt slot for K of them, and the longest trace in each."""
    rollout = setting.config.rollout
    slots = _slots_per_device(setting)
    prompts = -(-slots // min(slots, rollout.traces_per_prompt))
    tail = _PAGE if setting.decoding == "paged" else 0
    tokens = prompts * bucket(setting.config.data.max_prompt_tokens + 1)
    tokens += slots * (bucket(rollout.max_trace_tokens) + tail)
    return tokens * cache_bytes_per_token(setting)


def _decoding(setting: Setting) -> float:
    """Logits and seen tokens of the slots; a prompt's part in prefill, and its keys and values."""
    a, rollout, sizes = setting.architecture, setting.config.rollout, setting.rollout_mesh
    rows = setting.weights.embedding / a.hidden_size / sizes["tensor"]
    logits = (3 * 4 + 1) * rows * _slots_per_device(setting)
    longest = bucket(setting.config.data.max_prompt_tokens + 1)
    part = min(longest, rollout.prefill_chunk or longest)
    width = 4 * a.hidden_size + 2 * a.intermediate_size / sizes["tensor"]
    kept = 2 * a.num_key_value_heads * a.head_dim * a.num_hidden_layers / sizes["tensor"]
    return logits + setting.rollout_bytes * (part * width + 2 * longest * kept)
