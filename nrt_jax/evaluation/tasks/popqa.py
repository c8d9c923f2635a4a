"""PopQA: questions about entities from 16 templates, after a shot of each other template."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from lm_eval.api.samplers import ContextSampler

from nrt_jax.evaluation.benchmark_data import (
    Document,
    Documents,
    Row,
    Source,
    load_documents,
    read_json,
)

# Template, and the subject and the object of its shot.
_SHOTS = (
    ("What is {}'s occupation?", "Marie Curie", "physicist"),
    ("In what city was {} born?", "Wolfgang Amadeus Mozart", "Salzburg"),
    ("What genre is {}?", "The Lord of the Rings", "fantasy"),
    ("Who is the father of {}?", "Alexander the Great", "Philip II of Macedon"),
    ("In what country is {}?", "Mount Fuji", "Japan"),
    ("Who was the producer of {}?", "Titanic", "James Cameron"),
    ("Who was the director of {}?", "Psycho", "Alfred Hitchcock"),
    ("What is {} the capital of?", "Lisbon", "Portugal"),
    ("Who was the screenwriter for {}?", "Pulp Fiction", "Quentin Tarantino"),
    ("Who was the composer of {}?", "The Four Seasons", "Antonio Vivaldi"),
    ("What color is {}?", "chlorophyll", "green"),
    ("What is the religion of {}?", "Francis of Assisi", "Catholicism"),
    ("What sport does {} play?", "Serena Williams", "tennis"),
    ("Who is the author of {}?", "Pride and Prejudice", "Jane Austen"),
    ("Who is the mother of {}?", "Elizabeth I", "Anne Boleyn"),
    ("What is the capital of {}?", "France", "Paris"),
)
_TEMPLATES = [
    re.compile(re.escape(template).replace(r"\{\}", ".+"), re.DOTALL) for template, *_ in _SHOTS
]


def _row(row: Mapping[str, Any], config: str | None = None) -> Mapping[str, Any]:
    """A row with its answers as a list, which the published table has as JSON."""
    published = row.get("possible_answers")
    if isinstance(published, str):
        published = json.loads(published)
    return {**row, "aliases": published or row.get("aliases") or []}


SOURCE = Source(
    files=("popqa/popqa*.json", "popqa_cols/popqa.json"),
    read=read_json,
    origin="data/popQA.tsv of github.com/AlexTMallen/adaptive-retrieval",
    hub="akariasai/PopQA",
    from_file=_row,
    from_hub=_row,
)


def load(data_dir: str | None = None, **_: object) -> dict[str, Documents]:
    """The documents, from a folder or the hub."""
    return load_documents(SOURCE, document, data_dir)


def document(row: Row) -> Document:
    """A question and all names of its answer."""
    question = row.text("question")
    gold = [alias for alias in row.texts("aliases") if alias.strip()]
    if not gold:
        raise row.bad("aliases", "has no name with something in it")
    return {"prompt": _ask(question), "gold": gold}


def _ask(question: str) -> str:
    return f"Q: {question} A:"


class OneOfEachOtherTemplate(ContextSampler):
    """The fixed shots but the one whose template the question has."""

    def sample(
        self, n: int, eval_doc: Document | None = None, df: object = None, **_: object
    ) -> list[Document]:
        """The first n of them."""
        assert eval_doc is not None, "lm-eval gives the document where shots and test share a split"
        question = eval_doc["prompt"].removeprefix("Q: ").removesuffix(" A:")
        shots = [
            {"prompt": _ask(template.format(subject)), "gold": answer}
            for pattern, (template, subject, answer) in zip(_TEMPLATES, _SHOTS, strict=True)
            if not pattern.fullmatch(question)
        ]
        return shots[:n]


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer contains a name: as it is, in lower case, or with a capital in front."""
    text = results[0]
    forms = (form for name in doc["gold"] for form in (name, name.lower(), name.capitalize()))
    return {"exact_match": float(any(form in text for form in forms))}
