"""The verbs: parse the command line, call one function.

jax is imported by the verb that needs it, so that --help and --version answer at once.
"""

import argparse
import errno
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import nrt_jax
from nrt_jax import distributed
from nrt_jax.arguments import (
    INPUTS,
    Parser,
    dtype,
    inputs,
    parse,
    path,
    process_count,
    restart_count,
    row_count,
    seconds,
    seed,
    temperature,
)
from nrt_jax.devices import leave_out_absent_tpu
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.stop import INTERRUPTED, Interrupts, StopRequest

if TYPE_CHECKING:
    from nrt_jax.config.run import RunConfig
    from nrt_jax.engine.generate import Generate

log = logging.getLogger(__name__)

_WRONG_PATH = {
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP),
    *(errno.EEXIST, errno.ENOTEMPTY),
}
EPILOG = """\
CONFIG is one or more YAML files or presets, merged from left to right, followed by overrides such
as train.steps=10 or objective.scheme=gm.

  nrt-jax train quickstart/nrt
  nrt-jax train quickstart/nrt methods/rlpr run_dir=runs/rlpr
"""


def main(argv: list[str] | None = None) -> int:
    """Run one verb; 0 when it worked, 2 for a mistake in the input, 1 for a run that failed.

    After Ctrl-C 130, also for a run that has saved.
    """
    with Interrupts() as interrupts:
        try:
            return _run(argv, interrupts)
        except KeyboardInterrupt:
            return _interrupted(interrupts)
        except SystemExit as stopped:
            distributed.end_all("stopped before its first step", int(stopped.code or 0))
            raise
        except Exception as error:
            if interrupts.seen:
                return _interrupted(interrupts)
            status = _told(error)
            if status is None:
                _end_others(error)
                raise
            return status


def _run(argv: list[str] | None, interrupts: Interrupts) -> int:
    args = parse(_parser(), sys.argv[1:] if argv is None else argv)
    args.interrupts = interrupts
    _configure_logging()
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The text of a model may hold characters that the terminal cannot show.
        sys.stdout.reconfigure(errors="backslashreplace")
    leave_out_absent_tpu()
    if hasattr(args, "process_id"):
        place = distributed.find_place(args.coordinator, args.process_id, args.processes)
        distributed.initialise(place, args.timeout)
    status = args.verb(args)
    distributed.leave()
    if sys.stdout is not None:
        sys.stdout.flush()
    return status or 0


def _told(error: Exception) -> int | None:
    """Print the line of an expected error; its exit status, None for a mistake of ours."""
    if isinstance(error, InputError):
        return _fail(error, 2)
    if isinstance(error, RunFailed):
        return _fail(error, 1)
    if isinstance(error, BrokenPipeError):
        return _fail("standard output was closed before the end", 1)
    if isinstance(error, OSError):
        return _fail(_os_error(error), 1)
    return None


