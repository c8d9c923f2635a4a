"""BIG-Bench Hard: 27 tasks, each with three worked shots as turns of a chat."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval.api.samplers import ContextSampler

from nrt_jax.errors import InputError
from nrt_jax.evaluation.benchmark_data import (
    Document,
    Documents,
    Row,
    Source,
    load_documents,
    read_json,
    read_text,
)
from nrt_jax.evaluation.extract import MARKUP, after, plain_words
from nrt_jax.evaluation.numbers import plain_number

SHOTS = 3


class Kind(NamedTuple):
    """What the answers of a task look like, and how two are compared."""

    pattern: str
    plain: Callable[[str], str]
    """The form in which equal answers are equal."""
    introduced: str | None = None
    """What may also stand right after "the answer is"."""
    alone: tuple[str, ...] = ()
    """What counts in a text that introduces no answer."""


def _word_of(*words: str) -> Kind:
    pattern = rf"\b(?:{'|'.join(words)})\b"
    return Kind(pattern, str.lower, alone=(rf"(?i:{pattern})",))


def _only(characters: str) -> Callable[[str], str]:
    return lambda text: re.sub(rf"[^{characters}]", "", text.upper())


_NUMBER = r"(?:(?<![\w)\]])[-\u2212])?\d+(?:,\d{3})*(?:\.\d+)?"
_BRACKETS = r"(?>[\])}>](?:[\])}> ]*[\])}>])?)(?! *[\[({<])"
_WORDS = r"[a-z][a-z ,'’-]*"
YES_NO, TRUTH = _word_of("yes", "no"), _word_of("true", "false")
VALIDITY = _word_of("invalid", "valid")
CHOICE = Kind(
    r"\([A-Z]\)",
    _only("A-Z"),
    introduced=r"\(?(?-i:[A-Z])(?![\w'’])",
    # "A" and "I" are words too, except at the end.
    alone=(r"\([A-Z]\)", r"(?<![\w'’])(?:[B-HJ-Z](?![\w'’])|[AI](?=[\W_]*$))"),
)
NUMBER = Kind(_NUMBER, plain_number, alone=(_NUMBER,))
BRACKETS = Kind(_BRACKETS, _only(r"\])}>"), alone=(_BRACKETS,))
WORDS = Kind(
    _WORDS,
    lambda text: " ".join(re.findall(r"[a-z'-]+", text.lower())),
    alone=(rf"(?m:^{_WORDS}\.?$)",),
)

KINDS = {
    "boolean_expressions": TRUTH,
    "causal_judgement": YES_NO,
    "date_understanding": CHOICE,
    "disambiguation_qa": CHOICE,
    "dyck_languages": BRACKETS,
    "formal_fallacies": VALIDITY,
    "geometric_shapes": CHOICE,
    "hyperbaton": CHOICE,
    "logical_deduction_five_objects": CHOICE,
    "logical_deduction_seven_objects": CHOICE,
    "logical_deduction_three_objects": CHOICE,
    "movie_recommendation": CHOICE,
    "multistep_arithmetic_two": NUMBER,
    "navigate": YES_NO,
    "object_counting": NUMBER,
    "penguins_in_a_table": CHOICE,
    "reasoning_about_colored_objects": CHOICE,
    "ruin_names": CHOICE,
    "salient_translation_error_detection": CHOICE,
    "snarks": CHOICE,
    "sports_understanding": YES_NO,
    "temporal_sequences": CHOICE,
    "tracking_shuffled_objects_five_objects": CHOICE,
    "tracking_shuffled_objects_seven_objects": CHOICE,
    "tracking_shuffled_objects_three_objects": CHOICE,
    "web_of_lies": YES_NO,
    "word_sorting": WORDS,
}


def _read(path: Path) -> Iterator[Mapping[str, Any]]:
    examples = read_json(path)["examples"]
    shots = _shots(path.parent.parent / "cot-prompts" / f"{path.stem}.txt")
    for example in examples:
        yield {"task": path.stem, "shots": shots, **example}


def _shots(path: Path) -> list[Document]:
    """The worked examples of a task; the first begins with what the task is."""
    if not path.is_file():
        raise InputError(
            f"--data {path.parent.parent.parent}: no bbh/cot-prompts/{path.name}, the shots of the "
            f"task; the public file is cot-prompts/{path.name} of {_HOME}"
        )
    text = read_text(path)
    description, *examples = text.partition("-----\n")[2].split("\n\nQ: ")
    shots = []
    for example in examples:
        question, _, answer = example.partition(f"\nA: {_STEPS}")
        shots.append({"prompt": _ask(question), "gold": answer.strip()})
    if len(shots) < SHOTS or not all(shot["gold"] for shot in shots):
        raise InputError(f"{path}: has fewer than {SHOTS} worked examples; copy the file again")
    shots[0]["prompt"] = f"{description.strip()}\n\n{shots[0]['prompt']}"
    return shots[:SHOTS]


def _from_hub(row: Mapping[str, Any], config: str | None) -> Mapping[str, Any]:
    """A row of the hub, which has no shots; lm-eval has them in its own task files."""
    import lm_eval
    import yaml

    path = Path(lm_eval.__file__).parent / "tasks" / "bbh" / "cot_fewshot" / f"{config}.yaml"
    task = yaml.safe_load(path.read_text("utf-8"))
    shots = [
        {"prompt": _ask(shot["input"]), "gold": shot["target"]}
        for shot in task["fewshot_config"]["samples"][:SHOTS]
    ]
    shots[0]["prompt"] = f"{task['description'].strip()}\n\n{shots[0]['prompt']}"
    return {"task": config, "shots": shots, **row}


_HOME = "github.com/suzgunmirac/BIG-Bench-Hard"
SOURCE = Source(
    files=("bbh/bbh/*.json",),
    read=_read,
    origin=f"bbh/*.json of {_HOME}",
    hub="SaylorTwift/bbh",
    configs=tuple(KINDS),
    from_hub=_from_hub,
)
_STEPS = "Let's think step by step."


def _ask(question: str) -> str:
    return f"Q: {question}\nA: {_STEPS}"


def load(data_dir: str | None = None, **_: object) -> dict[str, Documents]:
    """The documents of all tasks that there are; their group is the task."""
    return load_documents(SOURCE, document, data_dir)


def document(row: Row) -> Document:
    """A question, its answer and the shots of its task."""
    task = row.text("task")
    if task not in KINDS:
        raise row.bad("task", f"{task} is none of the {len(KINDS)} of BIG-Bench Hard")
    return {
        "group": task,
        "prompt": _ask(row.text("input")),
        "gold": row.text("target").strip(),
        "shots": row.values["shots"],
    }


class ShotsOfTheTask(ContextSampler):
    """The shots that a document brings, in their order."""

    def sample(
        self, n: int, eval_doc: Document | None = None, df: object = None, **_: object
    ) -> list[Document]:
        """The first n of them."""
        assert eval_doc is not None, "lm-eval gives the document where shots and test share a split"
        return eval_doc["shots"][:n]


def answer(text: str, task: str) -> str | None:
    """What a text answers in a task, in its plain form; None where nothing looks like an answer.

    The patterns are tried in order, and of the first that matches the last match counts.
    """
    kind = KINDS[task]
    direct = f"{kind.pattern}|{kind.introduced}" if kind.introduced else kind.pattern
    patterns = (
        rf"(?i)so the answer is:?{MARKUP}({direct})",
        rf"(?i)answer is:?{MARKUP}({direct})",
        rf"(?i)answer:[^\n]*?({kind.pattern})",
        rf"(?i)answer\b[^\n]*?({kind.pattern})",
        *(f"({pattern})" for pattern in kind.alone),
    )
    for pattern in patterns:
        if matches := re.findall(pattern, text):
            return kind.plain(matches[-1])
    return None


def process_results(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Whether the answer is the gold one, as answers of its task are compared.

    A few rows of tasks with choices have the text of the choice, which is then compared.
    """
    kind = KINDS[doc["group"]]
    if re.fullmatch(kind.pattern, doc["gold"], re.IGNORECASE):
        right = answer(results[0], doc["group"]) == kind.plain(doc["gold"])
    else:
        said = after(results[0], "answer is") or results[0]
        right = plain_words(said) == plain_words(doc["gold"])
    return {"exact_match": float(right)}
