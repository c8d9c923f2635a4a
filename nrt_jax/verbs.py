"""What each verb does with its arguments: call one function, and print.

jax is imported by the verb that needs it, so that --help and --version answer at once.
"""

import argparse
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from nrt_jax import distributed
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.stop import INTERRUPTED, StopRequest

if TYPE_CHECKING:
    from nrt_jax.config.run import RunConfig
    from nrt_jax.engine.generate import Generate
    from nrt_jax.experiments.cells import Sweep
    from nrt_jax.planning.plan import Plan

log = logging.getLogger(__name__)


def load(args: argparse.Namespace) -> "RunConfig":
    from nrt_jax.config.load import load_config
    from nrt_jax.config.run import RunConfig

    # A file may have an equals sign in its path.
    overrides = [word for word in args.config if "=" in word and not os.path.isfile(word)]
    files = [Path(word) for word in args.config if word not in overrides]
    if not files:
        raise InputError(f"{' '.join(args.config)}: no config file; name one before the overrides")
    return load_config(RunConfig, files, overrides)


def train(args: argparse.Namespace) -> int:
    with StopRequest(args.stopped_status) as stop:
        args.interrupts.at_first = stop.plan
        config = load(args)
        generate = _rollout_driver(config)
        from nrt_jax.checkpoints.run_dir import how_to_continue
        from nrt_jax.training.loop import train

        args.interrupts.at_leaving = lambda: how_to_continue(config.run_dir)
        try:
            complete = train(config, stop, generate, allow_changed=args.allow_changed)
        except SystemExit:
            log.info("stopped; %s", how_to_continue(config.run_dir))
            raise
    if stop.interrupted:
        return INTERRUPTED
    return 0 if complete else args.stopped_status


def diagnose(args: argparse.Namespace) -> None:
    first, *others = args.config
    if os.path.isdir(first):
        from nrt_jax.training.checkup import diagnose_model

        diagnosis, starts = diagnose_model(Path(first), others, args.rows), True
    else:
        config = load(args)
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


def launch(args: argparse.Namespace) -> int:
    from nrt_jax.launching.fill import Request, fill
    from nrt_jax.launching.start import start

    if args.kind == "slurm-sweep":
        from nrt_jax.experiments.cells import read_sweep

        text = _emit("slurm", args, read_sweep(Path(args.config[0]), args.config[1:]), args.config)
    else:
        options = {name: getattr(args, name) for name in Request._fields if hasattr(args, name)}
        files = [Path(word) for word in args.config if os.path.isfile(word)]
        options |= {"config": load(args), "words": args.config, "files": files}
        text = fill(args.kind, Request(**options))
    if args.dry_run:
        print(text, end="")
        return 0
    return start(args.kind, text)


def plan(args: argparse.Namespace) -> int:
    config = load(args)
    from nrt_jax.planning.plan import as_json, make_plan
    from nrt_jax.planning.report import found, shown
    from nrt_jax.planning.search import Candidate, changes_text, misfit, search
    from nrt_jax.planning.work import Lengths

    lengths = None if args.tokens is None else Lengths(*args.tokens)
    options = {"lengths": lengths, "price_per_hour": args.price_per_hour}
    if args.search:
        best = search(config, args.topology, **options)
        if args.compile:
            best[0] = Candidate(best[0].changes, _compiled(best[0].plan))
        figures = [{"changes": changes_text(one.changes)} | as_json(one.plan) for one in best]
        print(json.dumps(figures, indent=1) if args.json else "\n".join(found(best)))
        return 0
    planned = make_plan(config, args.topology, **options)
    planned = _compiled(planned) if args.compile else planned
    print(json.dumps(as_json(planned), indent=1) if args.json else "\n".join(shown(planned)))
    if not planned.fits:
        raise RunFailed(misfit(planned))
    return 0


def _emit(kind: str, args: argparse.Namespace, sweep: "Sweep", words: Sequence[str]) -> str:
    from nrt_jax.launching.emit import emit
    from nrt_jax.launching.fill import Request

    options = {name: getattr(args, name) for name in Request._fields if hasattr(args, name)}
    options |= {"config": sweep.cells[0].config, "words": words, "files": []}
    return emit(kind, sweep, Request(**options))


def _compiled(plan: "Plan") -> "Plan":
    """The plan with what programs take that are compiled for its topology."""
    from nrt_jax.planning.compiled import compile_programs
    from nrt_jax.planning.plan import with_programs

    return with_programs(plan, compile_programs(plan.setting))


def doctor(args: argparse.Namespace) -> None:
    config = load(args) if args.config else None
    from nrt_jax.doctor.run import examine, of_all, raise_first, shown

    cpu_asked = os.environ.get("JAX_PLATFORMS") == "cpu" and not args.tpu_left_out
    found = of_all(examine(config, cpu_asked=cpu_asked))
    print("\n".join(shown(found, as_json=args.json)))
    raise_first(found)


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


def local(args: argparse.Namespace) -> int:
    from nrt_jax.local import run_local

    words = args.command[1:] if args.command[:1] == ["--"] else args.command
    return run_local(
        words,
        processes=args.processes,
        devices=args.devices_per_process,
        restarts=args.restarts,
    )


def generate(args: argparse.Namespace) -> None:
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


