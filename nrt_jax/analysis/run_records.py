"""The saved records of finished runs: config, versions, metrics and samples."""

import json
import logging
import math
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from nrt_jax.config.load import flat
from nrt_jax.config.run import CONFIG_FILE, RunConfig, load_run
from nrt_jax.config.schemes import SCHEMES
from nrt_jax.errors import InputError
from nrt_jax.evaluation.judge import JUDGED, SUMMARY_FILE
from nrt_jax.evaluation.reference_log import ReferenceRow, read_references
from nrt_jax.evaluation.results import RESULTS_FILE, SuiteResult, read_results

log = logging.getLogger(__name__)

EXACT_MATCH, QUALITY = "eval/exact_match", "judge/quality"
EVALUATIONS = "evaluations"
"""The folder in a run directory where reports look for evaluations of its last weights."""
SAMPLE_KEYS = ("index", "question", "trace", "trace_end", "answer", "reference", "correct")


@dataclass(frozen=True)
class RunRecord:
    """One finished run."""

    name: str
    """The shortest end of its path that no other compared run shares."""
    path: Path
    config: RunConfig
    versions: dict[str, Any]
    training: list[dict[str, int | float]]
    """Metrics of each step."""
    evaluations: list[dict[str, int | float]]
    """Metrics of each evaluation; the first is of the model before training, which is step 0, or
    before that in a run with a warm-up."""
    samples: list[dict[str, Any]]
    """Traces and answers of the evaluations, with the step of each."""
    warmup: list[dict[str, int | float]]
    """Metrics of each update of the warm-up; none in a run without one."""
    judged: list[dict[str, int | float]]
    """`judge/quality` of the steps whose traces were judged."""
    references: list[ReferenceRow]
    """Tokens of the reference answers after the last step; none in a run that kept none."""

    benchmarks: list[SuiteResult]
    """Finished evaluations in RUN/evaluations/."""

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Every setting of the config by its dotted name."""
        return flat(self.config.model_dump(mode="json"))

    @property
    def scheme(self) -> str | None:
        """Reward scheme; None for a run without traces."""
        return self.config.objective.scheme if self.config.method == "nrt" else None

    @property
    def title(self) -> str:
        """The method's name in the paper."""
        return self.config.method.upper() if self.scheme is None else SCHEMES[self.scheme].title

    @property
    def model_name(self) -> str:
        """The model that the run started from."""
        path = self.config.model.path
        return "random weights" if path is None else path.name

    @property
    def data_name(self) -> str:
        """The data of the run: a generator, a mixture, or files with their folders."""
        return self.config.data.short_location(2)

    @property
    def problems(self) -> int | None:
        """Problems per evaluation; None where an evaluation file may hold fewer than asked for."""
        if self.config.data.eval_path is not None:
            return None
        return min(self.config.evaluation.examples, self.config.data.eval_rows)

    def samples_of(self, step: int) -> dict[tuple[str, str], dict[str, Any]]:
        """Samples of one step by question and reference, in the order of the file."""
        chosen = (sample for sample in self.samples if sample["step"] == step)
        return {(sample["question"], sample["reference"]): sample for sample in chosen}


class Unfinished(InputError):
    """A run that has not taken its last step."""


