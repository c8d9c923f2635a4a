"""The benchmarks: for each a task file of lm-eval and a module with its prompt and grader."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

TASKS_DIR = Path(__file__).resolve().parent


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """A row of the table of results."""

    name: str
    """The lm-eval task."""
    title: str
    metric: str
    """The key of a document's score, 0 to 1, in what the task's `process_results` returns."""
    average: Literal["micro", "macro"]
    """The mean over documents, or over groups of the means over their documents."""
    full_size: int
    """Documents in the whole benchmark."""
    headline: bool = True
    """Whether it counts in the paper's Overall; a variant does not."""


BENCHMARKS = {
    row[0]: Benchmark(
        name=row[0], title=row[1], metric=row[2], average=row[3], full_size=row[4], headline=row[5]
    )
    for row in (
        ("bbh", "BBH", "exact_match", "micro", 6511, True),
        ("mmlu", "MMLU", "exact_match", "macro", 14042, True),
        ("drop", "DROP", "f1", "micro", 1000, True),
        ("popqa", "PopQA", "exact_match", "micro", 14267, True),
        ("truthfulqa", "TQA", "mc2", "micro", 817, True),
        ("gsm8k", "GSM8K", "exact_match", "micro", 1319, True),
        ("math", "MATH", "exact_match", "macro", 5000, True),
        ("humaneval", "HEval", "pass@10", "micro", 164, True),
        ("ifeval", "IFEval", "prompt_level_loose_acc", "micro", 541, True),
        ("mmlu_summarize", "MMLU, summarize", "exact_match", "macro", 14042, False),
        ("truthfulqa_after_trace", "TQA after a trace", "mc2", "micro", 817, False),
        ("ifeval_pass10", "IFEval pass@10", "pass@10", "micro", 541, False),
    )
}
"""The nine in the order of the paper's Table 3, then the variants."""
