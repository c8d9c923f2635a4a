"""MMLU: four choices in 57 subjects, answered after a chain of thought without shots."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nrt_jax.evaluation.benchmark_data import (
    Document,
    Documents,
    Row,
    Source,
    load_documents,
    read_csv,
)
from nrt_jax.evaluation.extract import MARKUP

LETTERS = "ABCD"


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    subject = path.stem.rpartition("_")[0]
    for row in read_csv(path, ("question", *LETTERS, "answer")):
        yield {"subject": subject, **row}


def _from_hub(row: Mapping[str, Any], config: str | None) -> Mapping[str, Any]:
    choices = dict(zip(LETTERS, row["choices"], strict=True))
    return {**row, **choices, "answer": LETTERS[row["answer"]]}


SOURCE = Source(
    files=("mmlu/test/*.csv", "mmlu/val/*.csv"),
    read=_read,
    origin="data/test of github.com/hendrycks/test",
    hub="cais/mmlu",
    configs=("all",),
    from_hub=_from_hub,
)


def load(data_dir: str | None = None, **_: object) -> dict[str, Documents]:
    """The documents of all subjects, from a folder or the hub; their group is the subject."""
    return load_documents(SOURCE, document, data_dir)


def document(row: Row) -> Document:
    """A question, its four choices and the letter of the right one."""
    gold = row.text("answer").strip()
    if gold not in tuple(LETTERS):
        raise row.bad("answer", f"is {gold!r:.40}, none of A, B, C and D")
    return {
        "group": row.text("subject"),
        "question": row.text("question").strip(),
        "choices": [str(row.values.get(letter, "")).strip() for letter in LETTERS],
        "gold": gold,
    }


def prompt(doc: Document) -> str:
    """The question between two requests to end with the letter in brackets."""
    choices = "\n".join(f" ({n}) {text}" for n, text in zip(LETTERS, doc["choices"], strict=True))
    return (
        "Answer the following multiple-choice question by giving the correct answer letter in "
        "parentheses. Provide CONCISE reasoning for the answer, and make sure to finish the "
        'response with "Therefore, the answer is (ANSWER_LETTER)" where (ANSWER_LETTER) is one of '
        f"(A), (B), (C), (D).\n\nQuestion: {doc['question']}\n{choices}\n\n"
        "Answer the above question and REMEMBER to finish your response with the exact phrase "
        '"Therefore, the answer is (ANSWER_LETTER)" where (ANSWER_LETTER) is one of (A), (B), (C), '
        "(D)."
    )


def summarize_prompt(doc: Document) -> str:
    """The variant that asks for a summary of the reasoning and the bare letter."""
    choices = "\n".join(f" {n}. {text}" for n, text in zip(LETTERS, doc["choices"], strict=True))
    return (
        f"The following are multiple choice questions about {doc['group'].replace('_', ' ')}. "
        "Summarize your reasoning concisely, then conclude with 'Therefore, the answer is: X' "
        f"where X is one of A, B, C, or D.\n\nQuestion: {doc['question']}\n{choices}"
    )


_ASKED = re.compile(rf"Therefore, the answer is ?:?{MARKUP}\(?([A-D])(?![\w'’])")
_FALLBACKS = (
    re.compile(r"(?i)therefore,?\s*the\s*answer\s*is:?\s*\(?([A-D])\b"),
    re.compile(r"(?i)answer\s*is:?\s*\(?([A-D])\b"),
    re.compile(r"(?i)\b([A-D])\)?\s+is\s+correct"),
    re.compile(r"\(([A-D])\)"),
    re.compile(r".*\b([A-D])\b"),
)


def letter(text: str) -> str | None:
    """The letter that an answer names: the last in the form asked for, else by the fallbacks.

    Of the fallbacks the first that matches counts, and of its matches the first.
    """
    if asked := _ASKED.findall(text):
        return asked[-1]
    for pattern in _FALLBACKS:
        if found := pattern.search(text):
            return found[1].upper()
    return None


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer names the right letter."""
    return {"exact_match": float(letter(results[0]) == doc["gold"])}
