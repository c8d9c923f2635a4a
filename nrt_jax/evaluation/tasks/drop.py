"""DROP: questions that need several places of a passage, graded by the F1 of words."""

import random
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
    read_json,
    read_jsonl,
)

SIZE, SEED = 1000, 1234


def _read(path: Path) -> Iterator[Any]:
    if ".jsonl" in path.suffixes:
        yield from read_jsonl(path)
        return
    for passage in read_json(path).values():
        for pair in passage["qa_pairs"]:
            yield {"passage": passage["passage"], **pair}


def _of_file(row: Mapping[str, Any]) -> Mapping[str, Any]:
    return _of_line(row) if "context" in row else _of_pair(row)


def _of_line(row: Mapping[str, Any]) -> Mapping[str, Any]:
    """A row of simple-evals, whose spans of one answer are joined by "and"."""
    passage, _, question = str(row.get("context", "")).rpartition("\nQuestion:")
    texts = [text.strip() for text in str(row.get("ref_text") or "").split("|")]
    spans = [[text] for text in texts] + [t.split(" and ") for t in texts if " and " in t]
    return {
        "passage": passage.removeprefix("Passage:").strip(),
        "question": question.removesuffix("Answer:").strip(),
        "answers": [[span.strip() for span in answer] for answer in spans if any(answer)],
    }


def _of_pair(pair: Mapping[str, Any], config: str | None = None) -> Mapping[str, Any]:
    """A question of DROP's own files or of the hub, with all validated answers."""
    others = pair.get("validated_answers") or []
    if isinstance(others, Mapping):  # the hub has a list per field
        others = [
            dict(zip(others, values, strict=True)) for values in zip(*others.values(), strict=True)
        ]
    answers = [_spans(answer) for answer in (pair.get("answer") or {}, *others)]
    return {**pair, "answers": [spans for spans in answers if spans]}


def _spans(answer: Mapping[str, Any]) -> list[str]:
    if answer.get("number"):
        return [str(answer["number"])]
    date = answer.get("date") or {}
    day = " ".join(filter(None, (date.get(part) for part in ("day", "month", "year"))))
    return list(answer.get("spans") or ([day] if day else []))


SOURCE = Source(
    files=("drop/drop_v0_dev.jsonl*", "drop/drop*.json", "drop_native/drop.json"),
    read=_read,
    origin="drop_v0_dev.jsonl.gz of openaipublic.blob.core.windows.net/simple-evals",
    hub="EleutherAI/drop",
    split="validation",
    from_file=_of_file,
    from_hub=_of_pair,
)


def load(data_dir: str | None = None, **_: object) -> dict[str, Documents]:
    """1,000 documents drawn with seed 1234, or all where there are not more."""
    docs = load_documents(SOURCE, document, data_dir)["test"]
    return {"test": Documents(random.Random(SEED).sample(docs, SIZE)) if len(docs) > SIZE else docs}


def document(row: Row) -> Document:
    """A passage, a question and the answers that count, each a list of spans."""
    answers = row.values["answers"]
    if not answers:
        raise row.bad("ref_text" if "query_id" not in row.values else "answer", "is missing")
    return {
        "passage": row.text("passage"),
        "question": row.text("question"),
        "answers": answers,
    }


def prompt(doc: Document) -> str:
    """The passage, the question and the forms that an answer may have."""
    return (
        "Read the following passage carefully, then answer the reading comprehension question "
        f"that follows.\nPassage: {doc['passage']}\nQuestion: {doc['question']}\n\nFinish the "
        'response with "The answer is [answer]", where [answer] is exactly one of these formats:\n'
        "- Pure number (no units, or % sign), e.g.: 45.3\n"
        '- Date in "day month year" order, containing any of the date, month, and/or year '
        "components e.g.: March 1992\n"
        "- Span from passage enclosed in <..>, e.g.: <the Pentagon report>\n"
        "- List of spans from passage, e.g.: <Adam>, <Albert>, <Bob>"
    )


def target(doc: Document) -> str:
    """The first answer, as a model would write it."""
    return ", ".join(f"<{span}>" for span in doc["answers"][0])


_FORMS = (r"The answer is:? *(.+)", r"(?i)answer is:? *(.+)", r"(?i)answer: *(.+)", r"(.*\S.*)")


def answer_spans(text: str) -> list[str]:
    """The spans that a text answers: those in <...>, else all after "The answer is".

    Without such a sentence the last line with something in it is the answer.
    """
    for form in _FORMS:
        if found := re.findall(form, text):
            last = found[-1].strip().strip("*").removesuffix(".").strip("*")
            return re.findall(r"<([^<>]+)>", last) or [last]
    return []


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 of DROP's own evaluation, of the answer that gives the most."""
    from lm_eval.tasks.drop.utils import get_metrics

    spans = answer_spans(results[0])
    scores = [get_metrics(spans, answer) for answer in doc["answers"]] if spans else [(0.0, 0.0)]
    return {"f1": float(max(f1 for _, f1 in scores)), "em": float(max(em for em, _ in scores))}