def _end_others(error: Exception) -> None:
    """End the other processes after a mistake of ours in this one."""
    distributed.hear_others()
    if distributed.process_count() > 1:
        traceback.print_exception(error)
        distributed.end_all(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", 1)


def _interrupted(interrupts: Interrupts) -> int:
    more = interrupts.at_leaving()
    return _fail(f"interrupted; {more}" if more else "interrupted", INTERRUPTED)


def _configure_logging() -> None:
    logging.basicConfig(format="nrt-jax: %(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("nrt_jax").setLevel(logging.INFO)
    logging.getLogger("absl").addFilter(_is_not_raised)


def _is_not_raised(record: logging.LogRecord) -> bool:
    """False for records with a traceback: Orbax also raises these errors, which end in one line."""
    return not record.exc_info


def _fail(message: object, status: int) -> int:
    if (out := sys.stdout) is not None:
        try:
            out.flush()
        except OSError:
            # Closed or full: the exit must not try to write the rest of the output.
            os.dup2(os.open(os.devnull, os.O_WRONLY), out.fileno())
    distributed.hear_others()
    line = " ".join(str(message).split())
    print(f"nrt-jax: error: {line}", file=sys.stderr)
    distributed.end_all(line, status)
    return status


def _os_error(error: OSError) -> str:
    """The file, the system's message, and the remedy."""
    where = error.filename or "a file or the output"
    remedy = "check the path"
    if error.errno not in _WRONG_PATH:
        remedy = (
            "make room or allow access there, then run the same command again: a run continues "
            "from its newest checkpoint"
        )
    return f"{where}: {error.strerror or error}; {remedy}"


def _parser() -> Parser:
    parser = Parser(
        prog="nrt-jax",
        description="Native Reasoning Training: reasoning from question-answer pairs alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nrt-jax {nrt_jax.__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    _add_run_verbs(verbs)
    _add_checkpoint_verbs(verbs)
    _add_views(verbs)
    _add_local(verbs)
    return parser


def _add_run_verbs(verbs: "argparse._SubParsersAction[Parser]") -> None:
    train = verbs.add_parser("train", help="train a config's run, or continue it")
    _add_config(train)
    train.add_argument(
        "--allow-changed",
        type=inputs,
        action="extend",
        default=[],
        metavar="INPUT,...",
        help=f"continue a run although these are not what it was trained on: {', '.join(INPUTS)}",
    )
    _add_processes(train)
    train.set_defaults(verb=_train)

    diagnose = verbs.add_parser(
        "diagnose", help="tell whether NRT can learn from a config's first batch, or from any model"
    )
    diagnose.add_argument(
        "config",
        nargs="+",
        metavar="CONFIG|MODEL",
        help="a config as for train; or a run, RUN/checkpoints/STEP or a directory of a model; and "
        "key=value overrides",
    )
    diagnose.add_argument(
        "--rows",
        type=row_count,
        help="held-out rows to ask; otherwise the first batch of a config, and 32 rows of a model",
    )
    diagnose.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    _add_processes(diagnose)
    diagnose.set_defaults(verb=_diagnose)

    generate = verbs.add_parser("generate", help="print the trace and the answer to a prompt")
    _add_model(generate)
    generate.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.FIELD=VALUE",
        help="how the model is asked, such as data.template=plain",
    )
    generate.add_argument("--prompt", required=True, action="append", help="may be given again")
    generate.add_argument(
        "--temperature", type=temperature, default=0.0, help="of the trace; 0 is greedy"
    )
    generate.add_argument("--seed", type=seed, default=0)
    generate.add_argument(
        "--score",
        action="append",
        metavar="ANSWER",
        help="print the reward of this answer after the trace; one for each --prompt",
    )
    _add_processes(generate)
    generate.set_defaults(verb=_generate)

    serve = verbs.add_parser("serve", help="answer over HTTP like OpenAI, and over gRPC")
    _add_model(serve)
    serve.add_argument(
        "overrides",
        nargs="*",
        metavar="[SECTION.]FIELD=VALUE",
        help="settings of the server, such as port=8001 slots=32, and of how the model is asked, "
        "such as data.template=plain",
    )
    serve.set_defaults(verb=_serve)


def _add_checkpoint_verbs(verbs: "argparse._SubParsersAction[Parser]") -> None:
    import_ = verbs.add_parser(
        "import",
        help="convert a Hugging Face directory once, for runs that start from it on many devices",
    )
    import_.add_argument("source", type=path, metavar="HF_DIR")
    import_.add_argument("out", type=path, metavar="OUT")
    import_.add_argument(
        "--mesh",
        default="fsdp=-1",
        metavar="AXIS=SIZE,...",
        help="devices along data, fsdp and tensor, such as fsdp=4,tensor=2; -1 for the others",
    )
    _add_dtype(import_, "as stored")
    _add_processes(import_)
    import_.set_defaults(verb=_import)

    export = verbs.add_parser("export", help="write any model as a Hugging Face directory")
    _add_model(export)
    export.add_argument("out", type=path, metavar="OUT")
    _add_dtype(export, "that of the directory, or of the checkpoint that the run started from")
    export.add_argument(
        "--copy-row",
        action="append",
        default=[],
        metavar="TOKEN=FROM",
        help=r"give TOKEN the embedding and head rows of FROM, such as '<|think_start|>=\n'",
    )
    _add_processes(export)
    export.set_defaults(verb=_export)


def _add_views(verbs: "argparse._SubParsersAction[Parser]") -> None:
    data = verbs.add_parser("data", help="show a config's data")
    data_verbs = data.add_subparsers(required=True, metavar="VERB")
    show_data = data_verbs.add_parser(
        "show", help="print rows as the model sees them, part by part"
    )
    _add_config(show_data)
    show_data.add_argument("--rows", type=row_count, default=3, help="how many, 3 by default")
    show_data.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    show_data.set_defaults(verb=_data_show)

    report = verbs.add_parser("report", help="compare runs: report.html, curves.png, summary.json")
    report.add_argument("runs", type=path, nargs="+", metavar="RUN")
    report.add_argument("--out", type=path, required=True)
    report.set_defaults(verb=_report)

    config = verbs.add_parser("config", help="show a resolved config, or the schema of all configs")
    config_verbs = config.add_subparsers(required=True, metavar="VERB")
    show = config_verbs.add_parser("show", help="print the resolved config")
    _add_config(show)
    show.set_defaults(verb=_config_show)
    schema = config_verbs.add_parser("schema", help="print the JSON schema")
    schema.set_defaults(verb=_config_schema)


def _add_local(verbs: "argparse._SubParsersAction[Parser]") -> None:
    local = verbs.add_parser(
        "local", help="run a verb in several processes on this machine, as on several hosts"
    )
    local.add_argument("--processes", type=process_count, required=True, metavar="N")
    local.add_argument(
        "--devices-per-process", type=process_count, default=1, metavar="M", help="1 by default"
    )
    local.add_argument(
        "--restarts",
        type=restart_count,
        default=0,
        metavar="R",
        help="how often all are started again after a failure, 0 by default",
    )
    local.add_argument(
        "command", nargs=argparse.REMAINDER, metavar="-- VERB ...", help="what each process runs"
    )
    local.set_defaults(verb=_local)


def _add_processes(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group(
        "several processes",
        "one per host; not needed on Cloud TPU, SLURM, Open MPI and Kubernetes, where they find "
        "each other",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens")
    group.add_argument("--process-id", type=int, metavar="I", help="of this process, from 0")
    group.add_argument("--processes", type=process_count, metavar="N", help="how many there are")
    group.add_argument(
        "--timeout",
        type=seconds,
        default=distributed.TIMEOUT_S,
        metavar="SECONDS",
        help="how long they wait for each other at the start, 300 by default",
    )


def _add_dtype(parser: argparse.ArgumentParser, default: str) -> None:
    names = "bf16, fp16 or fp32"
    parser.add_argument(
        "--dtype", type=dtype, metavar="DTYPE", help=f"{names}; otherwise {default}"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a run, RUN/checkpoints/STEP, an import or a Hugging Face directory",
    )


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "config", nargs="+", metavar="CONFIG", help="YAML files or presets, and key=value overrides"
    )


def _load(args: argparse.Namespace) -> "RunConfig":
    from nrt_jax.config.load import load_config
    from nrt_jax.config.run import RunConfig

    # A file may have an equals sign in its path.
    overrides = [word for word in args.config if "=" in word and not os.path.isfile(word)]
    files = [Path(word) for word in args.config if word not in overrides]
    if not files:
        raise InputError(f"{' '.join(args.config)}: no config file; name one before the overrides")
    return load_config(RunConfig, files, overrides)


def _train(args: argparse.Namespace) -> int:
    with StopRequest() as stop:
        args.interrupts.at_first = stop.plan
        config = _load(args)
        generate = _rollout_driver(config)
        from nrt_jax.checkpoints.run_dir import how_to_continue
        from nrt_jax.training.loop import train

        args.interrupts.at_leaving = lambda: how_to_continue(config.run_dir)
        try:
            train(config, stop, generate, allow_changed=args.allow_changed)
        except SystemExit:
            log.info("stopped; %s", how_to_continue(config.run_dir))
            raise
    return INTERRUPTED if stop.interrupted else 0


def _diagnose(args: argparse.Namespace) -> None:
    first, *others = args.config
    if os.path.isdir(first):
        from nrt_jax.training.checkup import diagnose_model

        diagnosis, starts = diagnose_model(Path(first), others, args.rows), True
    else:
        config = _load(args)
        from nrt_jax.training.checkup import diagnose_config

        diagnosis = diagnose_config(config, args.rows)
        starts = config.train.allow_cold_start or not diagnosis.stops
    from nrt_jax.training.health import table
    from nrt_jax.training.run_health import does_not_start

    if args.out is not None and distributed.is_first():
        args.out.write_text(diagnosis.to_json(), encoding="utf-8")
    print("\n".join([*table(diagnosis), *(f"- {finding.line}" for finding in diagnosis.findings)]))
    if not starts:
        raise RunFailed(does_not_start(diagnosis))


def _rollout_driver(config: "RunConfig") -> "Generate":
    """What `rollout.driver` names; InputError when its package is missing."""
    if config.rollout.driver == "loop":
        from nrt_jax.engine.generate import generate

        return generate
    if distributed.process_count() > 1:
        raise InputError(
            f"rollout.driver=jetstream: its threads do not take turns alike in "
            f"{distributed.process_count()} processes; set rollout.driver=loop"
        )
    try:
        from nrt_jax.serving.jetstream_rollouts import generate
    except ModuleNotFoundError as missing:
        raise InputError(
            f"rollout.driver=jetstream: the package {missing.name} is not installed; "
            "pip install 'nrt-jax[jetstream]', or set rollout.driver=loop"
        ) from None
    return generate


def _local(args: argparse.Namespace) -> int:
    from nrt_jax.local import run_local

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    return run_local(
        words,
        processes=args.processes,
        devices=args.devices_per_process,
        restarts=args.restarts,
    )


def _generate(args: argparse.Namespace) -> None:
    from nrt_jax.evaluation.answer import answer_prompts

    results = answer_prompts(
        args.model,
        args.prompt,
        temperature=args.temperature,
        seed=args.seed,
        references=args.score,
        overrides=args.overrides,
    )
    for result in results:
        print(result)


def _serve(args: argparse.Namespace) -> None:
    if (place := distributed.find_place()) is not None:
        raise InputError(
            f"serve: this is process {place.process} of {place.processes}, and a server is one "
            "process; start it on one host alone, without NRT_JAX_PROCESSES or a cluster's task"
        )
    from nrt_jax.serving.server import serve

    serve(args.model, args.overrides)


def _import(args: argparse.Namespace) -> None:
    from nrt_jax.checkpoints.export import import_checkpoint
    from nrt_jax.compilation import use_cache
    from nrt_jax.config.compilation import CompilationConfig
    from nrt_jax.config.mesh import parse_mesh

    use_cache(CompilationConfig())
    with _exit_on_sigterm():
        imported = import_checkpoint(args.source, args.out, parse_mesh(args.mesh), args.dtype)
    print(
        f"wrote {args.out}: {imported.weights / 1e9:.3g} billion weights, "
        f"{imported.nbytes / 1e9:.3g} GB"
    )


def _data_show(args: argparse.Namespace) -> None:
    config = _load(args)
    from nrt_jax.checkpoints.abstract_model import load_tokenizer
    from nrt_jax.data.show import show_rows

    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    reasons = config.method == "nrt"
    tokenizer = load_tokenizer(config)
    for line in show_rows(config.data, tokenizer, reasons=reasons, rows=args.rows, color=color):
        print(line)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that half-written files are removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _export(args: argparse.Namespace) -> None:
    from nrt_jax.checkpoints.export import export

    with _exit_on_sigterm():
        export(args.model, args.out, dtype=args.dtype, copy_rows=args.copy_row)
    print(f"wrote {args.out}")


def _report(args: argparse.Namespace) -> None:
    from nrt_jax.analysis.report import write_report

    write_report(args.runs, args.out)


def _config_show(args: argparse.Namespace) -> None:
    from nrt_jax.config.load import dump_config

    print(dump_config(_load(args)), end="")


def _config_schema(args: argparse.Namespace) -> None:
    from nrt_jax.config.load import config_schema
    from nrt_jax.config.run import RunConfig

    print(json.dumps(config_schema(RunConfig), indent=1))
