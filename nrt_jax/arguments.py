"""Words of the command line: where overrides may stand, and what the values of options may be."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, NoReturn

if TYPE_CHECKING:
    from nrt_jax.topologies import Topology

INPUTS = ("data", "eval_data", "tokenizer", "template", "model")
"""What `train --allow-changed` names: `checkpoints.inputs.INPUT_NAMES`, which imports jax."""

LAUNCH_KINDS = ["jobset", "gce", "slurm", "slurm-sweep", "slurm-prepare", "sky", "tpu-vm", "local"]
"""What `launch` fills in."""


class Parser(argparse.ArgumentParser):
    """Reports a mistake in one line, like every other error."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"nrt-jax: error: {' '.join(message.split())}; see {self.prog} --help\n")


def parse(parser: Parser, argv: Sequence[str]) -> argparse.Namespace:
    """Read the words of a command; those of CONFIG and overrides may also stand after options."""
    for word in argv:
        try:
            word.encode()
        except UnicodeEncodeError:
            parser.error(
                f"the argument {word!a} is not UTF-8 text; rename it or use a UTF-8 locale"
            )
    args, rest = parser.parse_known_args(argv)
    rest = [word for word in rest if word != "--"]
    dashed = next((word for word in rest if word.startswith("-") and "=" in word), None)
    takes_more = hasattr(args, "config") or hasattr(args, "overrides")
    if rest and (not takes_more or any(word.startswith("-") for word in rest)):
        hint = f"; an override has no dashes: {dashed.lstrip('-')}" if dashed else ""
        parser.error(f"unrecognized arguments: {' '.join(rest)}{hint}")
    if hasattr(args, "config"):
        args.config += rest
        if hasattr(args, "folder"):
            _take_folder(parser, args)
    if not hasattr(args, "overrides"):
        if hasattr(args, "model"):
            args.model = _path_of(parser, "MODEL", args.model)
        return args
    words = [args.model, *args.overrides, *rest]
    args.overrides = [word for word in words if "=" in word and not os.path.exists(word)]
    models = [word for word in words if word not in args.overrides]
    if len(models) != 1:
        parser.error(
            f"one MODEL is required, and {len(models)} are named: {' '.join(words)}; an override "
            "must look like section.field=value"
        )
    args.model = _path_of(parser, "MODEL", models[0])
    return args


def _take_folder(parser: Parser, args: argparse.Namespace) -> None:
    """Make OUT the last word that is no override; these may stand behind it."""
    words = [*args.config, args.folder]
    names = [word for word in words if "=" not in word or os.path.exists(word)]
    if len(names) < 2:
        parser.error(f"OUT, the folder to write, must follow CONFIG: {' '.join(words)}")
    args.folder = _path_of(parser, "OUT", names[-1])
    words.remove(names[-1])
    args.config = words


def _path_of(parser: Parser, name: str, word: str) -> Path:
    # Not the parser's own conversion: an override may stand where it looks for the name.
    try:
        return path(word)
    except argparse.ArgumentTypeError as error:
        parser.error(f"argument {name}: {error}")


def path(text: str) -> Path:
    """A path of this machine."""
    from nrt_jax.config.paths import local_path

    try:
        return local_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text}: {error}") from None


def inputs(text: str) -> list[str]:
    """Names of inputs, separated by commas."""
    names = text.split(",")
    if unknown := [name for name in names if name not in INPUTS]:
        raise argparse.ArgumentTypeError(
            f"{unknown[0]!r} is no input; give one or more of {', '.join(INPUTS)}"
        )
    return names


def temperature(text: str) -> float:
    """A temperature of 0 or more."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no temperature; give 0 or more")
    return value


def row_count(text: str) -> int:
    """A number of rows, 1 or more."""
    if not text.isdecimal() or not 0 < int(text) < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is no number of rows; give 1 or more")
    return int(text)


class Share(NamedTuple):
    """One of several shares of a task."""

    index: int
    """From 0."""
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def share(text: str) -> Share:
    """I/N with I from 0 to N - 1."""
    index, _, count = text.partition("/")
    if not (index.isdecimal() and count.isdecimal()) or not int(index) < int(count) < 2**20:
        raise argparse.ArgumentTypeError(f"{text} is no share; give I/N with I from 0 to N-1")
    return Share(int(index), int(count))


def process_count(text: str) -> int:
    """A number of processes or of their devices, 1 or more."""
    if not text.isdecimal() or not 0 < int(text) < 2**20:
        raise argparse.ArgumentTypeError(f"{text} is no number of processes; give 1 or more")
    return int(text)


def restart_count(text: str) -> int:
    """A number of restarts, 0 or more."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text} is no number of restarts; give 0 or more")
    return int(text)


def topology(text: str) -> "Topology":
    """Machines by name."""
    from nrt_jax.errors import InputError
    from nrt_jax.topologies import parse_topology

    try:
        return parse_topology(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def price(text: str) -> float:
    """A price above 0."""
    return _above_zero(text, "is no price; give a number above 0")


def token_counts(text: str) -> tuple[int, int, int]:
    """Mean tokens of prompt, trace and answer."""
    parts = text.split(",")
    if len(parts) != 3 or not all(part.isdecimal() and 0 < int(part) < 2**24 for part in parts):
        raise argparse.ArgumentTypeError(
            f"{text} is no PROMPT,TRACE,ANSWER; give three counts of tokens, as 300,400,416"
        )
    prompt, trace, answer = map(int, parts)
    return prompt, trace, answer


def volume(text: str) -> tuple[str, str]:
    """CLAIM:PATH, a volume claim of Kubernetes and the path at which pods see it."""
    claim, _, mount = text.partition(":")
    if not claim or not mount.startswith("/") or len(mount) < 2:
        raise argparse.ArgumentTypeError(f"{text} is no volume; give CLAIM:PATH, as runs:/mnt/nrt")
    return claim, mount.rstrip("/")


def exit_status(text: str) -> int:
    """A status of a process, 0 to 125; shells give those above a meaning."""
    if not text.isdecimal() or int(text) > 125:
        raise argparse.ArgumentTypeError(f"{text} is no exit status; give 0 to 125")
    return int(text)


def seconds(text: str) -> float:
    """A time above 0."""
    return _above_zero(text, "is no number of seconds; give more than 0")


def _above_zero(text: str, mistake: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} {mistake}")
    return value


def seed(text: str) -> int:
    """A seed that fits int32."""
    value = int(text) if text.isdecimal() else -1
    if not 0 <= value < 2**31:
        raise argparse.ArgumentTypeError(f"{text} is no seed; give 0 to {2**31 - 1}")
    return value


def dtype(text: str) -> str:
    """The whole name of a dtype of weights."""
    names = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
    if text not in (*names, *names.values()):
        raise argparse.ArgumentTypeError(f"{text} is no dtype of weights; give {', '.join(names)}")
    return names.get(text, text)


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add the config files and overrides of a verb."""
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG", help="YAML files or presets, and key=value overrides"
    )
