"""The verbs of the command line and their options."""

import argparse
from pathlib import Path

import nrt_jax
from nrt_jax import distributed, verbs
from nrt_jax.arguments import (
    INPUTS,
    Parser,
    add_config,
    dtype,
    exit_status,
    inputs,
    path,
    price,
    process_count,
    restart_count,
    row_count,
    seconds,
    seed,
    temperature,
    token_counts,
    topology,
)
from nrt_jax.data_options import add_data_verbs
from nrt_jax.launch_options import add_launch, add_sweep

EPILOG = """\
CONFIG is one or more YAML files or presets, merged from left to right, followed by overrides such
as train.steps=10 or objective.scheme=gm.

  nrt-jax train quickstart/nrt
  nrt-jax train quickstart/nrt methods/rlpr run_dir=runs/rlpr
"""


def make_parser() -> Parser:
    """The parser of all verbs; each sets `verb`, the function of nrt_jax.verbs that runs it."""
    parser = Parser(
        prog="nrt-jax",
        description="Native Reasoning Training: reasoning from question-answer pairs alone.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nrt-jax {nrt_jax.__version__}")
    subparsers = parser.add_subparsers(required=True, metavar="VERB")
    _add_run_verbs(subparsers)
    _add_evaluate(subparsers)
    _add_judge(subparsers)
    _add_checkpoint_verbs(subparsers)
    add_data_verbs(subparsers)
    _add_views(subparsers)
    _add_local(subparsers)
    add_sweep(subparsers)
    _add_doctor(subparsers)
    _add_plan(subparsers)
    add_launch(subparsers)
    return parser


