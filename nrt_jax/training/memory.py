"""Device memory of a training step: what each part takes, and what to change when it runs out."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np

from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.errors import RunFailed
from nrt_jax.models.sharding import on_device

log = logging.getLogger(__name__)

WEIGHTS, MOMENTS = "weights", "optimizer moments"
GRADIENT, ACTIVATIONS = "gradient", "activations and temporaries"

REMEDIES = {
    WEIGHTS: "shard them over more devices with mesh.fsdp or mesh.tensor",
    MOMENTS: "set optimizer.offload=true, or shard them over more devices with mesh.fsdp",
    GRADIENT: "shard it over more devices with mesh.fsdp or mesh.tensor",
    ACTIVATIONS: "lower train.micro_batch_prompts, set model.remat=full, "
    "lower model.logprob_chunk_tokens, or shard tokens with mesh.context",
}


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays, or of abstract arrays with shardings, on one device."""
    return sum(
        np.dtype(leaf.dtype).itemsize * int(np.prod(leaf.sharding.shard_shape(leaf.shape)))
        for leaf in jax.tree.leaves(tree)
        if on_device(leaf.sharding)
    )


class DeviceMemory:
    """Bytes of each part of a step on one device; of the activations once a program is compiled."""

    def __init__(self, state: TrainState):
        weights = bytes_per_device(state.params)
        self.parts = {
            WEIGHTS: weights,
            MOMENTS: bytes_per_device(state.opt_state),
            GRADIENT: weights,
        }

    def log_parts(self) -> None:
        """Log the parts known so far."""
        log.info("memory per device: %s", self._described())

    def add_program(self, name: str, compiled: jax.stages.Compiled) -> None:
        """Log the memory of a compiled program, by XLA's own analysis."""
        analysis = compiled.memory_analysis()
        if analysis is None:
            return
        temporaries = int(analysis.temp_size_in_bytes)
        self.parts[ACTIVATIONS] = max(temporaries, self.parts.get(ACTIVATIONS, 0))
        state = sum(size for part, size in self.parts.items() if part != ACTIVATIONS)
        log.info(
            "memory per device: %s: %s of temporaries, %s with the state",
            name,
            gibibytes(temporaries),
            gibibytes(temporaries + state),
        )

    def _described(self) -> str:
        return ", ".join(f"{part} {gibibytes(size)}" for part, size in self.parts.items())

    @contextmanager
    def explained(self) -> Iterator[None]:
        """Raise RunFailed instead of jax's error when a device runs out of memory.

        The message names the largest part and the settings that shrink it.
        """
        try:
            yield
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            largest = max(self.parts, key=self.parts.__getitem__)
            first_line = str(error).splitlines()[0]
            raise RunFailed(
                f"out of memory: the largest part of a device's memory is {largest} "
                f"({self._described()}); {REMEDIES[largest]} [{first_line}]"
            ) from error


def gibibytes(size: int) -> str:
    """A number of bytes as readable text."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 / 100 else f"{size / 2**20:.2f} MiB"
