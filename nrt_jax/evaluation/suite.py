"""Suites of benchmarks: load the tasks, let lm-eval ask a model, and score every document."""

import hashlib
import json
import logging
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nrt_jax import distributed
from nrt_jax.checkpoints.fingerprint import fingerprints
from nrt_jax.checkpoints.hf_config import directory_name
from nrt_jax.checkpoints.open import open_model
from nrt_jax.data.chat_template import template_text
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.evaluation.answer_log import (
    ANSWERS,
    AnswerLog,
    answer_key,
    check_identity,
    is_of_another,
)
from nrt_jax.evaluation.asked_model import AskedModel
from nrt_jax.evaluation.benchmark_data import task_manager
from nrt_jax.evaluation.chat_client import ChatClient, ServerGone, ServerRefused
from nrt_jax.evaluation.results import (
    DocumentScore,
    SuiteResult,
    TaskResult,
    summarise,
    write_results,
)
from nrt_jax.evaluation.tasks import BENCHMARKS

if TYPE_CHECKING:
    from lm_eval.api.task import Task

    from nrt_jax.evaluation.lm import LoggedLM

log = logging.getLogger(__name__)

SUITES = {"paper": tuple(name for name, task in BENCHMARKS.items() if task.headline)}
"""Names of suites, and their benchmarks."""
_Evaluated = tuple[SuiteResult, list[DocumentScore]]
SHOT_SEED = 1234
"""By which lm-eval draws shots, as its own command line does."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What to evaluate."""

    tasks: tuple[str, ...]
    """Names of `BENCHMARKS`."""
    limit: int | None = None
    """The first documents of each; None for all."""
    data: Path | None = None
    """A folder with one folder per benchmark; None reads from the Hugging Face hub."""
    seed: int = 0
    """Of every draw."""
    unsafe_code: bool = False
    """Run programs of the model without a jail."""


def task_names(words: Iterable[str]) -> tuple[str, ...]:
    """The benchmarks that names of suites and benchmarks stand for, each once.

    Raises InputError, with the nearest names, for another word.
    """
    names: dict[str, None] = {}
    for word in words:
        if word not in SUITES and word not in BENCHMARKS:
            every = [*SUITES, *BENCHMARKS]
            near = get_close_matches(word, every, n=3, cutoff=0.5)
            hint = f"did you mean {' or '.join(near)}?" if near else f"use {', '.join(every)}"
            raise InputError(f"{word!r} is no benchmark; {hint}")
        names |= dict.fromkeys(SUITES.get(word, (word,)))
    return tuple(names)


def load_tasks(suite: Suite) -> dict[str, "Task"]:
    """The tasks of lm-eval with their documents.

    Raises InputError when lm-eval is not installed, for files that are missing or cannot be used,
    and where a task runs programs and nothing jails them.
    """
    manager = task_manager(suite.data, unsafe_code=suite.unsafe_code)
    with _quiet():
        tasks = manager.load(list(suite.tasks))["tasks"]
    for task in tasks.values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=SHOT_SEED)
    return tasks


def evaluate_model(
    path: Path, suite: Suite, out: Path, overrides: Sequence[str] = ()
) -> SuiteResult | None:
    """Evaluate anything that holds a model, with `section.field=value` overrides.

    The same call goes on with the answers in `out`. Only process 0 writes, and gets a result.
    Raises InputError.
    """
    tasks = load_tasks(suite)
    opened = open_model(path, overrides)
    name = f"{opened.name}, step {opened.step}" if opened.step is not None else opened.name
    return evaluate_weights(AskedModel.of(opened), tasks, suite, out, name=name)


def evaluate_weights(
    asked: AskedModel,
    tasks: dict[str, "Task"],
    suite: Suite,
    out: Path,
    *,
    name: str,
    replaces: bool = False,
) -> SuiteResult | None:
    """As `evaluate_model`, of weights that are open.

    With `replaces`, answers of other weights in `out` are removed, and are no error.
    """
    from nrt_jax.evaluation.lm import EngineLM

    identity, path = _identity(asked), asked.config.model.path
    if replaces and distributed.is_first() and is_of_another(out, identity):
        shutil.rmtree(out)
    with _answers(out, identity) as answers:
        lm = EngineLM(asked, answers, seed=suite.seed)
        result = _evaluate(lm, tasks, suite, name, is_chat=asked.contexts.is_chat)
    return _written(result, out, base=None if path is None else directory_name(path))


def evaluate_server(
    url: str, name: str, suite: Suite, out: Path, *, trace_limit: int = 0
) -> SuiteResult | None:
    """Evaluate a model behind an OpenAI-compatible server.

    Raises RunFailed when the server goes away or refuses; the answers that came are kept.
    """
    client = ChatClient(url=url, model=name)
    tasks = load_tasks(suite)
    from nrt_jax.evaluation.server_lm import ServerLM

    with _answers(out, {"model": name, "url": url}) as answers:
        lm = ServerLM(client, answers, seed=suite.seed, trace_limit=trace_limit)
        try:
            result = _evaluate(lm, tasks, suite, name, is_chat=True)
        except (ServerGone, ServerRefused) as error:
            raise RunFailed(
                f"{error}; the {len(answers)} answers that came are kept in {out}, and the same "
                "command goes on"
            ) from error
    return _written(result, out)


