"""What each verb of `nrt-jax data` does with its arguments; see `verbs`."""

import argparse
import sys
from typing import TYPE_CHECKING

from nrt_jax.errors import InputError
from nrt_jax.verbs import exit_on_sigterm, keeps_what_is_finished, load

if TYPE_CHECKING:
    from nrt_jax.data.manifest import Manifest


def show(args: argparse.Namespace) -> None:
    config = load(args)
    from nrt_jax.checkpoints.abstract_model import load_tokenizer
    from nrt_jax.data.show import show_rows

    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    reasons = config.method == "nrt"
    tokenizer = load_tokenizer(config)
    for line in show_rows(config.data, tokenizer, reasons=reasons, rows=args.rows, color=color):
        print(line)


def stats(args: argparse.Namespace) -> None:
    config = load(args)
    from nrt_jax.analysis.data_stats import write_stats

    write_stats(config, args.rows, args.out)


def prepare(args: argparse.Namespace) -> None:
    config = load(args)
    from nrt_jax.data.merge import merge
    from nrt_jax.data.prepare import prepare
    from nrt_jax.data.tokenizer import Tokenizer

    data, out = config.data, args.folder
    args.interrupts.at_leaving = lambda: "the same command goes on with what is finished"
    tokenizer = Tokenizer.load(config.tokenizer_directory, data.think_start, data.think_end)
    with exit_on_sigterm(), keeps_what_is_finished():
        plan = prepare(data, tokenizer, out, workers=args.workers, share=args.shard)
        alone = args.shard.count == 1 or plan.finished
        manifest = merge(plan, args.workers) if alone else None
    if manifest is None:
        print(f"{out}: share {args.shard} is there; after all of them run nrt-jax data merge {out}")
    else:
        _print_prepared(manifest)


def merge(args: argparse.Namespace) -> None:
    from nrt_jax.data.merge import merge
    from nrt_jax.data.plan import read_plan

    with exit_on_sigterm(), keeps_what_is_finished():
        manifest = merge(read_plan(args.folder), args.workers)
    _print_prepared(manifest)


def verify(args: argparse.Namespace) -> None:
    from nrt_jax.data.verify import verify

    manifest = verify(args.folder)
    count = sum(map(len, manifest.splits.values()))
    print(f"{args.folder}: all {count} shards are as they were written")


def _print_prepared(manifest: "Manifest") -> None:
    from nrt_jax.data.bad_rows import reasons_table

    rows = {split: sum(s.rows for s in shards) for split, shards in manifest.splits.items()}
    rejected = sum(manifest.rejected.values())
    print(
        f"{manifest.directory}: {rows['train']:,} training rows, {rows.get('eval', 0):,} for the "
        f"evaluation, {rejected:,} left out"
    )
    for line in reasons_table(manifest.rejected):
        print(line)


def deduplicate(args: argparse.Namespace) -> None:
    config = load(args)
    from nrt_jax.data.bad_rows import reasons_table

    try:
        from nrt_jax.data.near_duplicates import LIST_FILE, deduplicate
    except ModuleNotFoundError as missing:
        package = str(missing.name).partition(".")[0]
        raise InputError(
            f"data deduplicate: the package {package} is not installed; "
            "pip install 'nrt-jax[datatrove]'"
        ) from None
    counts, path = deduplicate(config.data, args.out, args.tasks), args.out / LIST_FILE
    for line in reasons_table(counts):
        print(line)
    print(f"{path} names {counts.total()} rows; data.leave_out={path} trains without them")
