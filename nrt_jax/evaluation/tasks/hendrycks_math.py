"""MATH: competition problems of seven types, whose answer stands in a box."""

import re
import threading
from collections.abc import Sequence

from nrt_jax.evaluation.benchmark_data import (
    Document,
    Documents,
    Row,
    Source,
    load_documents,
    read_jsonl,
)
from nrt_jax.evaluation.boxed import boxed, plain_latex

SOURCE = Source(
    files=("math_test/test.jsonl",),
    read=read_jsonl,
    origin="src/data/math/test.jsonl of github.com/microsoft/ToRA",
    hub="EleutherAI/hendrycks_math",
    configs=(
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ),
)
MAX_CHARS = 300
"""A longer answer is compared as text alone: a computer algebra system may take hours for one."""
SECONDS = 5


def load(data_dir: str | None = None, **_: object) -> dict[str, Documents]:
    """The documents of all types, from a folder or the hub; their group is the type."""
    return load_documents(SOURCE, document, data_dir)


def document(row: Row) -> Document:
    """A problem and what is in the last box of its solution."""
    gold = boxed(row.text("solution"))
    if gold is None or not gold.strip():
        raise row.bad("solution", "has no answer in \\boxed{}")
    return {"group": row.text("type"), "problem": row.text("problem"), "gold": gold}


def prompt(doc: Document) -> str:
    """The problem and the request for a box."""
    return f"{doc['problem']}\n\nPresent the answer in LaTex format: \\boxed{{Your answer}}"


_FORMULA = r"(?<!\\)\$((?:\\.|[^$\\\n])+)\$"
_UNBOXED = (
    re.compile(rf"(?i)answer is:?\s*(?:{_FORMULA}|([^\n]+))"),
    re.compile(_FORMULA),
)


def final_answer(text: str) -> str | None:
    """The content of the last box; without one what follows "answer is"; else the last formula."""
    found = boxed(text)
    if found is not None:
        return found
    for pattern in _UNBOXED:
        if matches := list(pattern.finditer(text)):
            return next(filter(None, matches[-1].groups())).strip().removesuffix(".")
    return None


def same_answer(answer: str, gold: str) -> bool:
    """Whether two answers in LaTeX are the same: as plain text, or as mathematics."""
    if plain_latex(answer) == plain_latex(gold):
        return True
    if len(answer) > MAX_CHARS:
        return False
    from math_verify import parse, verify

    # Its time limit is a signal, which only the main thread can have.
    seconds = SECONDS if threading.current_thread() is threading.main_thread() else None
    gold_form, form = (
        parse(f"\\boxed{{{text}}}", parsing_timeout=seconds) for text in (gold, answer)
    )
    return verify(gold_form, form, timeout_seconds=seconds)


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the final answer is the gold one."""
    found = final_answer(results[0])
    return {"exact_match": float(found is not None and same_answer(found, doc["gold"]))}
