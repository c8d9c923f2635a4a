"""Several processes as one program: how jax starts in them, and how they agree.

All of them make the same decisions from the same values, so what they exchange is little: whether
one was asked to stop, and digests of what must be the same. It goes through the key-value store of
jax's coordination service, which needs no device.
"""

import hashlib
import io
import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from logging.handlers import MemoryHandler
from pathlib import Path
from typing import Any, NamedTuple

from nrt_jax.errors import InputError
from nrt_jax.peers import Peers, meet

log = logging.getLogger(__name__)

TIMEOUT_S = 300.0
"""How long processes wait for each other at the start."""
HEARTBEAT_S = 50
"""After so long without a sign of life a host counts as dead, and all processes end."""
COORDINATOR, PROCESS_ID, PROCESSES = (
    "NRT_JAX_COORDINATOR",
    "NRT_JAX_PROCESS_ID",
    "NRT_JAX_PROCESSES",
)
"""Environment variables that say what --coordinator, --process-id and --processes do."""
_HEAR_S = 1.0
_FOREVER_MS = 10 * 24 * 3600 * 1000
"""A process that computes longer than others is waited for; one that is dead ends all."""


LOG = re.compile(r"log\.\d+\.txt")
"""Names of the logs of the processes other than the first, in a run directory."""


class Place(NamedTuple):
    """Which process this is, and where process 0 is found."""

    coordinator: str
    """host:port."""
    process: int
    processes: int
    local_devices: list[int] | None = None
    """Ids of the host's devices that are this process's; None for all."""


class _State:
    """Of this process; without others there is none."""

    place: Place | None = None
    peers: Peers | None = None
    rounds = 0
    """Exchanges so far, the same number on all processes."""


# --- start ---------------------------------------------------------------------------------------


def find_place(
    coordinator: str | None = None, process: int | None = None, processes: int | None = None
) -> Place | None:
    """The place of this process by options, by the environment, or by what jax detects.

    None for the only process. jax detects Cloud TPU, SLURM, Open MPI and Kubernetes. Raises
    InputError for a part of the three values, and for values that do not fit each other.
    """
    told = {
        "--coordinator": coordinator or os.environ.get(COORDINATOR),
        "--process-id": _number("--process-id", process, PROCESS_ID),
        "--processes": _number("--processes", processes, PROCESSES),
    }
    if all(value is None for value in told.values()):
        return _detected()
    if told["--processes"] == 1 and not told["--process-id"]:
        return None
    if missing := [name for name, value in told.items() if value is None]:
        given = ", ".join(f"{name} {value}" for name, value in told.items() if value is not None)
        raise InputError(f"{given}: {' and '.join(missing)} is missing; give all three, or none")
    address = str(told["--coordinator"])
    process, processes = (int(told[name] or 0) for name in ("--process-id", "--processes"))
    if not 0 <= process < processes:
        raise InputError(f"--process-id {process}: must be from 0 to {processes - 1}")
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise InputError(
            f"--coordinator {address}: must look like HOST:PORT, such as 10.0.0.1:8476"
        )
    return Place(address, process, processes)


def _number(option: str, value: int | None, variable: str) -> int | None:
    text = os.environ.get(variable)
    if value is not None or text is None:
        return value
    if not text.isdecimal():
        raise InputError(f"{variable}={text}: must be a number, as for {option}")
    return int(text)


def _detected() -> Place | None:
    """What jax's own detection says; None for one process, and outside of every cluster."""
    from jax._src.clusters import ClusterEnv

    # jax.distributed.initialize() detects the same, but starts its service for one process, too.
    kinds = [kind for kind in ClusterEnv._cluster_types if not kind.opt_in_only_method]
    if "JOB_COMPLETION_INDEX" not in os.environ:
        # A pod of no indexed job is alone; jax would ask for a package and give up.
        kinds = [kind for kind in kinds if kind.__name__ != "K8sCluster"]
    try:
        cluster = next((kind for kind in kinds if kind.is_env_present()), None)
        if cluster is None or cluster.get_process_count() == 1:
            return None
        _check_slurm_devices(cluster.name)
        port, device = os.environ.get("JAX_COORDINATOR_PORT"), cluster.get_local_process_id()
        return Place(
            coordinator=cluster.get_coordinator_address(int(TIMEOUT_S), port),
            process=cluster.get_process_id(),
            processes=cluster.get_process_count(),
            local_devices=None if device is None else [device],
        )
    except InputError:
        raise
    except Exception as error:  # of the cluster's own client
        text = " ".join(str(error).split())
        raise InputError(
            f"the cluster does not say which process this is ({text}); name --coordinator, "
            f"--process-id and --processes, or set {PROCESSES}=1 for one process alone"
        ) from error


def _check_slurm_devices(cluster: str) -> None:
    """InputError where SLURM shows a task one GPU, and jax would look for another of its host."""
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    # Such as 8(x2),4.
    tasks = re.match(r"\d+", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    if cluster == "slurm" and shown and tasks and len(shown.split(",")) < int(tasks[0]):
        raise InputError(
            f"SLURM runs {tasks[0]} tasks on this host and shows this one the GPUs {shown} alone "
            "(--gpus-per-task or --gpu-bind), but jax takes the GPU with the task's number; start "
            "with --gpus-per-node and --ntasks-per-node instead, as nrt-jax launch slurm does"
        )


def initialise(place: Place | None, timeout_s: float = TIMEOUT_S) -> None:
    """Meet the other processes and start jax in this one; nothing for the only process.

    jax must not have been used before. Raises InputError when the processes do not find each other.
    """
    if place is None:
        return
    _State.place = place
    if place.process:
        _stay_silent()
    _keep_standard_output()
    _State.peers = meet(place.coordinator, place.process, place.processes, timeout_s)
    import jax

    # Its handler of SIGTERM would replace ours, which finishes the step.
    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        place.coordinator,
        place.processes,
        place.process,
        local_device_ids=place.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=int(timeout_s),
        heartbeat_timeout_seconds=HEARTBEAT_S,
    )


