"""Fill a file of launch/ in for a run."""

import json
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jinja2

from nrt_jax.config.load import dump_config, flat
from nrt_jax.config.presets import DIRECTORY as PRESETS
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError
from nrt_jax.launching import machines
from nrt_jax.topologies import Topology

_PACKAGE = Path(__file__).resolve().parents[1]
_INSTALLED, _CHECKOUT = _PACKAGE / "launch", _PACKAGE.parent / "launch"
DIRECTORY = _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT
"""The files of launch/: in the installed package, or beside the package in a checkout."""

STOPPED_STATUS = 75
"""EX_TEMPFAIL: what a run that SIGTERM stopped ends with, so that it is started again."""
GRACE_S = 900
"""Time to finish a step and save after SIGTERM."""
MOUNT = "/mnt/nrt"
"""Where hosts that the launcher makes mount the bucket."""
POD_CONFIG = "/etc/nrt_jax/run.yaml"


class Request(NamedTuple):
    """What is to be started, and where."""

    words: Sequence[str]
    """CONFIG and overrides, as on the command line."""
    files: Sequence[Path]
    """Config files among the words that are no presets."""
    config: RunConfig
    topology: Topology | None = None
    slices: int = 1
    name: str | None = None
    image: str | None = None
    queue: str | None = None
    volume: tuple[str, str] | None = None
    """Claim of a Kubernetes volume, and where pods mount it."""
    bucket: str | None = None
    zone: str | None = None
    spot: bool = False
    restarts: int = 100
    cells: int = 0
    """Runs of a sweep."""
    out: Path | None = None
    """Folder of prepared data."""
    tasks: int = 1


def fill(kind: str, request: Request) -> str:
    """The text of a file of launch/ for this run. Raises InputError for what it lacks."""
    makers = {
        "jobset": _jobset,
        "gce": _gce,
        "slurm": _slurm,
        "slurm-sweep": _slurm_sweep,
        "slurm-prepare": _slurm_prepare,
        "sky": _sky,
        "tpu-vm": _tpu_vm,
        "local": _local,
    }
    template, values = makers[kind](request)
    return _environment().get_template(template).render(_common(request) | values)


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(DIRECTORY),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # A JSON value is a YAML value, whatever characters it has.
    environment.filters["json"] = lambda value: json.dumps(value, ensure_ascii=False)
    environment.filters["quote"] = lambda text: shlex.quote(str(text))
    environment.filters["words"] = shlex.join
    return environment


def _common(request: Request) -> dict[str, Any]:
    name = request.name or job_name(request.config.run_dir)
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise InputError(
            f"--name {name}: must have 1 to 40 small letters, digits and hyphens, a letter first"
        )
    values: dict[str, Any] = {
        "name": name,
        "queue": request.queue or "default",
        "queue_named": request.queue is not None,
        "restarts": request.restarts,
        "slices": request.slices,
        "spot": request.spot,
        "stopped_status": STOPPED_STATUS,
        "grace_s": GRACE_S,
        "nrt_jax": ".venv/bin/nrt-jax",
        "args": _train(request.words),
        "run_dir": request.config.run_dir.as_posix(),
    }
    if (topology := request.topology) is not None:
        values |= {
            "topology": topology.name,
            "shape": topology.shape,
            "hosts": topology.hosts,
            "chips_per_host": topology.chips_per_host,
        }
    return values


def job_name(run_dir: Path) -> str:
    """The name of a job by the folder of its run: runs/quickstart/nrt is quickstart-nrt."""
    text = re.sub(r"[^a-z0-9]+", "-", "-".join(run_dir.parts[-2:]).lower()).strip("-")
    return re.sub(r"^[^a-z]+", "", text)[:40].strip("-") or "nrt"


def _train(words: Sequence[str]) -> list[str]:
    return ["train", *words, "--stopped-status", str(STOPPED_STATUS)]


def _need(kind: str, option: str, value: Any, what: str) -> Any:
    if not value:
        raise InputError(f"launch {kind}: {option} is missing; name {what}")
    return value


def _topology(kind: str, request: Request) -> Topology:
    return _need(kind, "--topology", request.topology, "the machines, such as v6e:8x8 or h100x8:2")


def _gpus(kind: str, request: Request) -> Topology:
    topology = _topology(kind, request)
    if topology.chip.platform != "gpu":
        raise InputError(
            f"launch {kind}: topology {topology.name} is of TPUs, which SLURM does not serve; name "
            "hosts of GPUs, such as h100x8:2"
        )
    return topology


# --- Kubernetes ----------------------------------------------------------------------------------


def _jobset(request: Request) -> tuple[str, dict[str, Any]]:
    topology = _topology("jobset", request)
    image = _need(
        "jobset", "--image", request.image, "the image that launch/Dockerfile.tpu or .cuda builds"
    )
    shared = "the claim of a volume that all hosts share, CLAIM:PATH"
    claim, mount = _need("jobset", "--volume", request.volume, shared)
    _check_on_volume(request, mount)
    words: Sequence[str] = request.words
    config_yaml = None
    if request.files:
        # A file of this machine travels with the job, resolved.
        words, config_yaml = [POD_CONFIG], dump_config(request.config)
    values = {
        "image": image,
        "claim": claim,
        "mount": mount,
        "config_yaml": config_yaml,
        "args": _train(words),
        "environment": machines.settings(topology, request.slices, f"{mount}/compiled"),
    }
    if topology.chip.platform == "tpu":
        return "jobset_tpu.yaml.jinja", values | {"tpu": machines.google_tpu(topology)}
    if request.slices != 1:
        raise InputError(
            f"--slices {request.slices}: {topology.name} is of GPUs; name more hosts instead, as "
            "h100x8:4"
        )
    system = topology.name.partition(":")[0]
    return "jobset_gpu.yaml.jinja", values | {"gke_gpu": machines.GKE_GPUS.get(system)}


