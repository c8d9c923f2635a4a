"""The verbs of `nrt-jax data` and their options."""

import argparse
import os

from nrt_jax import data_verbs
from nrt_jax.arguments import Parser, add_config, path, process_count, row_count, share


def add_data_verbs(subparsers: "argparse._SubParsersAction[Parser]") -> None:
    """Add `nrt-jax data` with its verbs; each sets `verb`, the function that runs it."""
    data = subparsers.add_parser("data", help="show, measure or prepare a config's data")
    verbs = data.add_subparsers(required=True, metavar="VERB")
    show_data = verbs.add_parser("show", help="print rows as the model sees them, part by part")
    add_config(show_data)
    show_data.add_argument("--rows", type=row_count, default=3, help="how many, 3 by default")
    show_data.add_argument("--color", choices=("auto", "always", "never"), default="auto")
    show_data.set_defaults(verb=data_verbs.show)
    stats = verbs.add_parser(
        "stats", help="count rows and tokens by source, reasons for rows left out, and padding"
    )
    add_config(stats)
    stats.add_argument(
        "--rows", type=row_count, help="read the first rows of each source alone, so many"
    )
    stats.add_argument(
        "--out", type=path, help="write data_stats.html, data_stats.png and data_stats.json there"
    )
    stats.set_defaults(verb=data_verbs.stats)
    _add_prepare(verbs)
    deduplicate = verbs.add_parser(
        "deduplicate", help="list duplicates and near-duplicates, to leave them out of training"
    )
    add_config(deduplicate)
    deduplicate.add_argument("--out", type=path, required=True, metavar="DIR")
    _add_workers(deduplicate, "--tasks")
    deduplicate.set_defaults(verb=data_verbs.deduplicate)


def _add_prepare(verbs: "argparse._SubParsersAction[Parser]") -> None:
    prepare = verbs.add_parser(
        "prepare", help="tokenise a config's rows once; the same command goes on after a kill"
    )
    add_config(prepare)
    prepare.add_argument("folder", metavar="OUT", help="the folder to write")
    _add_workers(prepare, "--workers")
    prepare.add_argument(
        "--shard",
        type=share,
        default="0/1",
        metavar="I/N",
        help="prepare the I-th of N shares, from 0, such as one per task of a job array; then run "
        "nrt-jax data merge",
    )
    prepare.set_defaults(verb=data_verbs.prepare)
    merge = verbs.add_parser("merge", help="finish what data prepare --shard has prepared")
    merge.add_argument("folder", type=path, metavar="OUT")
    _add_workers(merge, "--workers")
    merge.set_defaults(verb=data_verbs.merge)
    verify = verbs.add_parser(
        "verify", help="check the digests of all shards of prepared data, and name the damaged ones"
    )
    verify.add_argument("folder", type=path, metavar="FOLDER")
    verify.set_defaults(verb=data_verbs.verify)


def _add_workers(parser: argparse.ArgumentParser, option: str) -> None:
    parser.add_argument(
        option, type=process_count, default=os.cpu_count(), metavar="N", help="processes"
    )
