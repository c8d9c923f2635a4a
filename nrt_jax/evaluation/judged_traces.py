"""`nrt-jax judge`: sample traces for held-out questions and let a judge score them (Appendix H).

OUT holds traces.jsonl, judgements.jsonl with every verdict, judge.json with the figures, and the
judge's replies in replies/.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from nrt_jax.atomic_files import write_atomically
from nrt_jax.checkpoints.fingerprint import fingerprints
from nrt_jax.checkpoints.open import OpenModel, open_model
from nrt_jax.config.run import RunConfig
from nrt_jax.data.detokenizer import decode_after
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.engine.generate import generate
from nrt_jax.engine.make import trace_engine
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.evaluation.answer_log import answer_key, check_identity
from nrt_jax.evaluation.chat_client import ChatClient, ServerGone, ServerRefused
from nrt_jax.evaluation.held_out import check_has_questions, end_name
from nrt_jax.evaluation.judge import PROMPT, ROWS, SUMMARY_FILE, Judge, Judged, Verdict
from nrt_jax.evaluation.results import mean, standard_error
from nrt_jax.types import TokenizedExample

log = logging.getLogger(__name__)

TRACES_FILE, JUDGEMENTS_FILE = "traces.jsonl", "judgements.jsonl"
REPLIES = "replies"


def judge_model(
    path: Path,
    client: ChatClient,
    out: Path,
    *,
    rows: int = ROWS,
    seed: int = 0,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Judge a model's traces for held-out questions that `seed` draws; the content of judge.json.

    The same call goes on: traces are sampled once, and no reply is asked for twice. Raises
    InputError for a model without traces or questions, and RunFailed for a judge that goes away or
    whose replies hold no score at all; what came so far is kept.
    """
    check_has_questions(path, overrides)
    opened = open_model(path, overrides)
    if not opened.reasons:
        raise InputError(
            f"{path}: answers without a trace (method {opened.config.method}), so there is nothing "
            "to judge; name a model of method nrt"
        )
    name = f"{opened.name} ({opened.description})"
    check_identity(out, _identity(opened, client, rows, seed))
    records = _traces(opened, out / TRACES_FILE, rows, seed)
    verdicts = _verdicts(client, records, out)
    lines = [
        record | {"outcome": verdict.outcome, "score": verdict.score} | _said(verdict)
        for record, verdict in zip(records, verdicts, strict=True)
    ]
    _write_lines(out / JUDGEMENTS_FILE, lines)
    summary = {
        "model": name,
        "step": opened.step,
        "judge": client.model,
        "prompt": answer_key(PROMPT),
    }
    summary |= {"seed": seed, **summarise_verdicts(records, verdicts)}
    write_atomically(out / SUMMARY_FILE, (json.dumps(summary, indent=1) + "\n").encode())
    if summary["scored"] == 0:
        shown = " ".join(verdicts[0].replies[-1].split())[:80]
        raise RunFailed(
            f"judge {client.model}: none of {len(verdicts)} replies holds a score, such as "
            f"{shown!r}; {out / JUDGEMENTS_FILE} has them, name another judge"
        )
    return summary


def summarise_verdicts(
    records: Sequence[dict[str, Any]], verdicts: Sequence[Verdict]
) -> dict[str, Any]:
    """Figures over traces with their verdicts.

    `quality` is the mean score, 0 to 1, over `scored` traces, with its standard error `stderr`;
    both are null without one. `refused` and `unreadable` are not part of it. `flags` counts traces.
    """
    scores = [verdict.score for verdict in verdicts if verdict.score is not None]
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    flags = Counter(flag for verdict in verdicts for flag in dict.fromkeys(verdict.flags))
    return {
        "traces": len(verdicts),
        "quality": mean(scores) if scores else None,
        "stderr": standard_error(scores) if scores else None,
        **{name: outcomes[name] for name in ("scored", "refused", "unreadable")},
        "unclosed": sum(not record["closed"] for record in records),
        "mean_trace_tokens": mean([float(record["trace_tokens"]) for record in records]),
        "flags": dict(sorted(flags.items(), key=lambda item: (-item[1], item[0]))),
    }


