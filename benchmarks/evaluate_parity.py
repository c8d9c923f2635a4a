"""Are our answers to benchmarks those of `lm_eval --model hf` on torch?

    python -m benchmarks.evaluate_parity MODEL --data DIR [--tasks gsm8k,bbh] [--documents 20]

Greedy, in float32. An answer of ours is run through torch once, behind the prompt that lm-eval's
own model builds: if every token is torch's most probable one after those before it, torch's greedy
answer is the same. Where the logit of our token is within TIE of the highest, the two are taken as
tied. Given answers (mc2) are scored by both.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

TIE = 1e-4
"""Logits that differ by no more are tied."""
GENERATIVE = ("gsm8k", "mmlu", "bbh", "drop", "popqa", "math", "humaneval", "ifeval")
SCORED = "truthfulqa"


class Compared(NamedTuple):
    """Answers to one task."""

    task: str
    documents: int
    equal_prompts: int
    equal_answers: int
    """Without those in which logits tied."""
    ties: int
    equal_scores: int
    tokens: int


def transformers_lm(path: Path, *, batch_size: int) -> Any:
    """`lm_eval --model hf`, in float32 on the CPU."""
    from lm_eval.models.huggingface import HFLM

    make: Any = HFLM  # its decorator hides the arguments
    return make(pretrained=str(path), dtype="float32", device="cpu", batch_size=batch_size)


class Reference:
    """lm-eval's model for transformers."""

    def __init__(self, path: Path):
        self.lm = transformers_lm(path, batch_size=8)

    def requests(self, task: Any, limit: int) -> list[Any]:
        """The requests of a task with the prompts of this model."""
        task.build_all_requests(
            limit=limit,
            apply_chat_template=True,
            fewshot_as_multiturn=True,
            chat_template=self.lm.apply_chat_template,
        )
        return list(task.instances)

    def prompt(self, context: str) -> list[int]:
        """As `generate_until` encodes it."""
        ids, _ = self.lm.tok_batch_encode([context])
        return ids[0].tolist()

    def logits_behind(self, prompt: Sequence[int], count: int) -> np.ndarray:
        """Logits of the last `count` tokens of a sequence and of the one before them."""
        import torch

        with torch.inference_mode():
            logits = self.lm.model(torch.tensor([prompt]), logits_to_keep=count + 1).logits
        return logits[0].float().numpy()

    def text(self, ids: Sequence[int], until: Sequence[str]) -> str:
        """What `generate_until` makes of the ids that it drew."""
        from lm_eval.models.utils import handle_stop_sequences, postprocess_generated_text

        eos = self.lm.tok_decode(self.lm.eot_token_id, skip_special_tokens=False)
        stops = handle_stop_sequences(list(until), eos=eos)
        return postprocess_generated_text(self.lm.tok_decode(list(ids)), stops, None)