def read_runs(paths: Sequence[Path], cells: Collection[Path] = ()) -> list[RunRecord]:
    """Records of finished runs, in the order given; InputError for one that cannot be compared.

    Of the `cells` of a sweep those that are not finished are left out with a warning. Raises
    InputError where none is left.
    """
    records = []
    for path, name in zip(paths, _names(paths), strict=True):
        try:
            records.append(_read_run(path, name))
        except Unfinished as error:
            if path not in cells:
                raise
            log.warning("left out: %s", error)
    if not records:
        raise InputError(
            f"{paths[0].parent}: none of its {len(paths)} runs is finished; start the sweep again"
        )
    return records


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    for path, count in zip(paths, map(Counter(parts).__getitem__, parts), strict=True):
        if count > 1:
            raise InputError(f"{path}: named {count} times; name each run once")
    for depth in range(1, max(map(len, parts))):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def _read_run(path: Path, name: str) -> RunRecord:
    config = load_run(path)
    if config.evaluation.examples == 0:
        raise InputError(
            f"{path}: has no evaluation, since evaluation.examples=0; train again in a new run_dir "
            "with evaluation.examples above 0"
        )
    metrics = list(_lines(path / "metrics.jsonl", _check_numbers))
    training = [row for row in metrics if "loss/total" in row]
    evaluations = [row for row in metrics if EXACT_MATCH in row]
    last = training[-1]["step"] if training else 0
    steps = config.train.steps
    if last < steps or not evaluations or evaluations[-1]["step"] < steps:
        raise Unfinished(
            f"{path}: stopped at step {last} of {steps}; finish it with: "
            f"nrt-jax train {path / CONFIG_FILE} run_dir={path}"
        )
    if evaluations[0]["step"] != -config.warmup.updates:
        raise InputError(
            f"{path / 'metrics.jsonl'}: the evaluation before training (step "
            f"{-config.warmup.updates}) is missing; "
            "train again in a new run_dir"
        )
    return RunRecord(
        name=name,
        path=path,
        config=config,
        versions=_versions(path / "versions.json"),
        training=training,
        evaluations=evaluations,
        samples=list(_lines(path / "samples.jsonl", _check_sample)),
        warmup=[row for row in metrics if "warmup/update" in row],
        judged=sorted(_judged(path / JUDGED), key=lambda row: row["step"]),
        references=read_references(path, steps),
        benchmarks=[
            read_results(file.parent)
            for file in sorted((path / EVALUATIONS).glob(f"*/{RESULTS_FILE}"))
        ],
    )


def _judged(folder: Path) -> Iterator[dict[str, int | float]]:
    """What `nrt-jax judge` has found of the run's checkpoints."""
    for file in sorted(folder.glob(f"*/{SUMMARY_FILE}")):
        try:
            summary = json.loads(file.read_text("utf-8"))
            step, quality = summary["step"], summary["quality"]
        except (OSError, ValueError, KeyError, TypeError):
            raise InputError(
                f"{file}: has no step and quality; run the same nrt-jax judge again, which asks "
                "nothing twice"
            ) from None
        if quality is not None:
            yield {"step": step, QUALITY: quality}


def _lines(path: Path, check: Any) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file, each checked; none when the file is missing."""
    if not path.exists():
        return
    for number, line in enumerate(path.read_text("utf-8", "replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            problem = check(row)
        except ValueError:
            problem = "not JSON"
        if problem:
            shown = line if len(line) <= 60 else f"{line[:57]}..."
            raise InputError(
                f"{path}: line {number}: {problem}: {shown!r}; delete that line, or train the run "
                "again in a new run_dir"
            )
        # json makes new strings of the same keys for every line.
        yield {sys.intern(key): value for key, value in row.items()}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_numbers(row: Any) -> str | None:
    if not isinstance(row, dict) or "step" not in row:
        return "has no step"
    for key, value in row.items():
        if value is None:  # how metrics.jsonl writes a value that is not finite
            row[key] = math.nan
        elif not _is_number(value):
            return f"{key} is no number"
    return None


def _check_sample(row: Any) -> str | None:
    if not isinstance(row, dict) or not _is_number(row.get("step")):
        return "has no step"
    missing = next((key for key in SAMPLE_KEYS if key not in row), None)
    if missing:
        return f"has no {missing}"
    texts = [row["question"], row["answer"], row["reference"]]
    traces = [row["trace"], row["trace_end"]]
    right = all(isinstance(text, str) for text in texts)
    right &= all(text is None or isinstance(text, str) for text in traces)
    return None if right and isinstance(row["correct"], bool) else "holds a value of another type"


def _versions(path: Path) -> dict[str, Any]:
    try:
        versions = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise InputError(f"{path}: {reason}; copy the whole directory of the run") from None
    if not isinstance(versions, dict):
        raise InputError(f"{path}: must hold a mapping; copy the whole directory of the run")
    return versions