# --- who and what --------------------------------------------------------------------------------


def process_index() -> int:
    """The id of this process."""
    return 0 if _State.place is None else _State.place.process


def process_count() -> int:
    """The number of processes."""
    return 1 if _State.place is None else _State.place.processes


def is_first() -> bool:
    """Whether this is process 0, which alone writes files, logs and prints."""
    return process_index() == 0


def _stay_silent() -> None:
    """Print nothing but errors, and keep the records of the log until `log_to` names a file."""
    sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    root = logging.getLogger()
    root.handlers[:] = [MemoryHandler(10_000, flushLevel=logging.CRITICAL + 1)]


def _keep_standard_output() -> None:
    """Leave standard output to Python alone: Gloo, for one, writes there that it is connected.

    What libraries write goes to standard error, or with other prints of this process to nowhere.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return
    sys.stdout.flush()
    ours = os.dup(sys.stdout.fileno())
    others = ours if process_index() or sys.__stderr__ is None else sys.__stderr__.fileno()
    os.dup2(others, 1)
    sys.stdout = open(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)  # noqa: SIM115


def log_to(folder: Path) -> None:
    """Write the log of a process other than the first, so far and from now on, to log.<id>.txt."""
    if is_first():
        return
    root = logging.getLogger()
    (kept,) = root.handlers
    assert isinstance(kept, MemoryHandler), "the log of a process that is not the first"
    handler = logging.FileHandler(folder / f"log.{process_index()}.txt", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s: %(message)s"))
    kept.setTarget(handler)
    kept.flush()
    root.handlers[:] = [handler]


# --- agreement -----------------------------------------------------------------------------------


def gather(what: str, value: Any) -> list[Any]:
    """The JSON value of every process, in their order; waits until all have one.

    `what` names the exchange, so that processes that have come apart are found.
    """
    if _State.place is None:
        return [value]
    client, number, mine = _client(), _State.rounds, process_index()
    _State.rounds += 1
    folder = f"nrt_jax/{number}/"
    client.key_value_set(f"{folder}{mine}", json.dumps([what, value]))
    client.wait_at_barrier(f"nrt_jax/{number}", _FOREVER_MS)
    found = {int(key.rpartition("/")[2]): text for key, text in client.key_value_dir_get(folder)}
    # All have read what was exchanged before this, since they have come here.
    if number:
        client.key_value_delete(f"nrt_jax/{number - 1}/{mine}")
    messages = [json.loads(found[process]) for process in range(process_count())]
    assert all(name == what for name, _ in messages), f"processes came apart: {messages}"
    return [value for _, value in messages]


def _client() -> Any:
    # The key-value store has no public name; Orbax and Flax reach it in the same way.
    from jax._src import distributed

    return distributed.global_state.client


def wait_for_all(what: str) -> None:
    """Return when every process has come here."""
    gather(what, None)


def from_first(what: str, value: Any) -> Any:
    """The JSON value of process 0, for what others might see differently or later."""
    return gather(what, value)[0]


def word_of_first(name: str, word: str) -> str:
    """The word that process 0 has for a name, whenever each of the processes asks for it."""
    client, key = _client(), f"nrt_jax/words/{name}"
    if is_first():
        client.key_value_set(key, word)
        return word
    return client.blocking_key_value_get(key, _FOREVER_MS)


def any_of(what: str, value: bool) -> bool:
    """Whether it is so on any process."""
    return any(gather(what, value))


def check_same(
    what: str,
    parts: Mapping[str, Any],
    remedy: str,
    error: type[InputError | RuntimeError] = InputError,
) -> None:
    """Raise `error`, with the name of the first difference, unless all have the same JSON values.

    Only a digest is exchanged where they have.
    """
    if _State.place is None:
        return
    text = json.dumps(dict(parts), sort_keys=True)
    if len(set(gather(what, hashlib.sha256(text.encode()).hexdigest()))) == 1:
        return
    first, *others = gather(what, dict(parts))
    for process, theirs in enumerate(others, 1):
        for name in {**first, **theirs}:
            if first.get(name) != theirs.get(name):
                raise error(
                    f"{what}: {name} is {first.get(name)!r} on process 0 and {theirs.get(name)!r} "
                    f"on process {process}; {remedy}"
                )


# --- end -----------------------------------------------------------------------------------------


def leave() -> None:
    """Tell the others that this process has come to its end without an error."""
    if _State.peers is not None:
        _State.peers.leave()


def hear_others() -> None:
    """Wait a moment before an error is told: a process that is killed shows first as an error of
    what the others were computing together, and its end is heard at the same time."""
    if _State.peers is not None:
        time.sleep(_HEAR_S)


def end_all(line: str, status: int) -> None:
    """End all processes, which print the line; returns where there are no others."""
    if _State.peers is not None:
        _State.peers.end_all(line, status)