def summary_line(summary: dict[str, Any]) -> str:
    """What the verb prints."""
    error = "" if summary["stderr"] is None else f" ± {summary['stderr']:.3f}"
    return (
        f"{summary['model']}: quality {summary['quality']:.3f}{error} by {summary['judge']}; "
        f"{summary['scored']} of {summary['traces']} traces scored, {summary['refused']} refused, "
        f"{summary['unreadable']} replies unreadable"
    )


def _identity(opened: OpenModel, client: ChatClient, rows: int, seed: int) -> dict[str, Any]:
    """What decides the traces and their verdicts."""
    config = opened.config
    return {
        "weights": answer_key(fingerprints(opened.params)),
        "questions": answer_key(config.data.model_dump(mode="json")),
        "trace_temperature": config.evaluation.trace_temperature,
        "max_trace_tokens": config.rollout.max_trace_tokens,
        "rows": rows,
        "seed": seed,
        "judge": client.model,
    }


def _traces(opened: OpenModel, file: Path, rows: int, seed: int) -> list[dict[str, Any]]:
    """The traces in the file, or new ones for questions that the seed draws."""
    if file.exists():
        return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
    examples = _draw(opened.config, opened, rows, seed)
    config, tokenizer = _engine_config(opened, len(examples)), opened.tokenizer
    engine = trace_engine(config, opened.model, tokenizer, num_samples=1)
    prompts = [example.trace_prompt(tokenizer.think_start_id) for example in examples]
    sampling = Sampling(config.evaluation.trace_temperature)
    requests = [
        Request(prompt, index, 1, config.rollout.max_trace_tokens, sampling)
        for index, prompt in enumerate(prompts)
    ]
    groups = generate(
        engine,
        opened.params,
        requests,
        jax.random.key(seed),
        steps=config.rollout.decode_steps,
    )
    records = [
        {
            "index": example.example.index,
            "problem": example.example.user_text or example.example.question,
            "reasoning": decode_after(tokenizer, prompt, trace.tokens),
            "ground_truth": example.example.answer,
            "trace_tokens": len(trace.tokens),
            "trace_end": end_name(tokenizer, trace),
            "closed": trace.end_token == tokenizer.think_end_id,
        }
        for example, prompt, (trace,) in zip(examples, prompts, groups, strict=True)
    ]
    _write_lines(file, records)
    return records


def _draw(config: RunConfig, opened: OpenModel, rows: int, seed: int) -> list[TokenizedExample]:
    held_out = load_dataset(config.data, opened.tokenizer).eval
    if not held_out:
        raise InputError(
            "data.eval_rows=0: there are no held-out rows to judge; set data.eval_rows or "
            "data.eval_path"
        )
    if len(held_out) < rows:
        log.warning("%d held-out rows, not %d: there are no more", len(held_out), rows)
        return held_out
    drawn = np.random.default_rng(seed).choice(len(held_out), rows, replace=False)
    return [held_out[index] for index in sorted(drawn)]


def _engine_config(opened: OpenModel, questions: int) -> RunConfig:
    """The config for weights as they were read, with as many slots as there are questions."""
    config, devices = opened.config, opened.model.mesh.size
    slots = -(-min(config.rollout.slots, questions) // devices) * devices
    update = {"slots": slots, "dtype": None, "cache_dtype": None}
    return config.model_copy(update={"rollout": config.rollout.model_copy(update=update)})


def _verdicts(client: ChatClient, records: Sequence[dict[str, Any]], out: Path) -> list[Verdict]:
    judged = [Judged(r["problem"], r["reasoning"], r["ground_truth"]) for r in records]
    judge, found = Judge(client, out / REPLIES), dict[int, Verdict]()
    with tqdm(total=len(judged), desc="judging", disable=None) as bar:
        try:
            for index, verdict in judge.verdicts(judged):
                found[index] = verdict
                bar.update()
        except (ServerGone, ServerRefused) as error:
            raise RunFailed(
                f"judge {client.model}: {error}; {judge.kept(judged)} of {len(judged)} verdicts "
                f"are kept in {out}, and the same command goes on"
            ) from error
    return [found[index] for index in range(len(judged))]


def _said(verdict: Verdict) -> dict[str, Any]:
    return {
        "justification": verdict.justification,
        "flags": verdict.flags,
        "replies": verdict.replies,
    }


def _write_lines(file: Path, records: Sequence[dict[str, Any]]) -> None:
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_atomically(file, text.encode(errors="backslashreplace"))
