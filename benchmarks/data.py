"""Rows per second of `nrt-jax data prepare` against `datasets.map`, memory, and a run's batches.

    .venv/bin/python benchmarks/data.py --data DIR
    .venv/bin/python benchmarks/data.py --data DIR --synthetic 10000000

DIR holds flan_cot/*.tsv, t0_p3_sample/*.jsonl and tokenizers/llama3_1. `datasets.map` tokenises the
same questions and answers with the same tokenizer and number of processes, from rows that are read
before its time starts and without a check of any row; `prepare` reads, checks, tokenises, holds out
and writes. Both run in turn --repeats times, and the fastest of each counts. The line of a run is
the time until it has its first batch, without that of loading the tokenizer. The pipeline's tokens
per second are those of batches that nothing uses; the step's are those of `nrt-jax train` with the
quickstart's model of 3 layers and the vocabulary of the tokenizer. --synthetic prepares so many
made-up rows instead, for the memory of large data.
"""

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import tensorflow_datasets  # noqa: F401  # prepare would import it while it is timed
import transformers

from nrt_jax.config.data import DataConfig
from nrt_jax.data.merge import merge
from nrt_jax.data.prepare import prepare
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.data.training_rows import read_source, sources_of

if TYPE_CHECKING:
    from nrt_jax.data.batches import BatchIterator

BATCH_PROMPTS, BATCHES = 256, 50


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the preparation of data.")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=3)
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
        out = folder / "prepared"
        for workers in args.workers:
            rows, seconds, others = 0, [], []
            for _ in range(1 if args.synthetic else args.repeats):
                shutil.rmtree(out, ignore_errors=True)
                rows, taken = time_prepare(config, tokenizer, out, workers)
                seconds.append(taken)
                if not args.synthetic:
                    others.append(time_map(config, directory, workers))
            line = f"workers {workers}: {rows} rows, prepare {rows / min(seconds):.0f} per second"
            if others:
                ratio = min(others) / min(seconds)
                line += f", datasets.map {rows / min(others):.0f}, ratio {ratio:.2f}"
            print(f"{line}; {memory()}", flush=True)
        run = config.model_copy(update={"path": out, "source": "prepared", "mixture": ()})
        print(f"first batch of a run after {time_start(run, tokenizer):.2f} s", flush=True)
        pipeline = tokens_per_second(run, tokenizer)
        print(f"pipeline {pipeline:.0f} tokens per second", flush=True)
        if not args.synthetic:
            step = tokens_per_second_of_steps(out, directory, tokenizer, folder / "run")
            print(f"SFT step on this machine {step:.0f}, ratio {pipeline / step:.0f}")


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


def time_start(run: DataConfig, tokenizer: Tokenizer) -> float:
    """Seconds from prepared data to the first batch, without those of imports."""
    import nrt_jax.data.batches
    import nrt_jax.data.pipeline  # noqa: F401

    start = time.perf_counter()
    next(batches_of(run, tokenizer))
    return time.perf_counter() - start


def batches_of(run: DataConfig, tokenizer: Tokenizer) -> "BatchIterator":
    """Batches as a run reads them."""
    # Grain imports jax, whose threads would make the workers of a preparation start anew.
    from nrt_jax.data.batches import BatchIterator
    from nrt_jax.data.pipeline import load_dataset

    train = load_dataset(run, tokenizer).train
    return BatchIterator(train, BATCH_PROMPTS, True, 0, read_threads=run.read_threads)


def tokens_per_second(run: DataConfig, tokenizer: Tokenizer) -> float:
    """Tokens of prompts and answers per second of the pipeline alone."""
    batches = batches_of(run, tokenizer)
    next(batches)
    start = time.perf_counter()
    tokens = sum(
        len(example.prompt_tokens) + len(example.answer_tokens)
        for batch in islice(batches, BATCHES)
        for example in batch
    )
    return tokens / (time.perf_counter() - start)


def tokens_per_second_of_steps(
    out: Path, directory: Path, tokenizer: Tokenizer, run_dir: Path
) -> float:
    """The most tokens per second that a step of SFT on these rows uses, the first one left out."""
    settings = {
        "run_dir": run_dir,
        "data.source": "prepared",
        "data.path": out,
        "data.tokenizer": directory,
        "data.max_prompt_tokens": DataConfig.model_fields["max_prompt_tokens"].default,
        "data.max_answer_tokens": DataConfig.model_fields["max_answer_tokens"].default,
        "data.shuffle": "true",
        "data.chain.totals_rows": 0,
        "model.architecture.vocab_size": tokenizer.vocab_size,
        "model.architecture.max_position_embeddings": 8192,
        "train.steps": 4,
        "train.batch_prompts": 16,
        "train.mini_batch_prompts": 16,
        "train.micro_batch_prompts": 16,
        "logging.tensorboard": "false",
    }
    overrides = [f"{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "nrt_jax", "train", "quickstart/base", *overrides]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    lines = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return max(line["speed/tokens_per_second"] for line in lines if line["step"] > 1)


def memory() -> str:
    """Most memory that this process and any of its workers has had so far."""
    own, workers = (
        resource.getrusage(who).ru_maxrss / 2**10
        for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    )
    return f"most memory {own:.0f} MiB, of a worker {workers:.0f} MiB"


if __name__ == "__main__":
    main()