def _add_run_verbs(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    train = subparsers.add_parser("train", help="train a config's run, or continue it")
    add_config(train)
    train.add_argument(
        "--allow-changed",
        type=inputs,
        action="extend",
        default=[],
        metavar="INPUT,...",
        help=f"continue a run although these are not what it was trained on: {', '.join(INPUTS)}",
    )
    train.add_argument(
        "--stopped-status",
        type=exit_status,
        default=0,
        metavar="STATUS",
        help="exit status of a run that SIGTERM stopped before its last step, 0 by default; "
        "launchers that start a failed run again need another",
    )
    _add_processes(train)
    train.set_defaults(verb=verbs.train)

    diagnose = subparsers.add_parser(
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
    diagnose.set_defaults(verb=verbs.diagnose)

    generate = subparsers.add_parser("generate", help="print the trace and the answer to a prompt")
    _add_model(generate)
    _add_overrides(generate, "data.template=plain")
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
    generate.set_defaults(verb=verbs.generate)

    serve = subparsers.add_parser("serve", help="answer over HTTP like OpenAI, and over gRPC")
    _add_model(serve)
    serve.add_argument(
        "overrides",
        nargs="*",
        metavar="[SECTION.]FIELD=VALUE",
        help="settings of the server, such as port=8001 slots=32, and of how the model is asked, "
        "such as data.template=plain",
    )
    serve.set_defaults(verb=verbs.serve)


def _add_evaluate(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    evaluate = subparsers.add_parser("evaluate", help="evaluate any model on benchmarks")
    _add_model(evaluate)
    _add_overrides(evaluate, "rollout.slots=128")
    evaluate.add_argument("--suite", default="paper", help="its nine benchmarks by default")
    evaluate.add_argument(
        "--tasks", metavar="NAME,...", help="these benchmarks or variants of the suite alone"
    )
    evaluate.add_argument(
        "--limit", type=row_count, metavar="N", help="the first N documents of each benchmark"
    )
    evaluate.add_argument(
        "--data",
        type=path,
        metavar="DIR",
        help="a folder with a folder per benchmark; otherwise the Hugging Face hub is asked",
    )
    evaluate.add_argument("--out", type=path, required=True, metavar="DIR")
    evaluate.add_argument("--seed", type=seed, default=0, help="of sampled answers and traces")
    evaluate.add_argument(
        "--max-trace-tokens",
        type=row_count,
        metavar="N",
        help="longest trace; otherwise rollout.max_trace_tokens of the model, and 0 with --url",
    )
    evaluate.add_argument(
        "--url",
        help="ask MODEL by its name at this OpenAI-compatible server, such as http://HOST/v1",
    )
    evaluate.add_argument(
        "--unsafe-code", action="store_true", help="run programs of HumanEval without a jail"
    )
    _add_processes(evaluate)
    evaluate.set_defaults(verb=verbs.evaluate)


def _add_judge(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    judge = subparsers.add_parser(
        "judge", help="let another model score the traces of a model, as in the paper's Appendix H"
    )
    _add_model(judge)
    _add_overrides(judge, "evaluation.trace_temperature=1")
    judge.add_argument(
        "--url", required=True, help="an OpenAI-compatible server, such as http://HOST/v1"
    )
    judge.add_argument("--judge", required=True, metavar="NAME", help="the model there")
    judge.add_argument(
        "--rows", type=row_count, default=100, metavar="N", help="held-out rows, 100 by default"
    )
    judge.add_argument("--seed", type=seed, default=0, help="of the rows and the traces")
    judge.add_argument("--out", type=path, required=True, metavar="DIR")
    judge.set_defaults(verb=verbs.judge)


def _add_checkpoint_verbs(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    import_ = subparsers.add_parser(
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
    import_.set_defaults(verb=verbs.import_)

    export = subparsers.add_parser("export", help="write any model as a Hugging Face directory")
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
    export.set_defaults(verb=verbs.export)


def _add_views(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    report = subparsers.add_parser(
        "report",
        help="compare runs and evaluations of benchmarks: a page, figures, summary.json",
    )
    report.add_argument("folders", type=path, nargs="+", metavar="SWEEP|RUN|EVALUATION")
    report.add_argument("--out", type=path, required=True)
    report.add_argument(
        "--question",
        metavar="ROW|TEXT",
        help="show this held-out question under every model, by its row or a part of its text",
    )
    report.set_defaults(verb=verbs.report)

    config = subparsers.add_parser(
        "config", help="show a resolved config, or the schema of all configs"
    )
    config_verbs = config.add_subparsers(required=True, metavar="VERB")
    show = config_verbs.add_parser("show", help="print the resolved config")
    add_config(show)
    show.set_defaults(verb=verbs.config_show)
    schema = config_verbs.add_parser("schema", help="print the JSON schema")
    schema.set_defaults(verb=verbs.config_schema)


def _add_local(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    local = subparsers.add_parser(
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
    local.set_defaults(verb=verbs.local)


def _add_plan(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    plan = subparsers.add_parser(
        "plan", help="tell memory, time and cost of a config's run on machines, before renting them"
    )
    add_config(plan)
    plan.add_argument(
        "--topology", type=topology, required=True, help="the machines, as v6e:8x8 or h100x8:2"
    )
    plan.add_argument(
        "--price-per-hour", type=price, metavar="X", help="of one chip, for the cost of the run"
    )
    plan.add_argument(
        "--tokens",
        type=token_counts,
        metavar="PROMPT,TRACE,ANSWER",
        help="mean tokens of a row, 300,400,416 by default, and no more than the config's limits",
    )
    plan.add_argument("--json", action="store_true", help="print all figures as JSON")
    plan.add_argument(
        "--compile",
        action="store_true",
        help="of a TPU slice: also compile the programs for it, with few layers, by libtpu; takes "
        "minutes and no TPU",
    )
    plan.add_argument(
        "--search", action="store_true", help="list the ten fastest meshes and settings that fit"
    )
    plan.set_defaults(verb=verbs.plan)


def _add_doctor(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    doctor = subparsers.add_parser(
        "doctor", help="check devices, drivers, folders and data, and name the first that is wrong"
    )
    doctor.add_argument(
        "config",
        nargs="*",
        metavar="CONFIG",
        help="a config as for train, whose model, data and folders are checked too",
    )
    doctor.add_argument("--json", action="store_true", help="print all figures as JSON")
    _add_processes(doctor)
    doctor.set_defaults(verb=verbs.doctor)


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


def _add_overrides(parser: argparse.ArgumentParser, example: str) -> None:
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="SECTION.FIELD=VALUE",
        help=f"how the model is asked, such as {example}",
    )
