"""Results of benchmarks: a score per document, a row per task, a suite per model.

A folder of an evaluation holds `results.json`, the rows, and `scores.parquet`, the scores that the
rows are computed from. Equal scores give equal bytes, in whatever order they came.
"""

import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from nrt_jax.atomic_files import write_atomically
from nrt_jax.errors import InputError
from nrt_jax.file_kinds import why_missing
from nrt_jax.strict_json import parse_json

if TYPE_CHECKING:
    import pyarrow as pa

RESULTS_FILE = "results.json"
SCORES_FILE = "scores.parquet"
FORMAT = 1
"""Of `results.json`; it grows when an older reader would misread a newer file."""

Average = Literal["micro", "macro"]
"""Mean over the documents, or mean over the groups of the means within each."""


@dataclass(frozen=True, kw_only=True)
class DocumentScore:
    """What one document of a task adds to its row."""

    task: str
    group: str = ""
    """Subject, type or subtask; empty where a task has none."""
    document: str
    """The same for every model, so that two models can be compared document by document."""
    score: float
    """Primary metric, 0 to 1; the mean or pass@k over the sampled answers."""
    answers: int = 1
    """Sampled answers; 0 where only log-likelihoods of given answers are compared."""
    unclosed: int = 0
    """Answers that are empty because the trace never closed."""
    truncated: int = 0
    """Answers that were cut at their limit."""
    trace_tokens: int = 0
    """Over all answers."""
    answer_tokens: int = 0
    """Over all answers."""


@dataclass(frozen=True, kw_only=True)
class GroupResult:
    """The mean within one group."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """One row of the table."""

    task: str
    title: str
    metric: str
    average: Average
    headline: bool
    """False for a variant, which has a row but no part in Overall."""
    value: float
    """0 to 1."""
    stderr: float | None
    """Standard error of `value`; None where a group has a single document."""
    n: int
    """Documents."""
    answers: int
    """Sampled answers of all documents."""
    unclosed: int
    truncated: int
    mean_trace_tokens: float | None
    """Tokens per answer; None for a task without sampled answers."""
    mean_answer_tokens: float | None
    groups: dict[str, GroupResult]
    """By name; empty for a task without groups."""


@dataclass(frozen=True, kw_only=True)
class SuiteResult:
    """All rows of one model."""

    model: str
    settings: str
    """Digest of what decides the scores besides the model."""
    limit: int | None
    """Documents per task; None for all."""
    base: str | None = None
    """Name of the model that it was trained from; None where that is not known."""
    tasks: tuple[TaskResult, ...]

    @property
    def overall(self) -> float | None:
        """Plain mean of the headline values; None where there are none."""
        values = [row.value for row in self.tasks if row.headline]
        return mean(values) if values else None


def mean(values: Sequence[float]) -> float:
    """Mean that does not depend on the order of the values."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean, sqrt(sum (v - mean)^2 / (n (n - 1))); None for one value."""
    n, middle = len(values), mean(values)
    if n < 2:
        return None
    return math.sqrt(math.fsum((value - middle) ** 2 for value in values) / (n * (n - 1)))


def summarise(
    *,
    task: str,
    title: str,
    metric: str,
    average: Average,
    scores: Sequence[DocumentScore],
    headline: bool = True,
) -> TaskResult:
    """The row of a task from its documents' scores, at least one.

    The standard error of a macro average takes the groups as fixed: sqrt(sum_g se_g^2) / G.
    """
    assert scores, f"{task}: no scores"
    by_group: dict[str, list[float]] = {}
    for score in sorted(scores, key=lambda score: score.group):
        by_group.setdefault(score.group, []).append(score.score)
    groups = {name: _group_result(values) for name, values in by_group.items()}
    whole = _group_result([score.score for score in scores])
    value, stderr = whole.value, whole.stderr
    if average == "macro":
        value = mean([group.value for group in groups.values()])
        errors = [group.stderr for group in groups.values() if group.stderr is not None]
        complete = len(errors) == len(groups)
        stderr = math.hypot(*errors) / len(groups) if complete else None
    answers = sum(score.answers for score in scores)
    return TaskResult(
        task=task,
        title=title,
        metric=metric,
        average=average,
        headline=headline,
        value=value,
        stderr=stderr,
        n=len(scores),
        answers=answers,
        unclosed=sum(score.unclosed for score in scores),
        truncated=sum(score.truncated for score in scores),
        mean_trace_tokens=_per_answer(sum(score.trace_tokens for score in scores), answers),
        mean_answer_tokens=_per_answer(sum(score.answer_tokens for score in scores), answers),
        groups={} if list(groups) == [""] else groups,
    )


