"""GSM8K: grade school word problems; the last number of the answer counts, by value."""

from collections.abc import Sequence

from nrt_jax.evaluation.benchmark_data import (
    Document,
    Documents,
    Row,
    Source,
    load_documents,
    read_jsonl,
)
from nrt_jax.evaluation.extract import make_extract
from nrt_jax.evaluation.numbers import number_value

SOURCE = Source(
    files=("gsm8k/test.jsonl",),
    read=read_jsonl,
    origin="grade_school_math/data/test.jsonl of github.com/openai/grade-school-math",
    hub="openai/gsm8k",
    configs=("main",),
)
_LAST_NUMBER = make_extract("last_number")


def load(data_dir: str | None = None, **_: object) -> dict[str, Documents]:
    """The documents, from a folder or the hub."""
    return load_documents(SOURCE, document, data_dir)


def document(row: Row) -> Document:
    """A question and the number after #### of its worked solution."""
    question, _, gold = row.text("question"), *row.text("answer").rpartition("####")[1:]
    if number_value(gold) is None:
        raise row.bad("answer", "has no number after ####")
    return {"question": question, "gold": gold.strip()}


def prompt(doc: Document) -> str:
    """The question, without a shot and without an instruction, as OLMES asks it."""
    return f"Question: {doc['question']}\nAnswer:"


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the last number of the answer is the gold one."""
    return {"exact_match": float(_LAST_NUMBER.is_right(results[0], [doc["gold"]]))}
