"""Rows per second of `nrt-jax data prepare` against `datasets.map`, memory, and the start of a run.

    .venv/bin/python benchmarks/data.py --data DIR
    .venv/bin/python benchmarks/data.py --data DIR --synthetic 10000000

DIR holds flan_cot/*.tsv, t0_p3_sample/*.jsonl and tokenizers/llama3_1. `datasets.map` tokenises the
same questions and answers with the same tokenizer and number of processes, from rows that are read
before its time starts and without a check of any row; `prepare` reads, checks, tokenises, holds out
and writes. The line of a run is the time until it has its first batch, without that of loading the
tokenizer. --synthetic prepares so many made-up rows instead, for the memory of large data.
"""

import argparse
import json
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import datasets
import tensorflow_datasets  # noqa: F401  # prepare would import it while it is timed
import transformers

from nrt_jax.config.data import DataConfig
from nrt_jax.data.merge import merge
from nrt_jax.data.prepare import prepare
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.training_rows import read_source, sources_of

BATCH_PROMPTS = 256


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the preparation of data.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--synthetic", type=int, metavar="ROWS")
    args = parser.parse_args()
    directory = args.data / "tokenizers" / "llama3_1"
    tokenizer = Tokenizer.load(directory)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if args.synthetic:
            config = synthetic_rows(folder / "rows.jsonl", args.synthetic, directory)
        else:
            config = real_rows(args.data, directory)
        for workers in args.workers:
            out = folder / f"prepared-{workers}"
            rows, seconds = time_prepare(config, tokenizer, out, workers)
            line = f"workers {workers}: {rows} rows, prepare {rows / seconds:.0f} rows per second"
            if not args.synthetic:
                other = rows / time_map(config, directory, workers)
                line += f", datasets.map {other:.0f}, ratio {rows / seconds / other:.2f}"
            print(f"{line}; {memory()}", flush=True)
            if workers != args.workers[-1]:
                shutil.rmtree(out)
        print(f"first batch of a run after {time_start(config, tokenizer, out):.2f} s")


def real_rows(data: Path, tokenizer: Path) -> DataConfig:
    """FLAN and P3 as they are distributed."""
    flan = {"source": "tsv", "columns": ["question", "answer", "rationale"], "unescape": True}
    p3 = {"preset": "prompt_completion", "strip_suffixes": ["<|endoftext|>"]}
    parts = [
        {"name": "flan", "path": data / "flan_cot", **flan},
        {"name": "p3", "path": data / "t0_p3_sample", **p3},
    ]
    return DataConfig.model_validate({"mixture": parts, "tokenizer": tokenizer})


def synthetic_rows(path: Path, count: int, tokenizer: Path) -> DataConfig:
    """Questions that are all different, of some 20 tokens."""
    with path.open("w") as file:
        for i in range(count):
            row = {"question": f"What is {i} plus {i % 997}, and why?", "answer": str(i + i % 997)}
            file.write(json.dumps(row) + "\n")
    return DataConfig.model_validate({"path": path, "tokenizer": tokenizer})


def time_prepare(
    config: DataConfig, tokenizer: Tokenizer, out: Path, workers: int
) -> tuple[int, float]:
    """Rows that are read, and seconds of everything that `nrt-jax data prepare` does."""
    start = time.perf_counter()
    manifest = merge(prepare(config, tokenizer, out, workers=workers, share=(0, 1)), workers)
    seconds = time.perf_counter() - start
    return sum(source["rows"] for source in manifest.content["sources"]), seconds


def time_map(config: DataConfig, directory: Path, workers: int) -> float:
    """Seconds of `datasets.map` over questions and answers."""
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(directory)
    pairs = []
    for source in sources_of(config):
        assert source.path is not None, "real_rows names files"
        for row in read_source(source, source.path):
            assert isinstance(row.fields, dict), row
            pair = row.fields[source.question_field], row.fields[source.answer_field]
            pairs.append(dict(zip(("question", "answer"), pair, strict=True)))
    dataset = datasets.Dataset.from_list(pairs)

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        return {
            "prompt_tokens": tokenizer(batch["question"])["input_ids"],
            "answer_tokens": tokenizer(batch["answer"], add_special_tokens=False)["input_ids"],
        }

    datasets.disable_progress_bars()
    processes = None if workers == 1 else workers
    start = time.perf_counter()
    dataset.map(tokenise, batched=True, num_proc=processes, load_from_cache_file=False)
    return time.perf_counter() - start


def time_start(config: DataConfig, tokenizer: Tokenizer, out: Path) -> float:
    """Seconds from prepared data to the first batch."""
    from nrt_jax.data.batches import BatchIterator
    from nrt_jax.data.pipeline import load_dataset

    run = config.model_copy(update={"path": out, "source": "prepared", "mixture": ()})
    start = time.perf_counter()
    next(BatchIterator(load_dataset(run, tokenizer).train, BATCH_PROMPTS, True, 0))
    return time.perf_counter() - start


def memory() -> str:
    """Most memory that this process and any of its workers has had so far."""
    own, workers = (
        resource.getrusage(who).ru_maxrss / 2**10
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return f"most memory {own:.0f} MiB, of a worker {workers:.0f} MiB"


if __name__ == "__main__":
    main()