def _group_result(values: Sequence[float]) -> GroupResult:
    return GroupResult(value=mean(values), stderr=standard_error(values), n=len(values))


def _per_answer(tokens: int, answers: int) -> float | None:
    return tokens / answers if answers else None


# --- files ---------------------------------------------------------------------------------------


def write_results(folder: Path, suite: SuiteResult, scores: Sequence[DocumentScore]) -> None:
    """Write `results.json` and `scores.parquet`, each at once; equal results give equal bytes."""
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    place = {row.task: index for index, row in enumerate(suite.tasks)}
    ordered = sorted(scores, key=lambda score: (place[score.task], score.group, score.document))
    file = io.BytesIO()
    pq.write_table(_table(ordered), file, compression="zstd")
    write_atomically(folder / SCORES_FILE, file.getbuffer())
    # Last: a folder with results.json is a finished evaluation.
    write_atomically(folder / RESULTS_FILE, to_json(suite).encode())


def to_json(suite: SuiteResult) -> str:
    """The text of `results.json`, with Overall beside the rows for other programs."""
    content = {"format": FORMAT, "overall": suite.overall} | asdict(suite)
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def from_json(text: str | bytes) -> SuiteResult:
    """What `to_json` wrote; ValueError, in one line, for another text."""
    from pydantic import TypeAdapter, ValidationError

    content = parse_json(text)
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise ValueError(f"holds no results in format {FORMAT}")
    content.pop("overall", None)
    try:
        return TypeAdapter(SuiteResult).validate_python(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise ValueError(f"{where}: {first['msg']}") from None


def is_evaluation(folder: Path) -> bool:
    """Whether a folder holds an evaluation of benchmarks, finished or not."""
    from nrt_jax.evaluation.answer_log import IDENTITY_FILE

    return any((folder / name).is_file() for name in (RESULTS_FILE, IDENTITY_FILE))


def read_results(folder: Path) -> SuiteResult:
    """The rows in a folder; InputError where they are missing or damaged."""
    file = folder / RESULTS_FILE
    try:
        return from_json(file.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{file}: {why_missing(file)}; name a folder that nrt-jax evaluate --out has finished"
        ) from None
    except ValueError as error:
        raise InputError(f"{file}: {error}; run the same nrt-jax evaluate again") from None


def read_scores(folder: Path) -> list[DocumentScore]:
    """The scores of every document in a folder; InputError where they are missing or damaged."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = folder / SCORES_FILE
    names = [field.name for field in fields(DocumentScore)]
    try:
        table = pq.read_table(file, columns=names, partitioning=None)
    except FileNotFoundError:
        raise InputError(
            f"{file}: {why_missing(file)}; copy the whole folder of the evaluation"
        ) from None
    except pa.ArrowException as error:
        what = " ".join(str(error).split())
        raise InputError(f"{file}: {what}; run the same nrt-jax evaluate again") from None
    if table.column_names != names:
        missing = next(name for name in names if name not in table.column_names)
        raise InputError(f"{file}: has no column {missing!r}; run the same nrt-jax evaluate again")
    return [DocumentScore(**row) for row in table.to_pylist()]


def _table(scores: Sequence[DocumentScore]) -> "pa.Table":
    import pyarrow as pa

    types = {str: pa.string(), float: pa.float64(), int: pa.int64()}
    columns = {
        field.name: pa.array([getattr(score, field.name) for score in scores], types[field.type])
        for field in fields(DocumentScore)
    }
    return pa.table(columns)