def _answers(out: Path, identity: dict[str, Any]) -> AnswerLog:
    if distributed.is_first():
        check_identity(out, identity)
    return AnswerLog(out / ANSWERS, writable=distributed.is_first())


def _identity(asked: AskedModel) -> dict[str, Any]:
    """What decides the answers besides the requests and their settings."""
    config, tokenizer = asked.config, asked.tokenizer
    vocabulary = tokenizer.backend.to_str()
    return {
        "weights": _digest(json.dumps(fingerprints(asked.params), sort_keys=True)),
        "tokenizer": _digest(vocabulary),
        "template": _digest(template_text(config.data, tokenizer) or "plain"),
        "add_bos": config.data.add_bos,
        "reasons": asked.reasons,
        "stop_tokens": config.rollout.stop_tokens,
        "dtype": config.model.dtype,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _evaluate(
    lm: "LoggedLM", tasks: dict[str, "Task"], suite: Suite, name: str, *, is_chat: bool
) -> _Evaluated | None:
    """Ask and grade; None for a process that only computes."""
    with _quiet():
        if not distributed.is_first():
            _only_ask(lm, tasks, suite.limit, is_chat=is_chat)
            return None
        scores = _score_documents(lm, tasks, suite.limit, is_chat=is_chat)
    result = SuiteResult(
        model=name,
        settings=_settings_digest(lm, tasks),
        limit=suite.limit,
        tasks=tuple(_row(task, [s for s in scores if s.task == task]) for task in tasks),
    )
    return result, scores


def _written(
    evaluated: _Evaluated | None, out: Path, base: str | None = None
) -> SuiteResult | None:
    if evaluated is None:
        return None
    result, scores = evaluated
    result = replace(result, base=base)
    write_results(out, result, scores)
    return result


def _row(task: str, scores: Sequence[DocumentScore]) -> TaskResult:
    benchmark = BENCHMARKS[task]
    return summarise(
        task=task,
        title=benchmark.title,
        metric=benchmark.metric,
        average=benchmark.average,
        scores=scores,
        headline=benchmark.headline,
    )


def _settings_digest(lm: "LoggedLM", tasks: dict[str, "Task"]) -> str:
    versions = {name: str(task.VERSION) for name, task in tasks.items()}
    return answer_key(lm.seed, lm.settings(), versions, version("lm_eval"))


def _score_documents(
    lm: "LoggedLM", tasks: dict[str, "Task"], limit: int | None, *, is_chat: bool
) -> list[DocumentScore]:
    """Ask and grade all documents by lm-eval."""
    from lm_eval.evaluator import evaluate

    evaluated: Any = evaluate(
        lm,
        {"tasks": tasks},
        limit=limit,
        bootstrap_iters=0,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
        confirm_run_unsafe_code=True,
    )
    return [
        _document_score(lm, task, sample)
        for task, samples in evaluated["samples"].items()
        for sample in samples
        if sample["filter"] == samples[0]["filter"]
    ]


def _document_score(lm: "LoggedLM", task: str, sample: dict[str, Any]) -> DocumentScore:
    rows = [lm.answers[key] for key in lm.keys[task, sample["doc_id"]]]
    return DocumentScore(
        task=task,
        group=sample["doc"]["group"],
        document=sample["doc"]["id"],
        score=float(sample[BENCHMARKS[task].metric]),
        answers=len(rows),
        unclosed=sum(row.unclosed for row in rows),
        truncated=sum(row.truncated for row in rows),
        trace_tokens=sum(row.trace_tokens for row in rows),
        answer_tokens=sum(row.answer_tokens for row in rows),
    )


def _only_ask(
    lm: "LoggedLM", tasks: dict[str, "Task"], limit: int | None, *, is_chat: bool
) -> None:
    """What lm-eval does before it grades: all processes compute the answers, process 0 grades."""
    requests: dict[str, list[Any]] = defaultdict(list)
    for task in tasks.values():
        task.build_all_requests(
            limit=limit,
            apply_chat_template=is_chat,
            fewshot_as_multiturn=is_chat,
            chat_template=lm.apply_chat_template if is_chat else None,
        )
        for instance in task.instances:
            requests[instance.request_type] += [instance] * (instance.repeats or 1)
    for kind, of_kind in requests.items():
        getattr(lm, kind)(of_kind)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's notes and its bars, one per task, which say nothing about the answers."""
    import lm_eval.api.task

    logger, bars = logging.getLogger("lm_eval"), lm_eval.api.task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    lm_eval.api.task.tqdm = lambda documents, **_: documents
    try:
        yield
    finally:
        logger.setLevel(level)
        lm_eval.api.task.tqdm = bars
