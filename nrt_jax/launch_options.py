"""The options of `launch` and `sweep`, which both name machines."""

import argparse

from nrt_jax import verbs
from nrt_jax.arguments import (
    LAUNCH_KINDS,
    Parser,
    path,
    process_count,
    restart_count,
    seconds,
    topology,
    volume,
)


def add_launch(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    launch = subparsers.add_parser(
        "launch", help="start a config's run on a cluster or in a cloud, or print the file for it"
    )
    launch.add_argument("kind", choices=LAUNCH_KINDS, metavar="|".join(LAUNCH_KINDS))
    launch.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG",
        help="a config as for train, and overrides; of slurm-sweep a sweep",
    )
    launch.add_argument("--dry-run", action="store_true", help="print the file, and start nothing")
    _add_machines(launch)
    launch.add_argument("--zone", help="zone of Google Cloud")
    launch.add_argument("--out", type=path, help="slurm-prepare: the folder to write")
    launch.add_argument(
        "--tasks", type=process_count, default=16, metavar="N", help="slurm-prepare: how many, 16"
    )
    launch.set_defaults(verb=verbs.launch)


def add_sweep(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    sweep = subparsers.add_parser("sweep", help="train every combination of a sweep's options")
    sweep.add_argument(
        "words",
        nargs="+",
        metavar="[status] SWEEP",
        help="a file or a preset such as sweeps/quickstart_methods, and key=value overrides of "
        "every run; after the word status, how far each run is",
    )
    sweep.add_argument("--out", type=path, metavar="DIR", help="instead of the sweep's own folder")
    sweep.add_argument(
        "--jobs",
        type=process_count,
        default=1,
        metavar="N",
        help="runs at a time, each with its share of the GPUs or cores",
    )
    sweep.add_argument("--retry", action="store_true", help="train failed runs again")
    sweep.add_argument(
        "--dry-run", action="store_true", help="list the runs and their sizes, and train nothing"
    )
    sweep.add_argument(
        "--cell", type=int, metavar="I", help="train the I-th run alone, from 0, as in a job array"
    )
    sweep.add_argument(
        "--watch", type=seconds, metavar="SECONDS", help="of status: print it again and again"
    )
    emitted = sweep.add_argument_group(
        "on a cluster or in a cloud", "as in nrt-jax launch; the machines are those of one run"
    )
    emitted.add_argument(
        "--emit", choices=("slurm", "jobset", "sky"), help="print the file that starts every run"
    )
    _add_machines(emitted)
    sweep.set_defaults(verb=verbs.sweep)


def _add_machines(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--topology", type=topology, help="the machines, such as v6e:8x8 or h100x8:2"
    )
    parser.add_argument("--name", help="of the job, by default from run_dir")
    parser.add_argument(
        "--restarts", type=restart_count, default=100, metavar="R", help="after failures, 100"
    )
    for name, what in {
        "--image": "container image",
        "--queue": "LocalQueue of Kueue (default), or partition of SLURM",
        "--bucket": "bucket that gce, tpu-vm and sky mount at /mnt/nrt",
    }.items():
        parser.add_argument(name, help=what)
    parser.add_argument(
        "--volume", type=volume, metavar="CLAIM:PATH", help="Kubernetes volume, and its mount"
    )
    parser.add_argument(
        "--slices", type=process_count, default=1, metavar="N", help="TPU slices of a jobset, 1"
    )
    parser.add_argument("--spot", action="store_true", help="machines that may be taken away")
