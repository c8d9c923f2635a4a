"""One GPU or TPU host checked and measured in a few minutes, without network.

    python -m benchmarks.accelerator --out DIRECTORY [--smollm2 DIRECTORY]
    JAX_PLATFORMS=cpu python -m benchmarks.accelerator --tiny --out DIRECTORY

Run it in the checkout, with nothing else on the device. It writes accelerator.json and
accelerator.md: (a) logits, gradients, traces and scores of a small model against the CPU's, through
each attention that the platform has; (b) MFU of a 1B-shaped micro-batch; (c) decoding at 64 and 256
slots against the memory's bandwidth; (d) the phases of an NRT step of SmolLM2-135M, whose folder
--smollm2 names; (e) the peak of memory in b against the plan's. Rates are shares of those of a
matmul and of an addition that are measured first. The status is 1 where a result is wrong or a
part failed. docs/performance.md says how to install without network.
"""

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import (
    accelerator_agreement,
    accelerator_decode,
    accelerator_step,
    accelerator_update,
)
from benchmarks.accelerator_tables import markdown
from benchmarks.machine import Machine, measure_machine
from nrt_jax.chips import Chip, chip_of

SECONDS = 480
"""No part is started after so many."""
PACKAGES = ("nrt-jax", "jax", "jaxlib", "flax", "libtpu", "jax-cuda13-plugin", "jax-cuda12-plugin")


def main() -> int:
    """Run the parts, each printed when it is done; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the two reports")
    parser.add_argument("--smollm2", type=Path, help="folder of SmolLM2-135M-Instruct, for part d")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU; rates mean nothing")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="no part starts after them")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    report: dict[str, Any] = {"environment": environment(), "tiny": args.tiny, "parts": {}}
    machine = measure_machine(jnp.bfloat16, tiny=args.tiny)
    report["measured"] = {"flops_per_s": machine.flops, "bytes_per_s": machine.bandwidth}
    with TemporaryDirectory() as scratch:
        for name, part in parts(args, machine, Path(scratch)).items():
            over = time.perf_counter() - started > args.seconds
            result = {"not_run": f"{args.seconds:.0f} s were over"} if over else guarded(part)
            report["parts"][name] = result
            report["seconds"] = time.perf_counter() - started
            # A part that ends the process leaves the reports of those before it.
            (args.out / "accelerator.json").write_text(json.dumps(report, indent=1) + "\n")
            (args.out / "accelerator.md").write_text(markdown(report))
            print(f"{name}: {json.dumps(result)}", flush=True)
    wrong = [
        name
        for name, result in report["parts"].items()
        if "error" in result or not result.get("right", True)
    ]
    if wrong:
        print(f"wrong: {', '.join(wrong)}; see {args.out}/accelerator.md", file=sys.stderr)
    return 1 if wrong else 0


def parts(
    args: argparse.Namespace, machine: Machine, scratch: Path
) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is measured, by name and in order."""
    sizes = "TINY" if args.tiny else "FULL"
    agreement, update, decode = (
        getattr(module, sizes)
        for module in (accelerator_agreement, accelerator_update, accelerator_decode)
    )
    chip = chip_of(jax.devices()[0].device_kind) or unknown_chip(machine)

    def step() -> dict[str, Any]:
        if args.smollm2 is None and not args.tiny:
            return {"not_run": "--smollm2 names no folder"}
        return accelerator_step.measure(args.smollm2, scratch)

    return {
        "agreement": partial(accelerator_agreement.measure, agreement),
        "update": partial(accelerator_update.measure, update, machine, chip),
        "decode": partial(accelerator_decode.measure, decode, machine),
        "step": step,
    }


def guarded(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of a part, or its error: the others are worth having without it."""
    start = time.perf_counter()
    try:
        result = part()
    except Exception as error:
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0]
        return {"error": f"{type(error).__name__}: {first_line}"}
    return result | {"part_s": time.perf_counter() - start}


def environment() -> dict[str, Any]:
    """Versions, and the device as jax names it."""
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "python": sys.version.split()[0],
        "versions": versions,
        "platform": device.platform,
        "device": device.device_kind,
        "devices": jax.device_count(),
        "runtime": " ".join(device.client.platform_version.split()),
    }


def unknown_chip(machine: Machine) -> Chip:
    """The rates measured here, and the memory that jax may use, or 8 GB."""
    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit", 8e9)
    kinds = (device.device_kind,)
    return Chip(
        device.device_kind, kinds, machine.flops, memory, machine.bandwidth, "", device.platform
    )


if __name__ == "__main__":
    sys.exit(main())
