"""What a dispatch of decode steps costs the host, on a simulated mesh: no devices are needed.

    python -m benchmarks.host_work
    python -m benchmarks.host_work --devices 64 --slots 4096 --steps 16

A model of one narrow layer decodes in `--slots` slots over `--devices` devices of the CPU, which
all belong to this process; on a pod a process has those of its host alone. Times are CPU
milliseconds of the thread that drives the engine. `launch` is the call of the compiled program,
`scheduler` the rest of a step of the scheduler, and `traces` the cutting of traces out of what was
read. Dispatches in which all sequences go on are told apart from those in which some end and others
start; prompts have 8 traces of 1 to `--longest` tokens there.
"""

import argparse
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from statistics import median
from typing import Any

PARTS = ("launch", "scheduler", "traces")
COPIES = 8


def main() -> None:
    """Measure, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=64)
    parser.add_argument("--slots", type=int, default=4096)
    parser.add_argument("--steps", type=int, default=16, help="tokens decoded per dispatch")
    parser.add_argument("--longest", type=int, default=512, help="trace, in tokens")
    parser.add_argument("--dispatches", type=int, default=20)
    args = parser.parse_args()
    # Before jax starts.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": str(args.devices)}
    print(f"{args.slots} slots, {args.devices} devices: CPU ms of the host per dispatch, medians")
    for name, shortest in (("all go on", args.longest), ("some end and start", 1)):
        times, ended = measure(args, shortest)
        parts = {part: 1e3 * median(row[part] for row in times) for part in PARTS}
        parts["sum"] = 1e3 * median(sum(row.values()) for row in times)
        said = ", ".join(f"{part} {ms:.2f}" for part, ms in parts.items())
        print(f"{name:18s}  {said}; {ended:.0f} sequences ended per dispatch", flush=True)


def measure(args: argparse.Namespace, shortest: int) -> tuple[list[dict[str, float]], float]:
    """CPU seconds of each part, dispatch by dispatch, with compiled programs; ends per dispatch."""
    import jax

    from nrt_jax.engine.requests import first_sizes
    from nrt_jax.engine.scheduler import Scheduler
    from nrt_jax.engine.trace_log import TraceLog

    engine, params, requests = workload(args, shortest)
    spent: dict[str, float] = defaultdict(float)
    engine.programs.get = timed_launch(engine.programs.get, spent)
    times: list[dict[str, float]] = []
    ended = 0
    for measures in (False, True):
        scheduler = Scheduler(engine, params, steps=args.steps, sizes=first_sizes(engine, requests))
        for request in requests:
            scheduler.submit(request, jax.random.key(0))
        log = TraceLog()
        # The first fills the slots; nothing was read before the second.
        for number in range(args.dispatches + 2):
            spent.clear()
            # The devices are threads of the same CPU, and would take the caches from this one.
            jax.block_until_ready(scheduler._state)
            with cpu_seconds(spent, "scheduler"):
                read = scheduler.advance()
            with cpu_seconds(spent, "traces"):
                traces = {} if read is None else dict(log.add(read))
            spent["scheduler"] -= spent["launch"]
            if measures and number > 1:
                times.append({name: spent[name] for name in PARTS})
                ended += len(traces)
    return times, ended / len(times)


def workload(args: argparse.Namespace, shortest: int) -> tuple[Any, Any, list[Any]]:
    """An engine, its weights, and requests for twice as many sequences as there are slots."""
    import jax
    import numpy as np
    from flax import nnx

    from nrt_jax.config.architecture import Architecture
    from nrt_jax.config.mesh import MeshConfig
    from nrt_jax.engine.engine import Engine
    from nrt_jax.engine.requests import Request
    from nrt_jax.models.decoder import Decoder
    from nrt_jax.models.sharding import make_mesh, param_shardings

    architecture = Architecture(
        vocab_size=256,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=16,
    )
    mesh = make_mesh(MeshConfig(data=args.devices))
    decoder = Decoder(architecture, nnx.Rngs(0))
    definition, state = nnx.split(decoder)
    params = jax.device_put(nnx.to_pure_dict(state), param_shardings(mesh, state))
    engine = Engine(
        definition,
        architecture,
        mesh,
        slots=args.slots,
        max_prompt_tokens=16,
        max_new_tokens=args.longest,
        stop_ids=frozenset(),
        num_samples=COPIES,
    )
    rng = np.random.default_rng(0)
    requests = [
        Request(
            rng.integers(0, 256, 16, np.int32),
            number,
            COPIES,
            tuple(rng.integers(shortest, args.longest + 1, COPIES).tolist()),
        )
        for number in range(2 * args.slots // COPIES)
    ]
    return engine, params, requests


def timed_launch(get: Callable[..., Callable], spent: dict[str, float]) -> Callable[..., Callable]:
    """`Programs.get`, whose decode programs add their time to `spent`."""

    def timed_get(kind: str, *shapes: Any, make: Callable[[], Callable]) -> Callable:
        program = get(kind, *shapes, make=make)
        if kind != "generate":
            return program

        @wraps(program)
        def launch(*args: Any) -> Any:
            with cpu_seconds(spent, "launch"):
                return program(*args)

        return launch

    return timed_get


@contextmanager
def cpu_seconds(spent: dict[str, float], name: str) -> Iterator[None]:
    """Add the CPU seconds of this thread."""
    start = time.thread_time()
    yield
    spent[name] += time.thread_time() - start


if __name__ == "__main__":
    main()