def evaluate(args: argparse.Namespace) -> None:
    from nrt_jax.evaluation.suite import Suite, evaluate_model, evaluate_server, task_names

    names = [args.suite] if args.tasks is None else args.tasks.split(",")
    suite = Suite(
        tasks=task_names(names),
        limit=args.limit,
        data=args.data,
        seed=args.seed,
        unsafe_code=args.unsafe_code,
    )
    trace_limit, overrides = args.max_trace_tokens, list(args.overrides)
    args.interrupts.at_leaving = lambda: "the same command goes on after the answers that came"
    with exit_on_sigterm(), keeps_what_is_finished():
        if args.url is None:
            if trace_limit is not None:
                overrides.append(f"rollout.max_trace_tokens={trace_limit}")
            result = evaluate_model(args.model, suite, args.out, overrides)
        elif overrides:
            raise InputError(
                f"override {overrides[0]}: a server has its own settings; leave it out"
            )
        else:
            result = evaluate_server(
                args.url, str(args.model), suite, args.out, trace_limit=trace_limit or 0
            )
    if result is not None:
        from nrt_jax.analysis.benchmark_tables import text_tables, write_tables

        print(text_tables([result]))
        write_tables([result], args.out)


def judge(args: argparse.Namespace) -> None:
    _check_alone("judge", "the traces for a judge are sampled by one process")
    from nrt_jax.evaluation.chat_client import ChatClient
    from nrt_jax.evaluation.judged_traces import judge_model, summary_line

    client = ChatClient(url=args.url, model=args.judge)
    args.interrupts.at_leaving = lambda: "the same command goes on after the verdicts that came"
    with exit_on_sigterm(), keeps_what_is_finished():
        summary = judge_model(
            args.model,
            client,
            args.out,
            rows=args.rows,
            seed=args.seed,
            overrides=args.overrides,
        )
    print(summary_line(summary))


def _check_alone(verb: str, why: str) -> None:
    """InputError where this is one of several processes."""
    if (place := distributed.find_place()) is not None:
        raise InputError(
            f"{verb}: this is process {place.process} of {place.processes}, and {why}; start it on "
            "one host alone, without NRT_JAX_PROCESSES or a cluster's task"
        )


def serve(args: argparse.Namespace) -> None:
    _check_alone("serve", "a server is one process")
    from nrt_jax.serving.server import serve

    serve(args.model, args.overrides)


def import_(args: argparse.Namespace) -> None:
    from nrt_jax.checkpoints.export import import_checkpoint
    from nrt_jax.compilation import use_cache
    from nrt_jax.config.compilation import CompilationConfig
    from nrt_jax.config.mesh import parse_mesh

    use_cache(CompilationConfig())
    with exit_on_sigterm():
        imported = import_checkpoint(args.source, args.out, parse_mesh(args.mesh), args.dtype)
    print(
        f"wrote {args.out}: {imported.weights / 1e9:.3g} billion weights, "
        f"{imported.nbytes / 1e9:.3g} GB"
    )


@contextmanager
def keeps_what_is_finished() -> Iterator[None]:
    """Say of a full disk that the same command goes on."""
    try:
        yield
    except OSError as error:
        raise RunFailed(
            f"{error.filename or 'the output'}: {error.strerror or error}; make room or allow "
            "access there, then run the same command again: what is finished is kept"
        ) from error


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that half-written files are removed."""
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def export(args: argparse.Namespace) -> None:
    from nrt_jax.checkpoints.export import export

    with exit_on_sigterm():
        export(args.model, args.out, dtype=args.dtype, copy_rows=args.copy_row)
    print(f"wrote {args.out}")


def report(args: argparse.Namespace) -> None:
    from nrt_jax.analysis.report import write_report
    from nrt_jax.experiments.sweep_table import is_sweep, run_dirs

    cells = {folder: run_dirs(folder) for folder in args.folders if is_sweep(folder)}
    folders = [run for folder in args.folders for run in cells.get(folder, [folder])]
    of_sweeps = {run for runs in cells.values() for run in runs}
    write_report(folders, args.out, cells=of_sweeps, question=args.question)


def sweep(args: argparse.Namespace) -> int:
    from nrt_jax.experiments.cells import read_sweep
    from nrt_jax.experiments.sweep import run_sweep
    from nrt_jax.experiments.sweep_table import plan_table, status_table

    shows_status = args.words[0] == "status" and not os.path.isfile("status")
    words = args.words[1:] if shows_status else args.words
    if not words:
        raise InputError("sweep status: name the sweep, as in nrt-jax sweep status SWEEP")
    of_file = read_sweep(Path(words[0]), words[1:], args.out)
    if args.emit is not None:
        out = [] if args.out is None else ["--out", str(args.out)]
        print(_emit(args.emit, args, of_file, [*words, *out]), end="")
        return 0
    if args.dry_run:
        print(plan_table(of_file, args.topology))
        return 0
    if shows_status:
        print(status_table(of_file), flush=True)
        while args.watch is not None:
            time.sleep(args.watch)
            print(f"\n{status_table(of_file)}", flush=True)
        return 0
    chosen = None
    if args.cell is not None:
        if not 0 <= args.cell < len(of_file.cells):
            raise InputError(
                f"--cell {args.cell}: {of_file.file} has {len(of_file.cells)} cells, from 0"
            )
        chosen = [of_file.cells[args.cell]]
    return run_sweep(of_file, jobs=args.jobs, retry=args.retry, chosen=chosen)


def config_show(args: argparse.Namespace) -> None:
    from nrt_jax.config.load import dump_config

    print(dump_config(load(args)), end="")


def config_schema(args: argparse.Namespace) -> None:
    from nrt_jax.config.load import config_schema
    from nrt_jax.config.run import RunConfig

    print(json.dumps(config_schema(RunConfig), indent=1))