def compare_answers(model: Any, reference: Reference, task: Any, limit: int) -> Compared:
    """Our greedy answers to a task's first documents against torch's."""
    from nrt_jax.evaluation.contexts import of_conversation
    from nrt_jax.evaluation.requests import asked_answers

    def as_text(turns: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return of_conversation(turns, opens_answer=add_generation_prompt).to_text()

    theirs = reference.requests(task, limit)
    task.build_all_requests(
        limit=limit, apply_chat_template=True, fewshot_as_multiturn=True, chat_template=as_text
    )
    asked = asked_answers(list(task.instances), 0)
    prompts = answers = ties = scores = tokens = 0
    for index, answered in model.answer(asked):
        request, mine = theirs[index], asked[index]
        prompt, ids = reference.prompt(request.args[0]), answered.answer.tokens.tolist()
        prompts += prompt == model.contexts.prompt(mine.context).tolist()
        ended = [] if answered.answer.end_token is None else [answered.answer.end_token]
        behind = _behind(
            reference.logits_behind(prompt + ids + ended, len(ids + ended)), ids + ended
        )
        text = reference.text(ids, mine.drawing.until)
        equal = bool((behind == 0).all()) and text == answered.text
        tied = not equal and bool((behind <= TIE).all())
        answers, ties, tokens = answers + equal, ties + tied, tokens + len(ids)
        scores += _score(task, request.doc, text) == _score(task, request.doc, answered.text)
    return Compared(
        task=task.config.task,
        documents=len(theirs),
        equal_prompts=prompts,
        equal_answers=answers,
        ties=ties,
        equal_scores=scores,
        tokens=tokens,
    )


def _behind(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """How far the logit of each id is behind the highest at its position."""
    at = logits[: len(ids)]
    return at.max(-1) - at[np.arange(len(ids)), list(ids)]


def _score(task: Any, doc: Any, text: str) -> Any:
    """Of one answer; HumanEval's pass@10 needs ten, which are equal."""
    return task.process_results(doc, [[text] * 10 if task.config.task == "humaneval" else text])


def compare_scores(lm: Any, reference: Reference, task: Any, limit: int) -> tuple[int, float]:
    """How many given answers were scored, and the largest difference of their log-likelihoods.

    lm-eval counts white space at the end of a prompt as the answer's: the line break after the
    template's header. It is subtracted, since no choice of the model lies in it.
    """
    theirs = reference.requests(task, limit)
    scored = [ll for ll, _ in reference.lm.loglikelihood(theirs, disable_tqdm=True)]
    contexts = list(dict.fromkeys(request.args[0] for request in theirs))
    spaces = reference.lm.loglikelihood(
        [_Pair(context.rstrip(), context[len(context.rstrip()) :]) for context in contexts],
        disable_tqdm=True,
    )
    of_space = {context: ll for context, (ll, _) in zip(contexts, spaces, strict=True)}
    task.build_all_requests(
        limit=limit,
        apply_chat_template=True,
        fewshot_as_multiturn=True,
        chat_template=lm.apply_chat_template,
    )
    ours = [ll for ll, _ in lm.loglikelihood(list(task.instances))]
    differences = [
        abs(mine - (their - of_space[request.args[0]]))
        for mine, their, request in zip(ours, scored, theirs, strict=True)
    ]
    return len(ours), max(differences)


class _Pair(NamedTuple):
    context: str
    continuation: str

    @property
    def args(self) -> tuple[str, str]:
        """As lm-eval's Instance has them."""
        return (self.context, self.continuation)


def make_greedy(task: Any, max_tokens: int | None) -> None:
    """One greedy answer per document, of at most so many tokens."""
    settings = {"do_sample": False, "temperature": 0.0}
    if max_tokens is not None:
        settings["max_gen_toks"] = min(max_tokens, task.config.generation_kwargs["max_gen_toks"])
    task.set_config("generation_kwargs", settings, update=True)
    task.set_config("repeats", 1)


def main() -> None:
    """Compare and print a line per task; the last line is JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--tasks", default=",".join((*GENERATIVE, SCORED)))
    parser.add_argument("--documents", type=int, default=20)
    parser.add_argument("--max-answer-tokens", type=int, help="a lower limit than the tasks'")
    args = parser.parse_args()
    results = compare(
        args.model,
        args.data,
        args.tasks.split(","),
        documents=args.documents,
        max_tokens=args.max_answer_tokens,
    )
    print(json.dumps(results))


def compare(
    path: Path, data: Path, names: Sequence[str], *, documents: int, max_tokens: int | None = None
) -> list[dict[str, Any]]:
    """The comparison of each task, printed as it is made."""
    import tempfile

    from nrt_jax.checkpoints.open import open_model
    from nrt_jax.evaluation.answer_log import AnswerLog
    from nrt_jax.evaluation.asked_model import AskedModel
    from nrt_jax.evaluation.lm import EngineLM
    from nrt_jax.evaluation.suite import Suite, load_tasks

    tasks = load_tasks(Suite(tasks=tuple(names), data=data))
    model, reference = AskedModel.of(open_model(path, ["model.dtype=float32"])), Reference(path)
    results: list[dict[str, Any]] = []
    for name, task in tasks.items():
        if name == SCORED:
            with tempfile.TemporaryDirectory() as folder, AnswerLog(Path(folder)) as answers:
                count, most = compare_scores(EngineLM(model, answers), reference, task, documents)
            results.append({"task": name, "given_answers": count, "largest_difference": most})
        else:
            make_greedy(task, max_tokens)
            results.append(compare_answers(model, reference, task, documents)._asdict())
        print(results[-1], flush=True)
    return results


if __name__ == "__main__":
    main()
