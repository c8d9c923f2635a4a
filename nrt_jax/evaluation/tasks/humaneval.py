"""HumanEval: functions from their docstrings, run against tests in a jail; pass@k of 20 samples."""

import re
from collections.abc import Sequence

from nrt_jax.evaluation.benchmark_data import (
    Document,
    Documents,
    Row,
    Source,
    load_documents,
    read_jsonl,
)
from nrt_jax.evaluation.jail import check_jail, run_programs
from nrt_jax.evaluation.tasks import pass_at_k

SECONDS = 3.0
SOURCE = Source(
    files=("humaneval/HumanEval.jsonl*",),
    read=read_jsonl,
    origin="data/HumanEval.jsonl.gz of github.com/openai/human-eval",
    hub="openai/openai_humaneval",
)


def load(
    data_dir: str | None = None, *, unsafe_code: bool = False, **_: object
) -> dict[str, Documents]:
    """The documents, from a folder or the hub; raises InputError where there can be no jail."""
    check_jail(unsafe=unsafe_code)
    docs = load_documents(SOURCE, document, data_dir)
    return {"test": Documents({**doc, "unsafe_code": unsafe_code} for doc in docs["test"])}


def document(row: Row) -> Document:
    """The head of a function, its name and its tests."""
    fields = ("prompt", "entry_point", "test", "canonical_solution")
    return {field: row.text(field) for field in fields}


def prompt(doc: Document) -> str:
    """The request for a block of Python."""
    return (
        "Please provide a self-contained Python script that solves the following problem in a "
        f"markdown code block:\n```python\n{doc['prompt'].strip()}\n```"
    )


_BLOCK = re.compile(r"```[ \t]*(?:[Pp]ython3?|py)?[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)


def program(doc: Document, answer: str) -> str:
    """The script that passes if an answer is right.

    The code is the first block that defines the function, else the first block, else all of the
    answer. It stands after the head of the function, which brings imports and helpers; code that
    does not define the function is its body.
    """
    defines = re.compile(rf"^(?:async )?def {re.escape(doc['entry_point'])}\b", re.MULTILINE)
    blocks = _BLOCK.findall(answer)
    code = next(filter(defines.search, blocks), blocks[0] if blocks else answer)
    whole = defines.search(code)
    if whole and not blocks:
        code = code[whole.start() :]
    if not whole or not blocks:
        code = _unindented_tail_cut(code, keep_first=whole is not None)
    return f"{doc['prompt']}\n{code}\n\n{doc['test']}\ncheck({doc['entry_point']})\n"


def _unindented_tail_cut(code: str, *, keep_first: bool) -> str:
    """Code up to the prose or the next statement of the module, without a blank start."""
    kept: list[str] = []
    for line in code.strip("\n").splitlines():
        if line.strip() and not line[0].isspace() and not (keep_first and not kept):
            break
        kept.append(line)
    return "\n".join(kept)


def process_results(doc: Document, results: Sequence[Sequence[str]]) -> dict[str, float]:
    """pass@1 and pass@10 of all samples; an empty answer fails without being run."""
    answers = [answer for answer in results[0] if answer.strip()]
    runs = run_programs(
        [program(doc, answer) for answer in answers], seconds=SECONDS, unsafe=doc["unsafe_code"]
    )
    return pass_at_k.scores(len(results[0]), sum(run.passed for run in runs))