def _check_on_volume(request: Request, mount: str) -> None:
    """InputError for a path of the config that no pod has."""
    for key, value in flat(request.config.model_dump()).items():
        for path in value if isinstance(value, tuple | list) else (value,):
            if not isinstance(path, Path) or path.is_relative_to(mount):
                continue
            if request.files or not path.is_relative_to(PRESETS):
                raise InputError(
                    f"{key} {path}: no pod has it; set {key} to a path below {mount}, on the volume"
                )


# --- Google Cloud --------------------------------------------------------------------------------


def _on_hosts(kind: str, request: Request) -> dict[str, Any]:
    """What scripts need that make TPU hosts and copy the checkout there."""
    topology = _topology(kind, request)
    machines.google_tpu(topology)
    if request.slices != 1:
        raise InputError(f"--slices {request.slices}: launch {kind} makes one; use jobset for more")
    bucket = _need(kind, "--bucket", request.bucket, "a bucket, which all hosts mount")
    _check_below(request, MOUNT)
    return {
        "zone": _need(kind, "--zone", request.zone, "the zone, such as us-east5-a"),
        "bucket": bucket,
        "mount": MOUNT,
        "environment": machines.settings(topology, 1, f"{MOUNT}/compiled"),
    }


def _check_below(request: Request, mount: str) -> None:
    """InputError for a run directory that hosts do not share and that is lost with them."""
    if not request.config.run_dir.is_relative_to(mount):
        raise InputError(
            f"run_dir {request.config.run_dir}: is lost with its host; set run_dir to a path below "
            f"{mount}, where the bucket is mounted"
        )


def _gce(request: Request) -> tuple[str, dict[str, Any]]:
    values = _on_hosts("gce", request)
    topology = _topology("gce", request)
    machine = machines.compute_engine_machine(topology)
    return "gce.sh.jinja", values | {
        "machine": machine,
        "image_family": machines.IMAGE_FAMILIES[topology.chip.name],
    }


def _tpu_vm(request: Request) -> tuple[str, dict[str, Any]]:
    values = _on_hosts("tpu-vm", request)
    topology = _topology("tpu-vm", request)
    accelerator_type, _ = machines.cloud_tpu_type(topology)
    return "tpu_vm.sh.jinja", values | {
        "tpu": machines.google_tpu(topology),
        "accelerator_type": accelerator_type,
    }


def _sky(request: Request) -> tuple[str, dict[str, Any]]:
    topology = _topology("sky", request)
    bucket = _need("sky", "--bucket", request.bucket, "a bucket, which all nodes mount")
    _check_below(request, MOUNT)
    values = {
        "bucket": bucket,
        "mount": MOUNT,
        "environment": machines.settings(topology, 1, f"{MOUNT}/compiled"),
        "tpu": None,
        "requirements": "requirements-cuda13.txt",
        "sky_accelerator": f"{machines.SKY_GPUS.get(topology.chip.name)}:{topology.chips_per_host}",
    }
    if topology.chip.platform == "tpu":
        accelerator, _ = machines.cloud_tpu_type(topology)
        values |= {
            "tpu": machines.google_tpu(topology),
            "requirements": "requirements-tpu.txt",
            "sky_accelerator": f"tpu-{accelerator}",
        }
    return "sky.yaml.jinja", values


# --- SLURM and this machine ----------------------------------------------------------------------


def _slurm(request: Request) -> tuple[str, dict[str, Any]]:
    topology = _gpus("slurm", request)
    return "slurm.sh.jinja", {"environment": machines.gpu_settings(topology)}


def _slurm_sweep(request: Request) -> tuple[str, dict[str, Any]]:
    topology = _gpus("slurm-sweep", request)
    if topology.hosts != 1:
        raise InputError(
            f"launch slurm-sweep: topology {topology.name} is of {topology.hosts} nodes, and each "
            "run of a sweep gets one; name one, such as h100x8"
        )
    return "slurm_sweep.sh.jinja", {
        "environment": machines.gpu_settings(topology),
        "words": list(request.words),
        "cells": request.cells,
    }


def _slurm_prepare(request: Request) -> tuple[str, dict[str, Any]]:
    out = _need("slurm-prepare", "--out", request.out, "the folder of the prepared data")
    return "slurm_prepare.sh.jinja", {
        "out": out.as_posix(),
        "tasks": request.tasks,
        "words": list(request.words),
    }


def _local(request: Request) -> tuple[str, dict[str, Any]]:
    topology = request.topology
    devices = "" if topology is None else f" --devices-per-process {topology.chips_per_host}"
    return "local.sh.jinja", {
        "program": [sys.executable, "-m", "nrt_jax"],
        # SIGTERM comes from who started it, and ends it: nothing is to start the run again.
        "args": ["train", *request.words],
        "topology": topology and topology.name,
        "environment": {} if topology is None else machines.settings(topology, 1),
        "devices": devices,
    }
