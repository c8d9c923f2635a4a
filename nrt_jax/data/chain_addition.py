"""The quickstart's task: "3+1+4+0+2+2+1" → "=3", digits added modulo 5 from left to right.

A tiny model cannot answer at once, but can if it first writes the running totals. Questions are
split by a hash of their text: one in eight serves evaluation alone, whatever the seed and the task.
"""

import hashlib
from collections.abc import Callable
from itertools import accumulate

import numpy as np

from nrt_jax.config.data import ChainConfig
from nrt_jax.errors import InputError
from nrt_jax.types import Example

NOISE_SYMBOLS = "@#%&*~"
HELD_OUT_ONE_IN = 8
# The chance that a sound task exhausts this is (7/8)^2000: only a task with too few questions does.
MAX_DRAWS = 2000
TRAIN_STREAM, EVAL_STREAM = 0, 1


def is_held_out(question: str) -> bool:
    """Whether a question is reserved for evaluation: a stable property of its text."""
    digest = hashlib.blake2b(question.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def running_totals(question: str, modulus: int) -> str:
    """The total after each addition: "3+1+4+0+2+2+1" modulo 5 → "433023"."""
    totals = list(accumulate(int(digit) for digit in question.split("+")))
    return "".join(str(total % modulus) for total in totals[1:])


def addition(chain: ChainConfig, seed: int, index: int) -> Example:
    """Training row `index` of the task: a question and "=" with the last running total."""
    question = _training_question(chain, np.random.default_rng((seed, TRAIN_STREAM, index)))
    return Example(index, question, _answer(chain, question))


def document(chain: ChainConfig, seed: int, index: int) -> Example:
    """Training row `index` of the plain documents that the quickstart's base model learns from.

    The answer is the whole rest of the document, "\\n{z}\\n={digit}", in which z is the running
    totals, nothing, symbols without sense, or a copy of a piece of the question.
    """
    rng = np.random.default_rng((seed, TRAIN_STREAM, index))
    question = _training_question(chain, rng)
    return Example(index, question, _document_rest(chain, question, rng, index))


def evaluation_examples(chain: ChainConfig, count: int, *, documents: bool) -> list[Example]:
    """`count` different held-out questions with their answers, the same ones for every seed.

    Raises InputError when the task has too few held-out questions.
    """
    rng = np.random.default_rng((0, EVAL_STREAM))
    questions: dict[str, None] = {}
    for _ in range(count):
        fresh = _draw(chain, rng, lambda text: is_held_out(text) and text not in questions)
        if fresh is None:
            raise InputError(
                f"data.eval_rows: {count} is more than the held-out questions of chain.digits="
                f"{chain.digits} chain.modulus={chain.modulus} (found {len(questions)}); "
                "lower data.eval_rows or raise data.chain.digits"
            )
        questions[fresh] = None
    if not documents:
        return [Example(i, text, _answer(chain, text)) for i, text in enumerate(questions)]
    # Past the curriculum: evaluation documents follow the mixture.
    return [
        Example(i, text, _document_rest(chain, text, rng, chain.totals_rows + i))
        for i, text in enumerate(questions)
    ]


def _training_question(chain: ChainConfig, rng: np.random.Generator) -> str:
    question = _draw(chain, rng, lambda text: not is_held_out(text))
    if question is None:
        raise InputError(
            f"data.chain: digits={chain.digits} modulus={chain.modulus} leaves no question to "
            "train on; raise data.chain.digits"
        )
    return question


def _draw(
    chain: ChainConfig, rng: np.random.Generator, accept: Callable[[str], bool]
) -> str | None:
    """A random question that `accept` takes; None when it takes none of MAX_DRAWS."""
    for _ in range(MAX_DRAWS):
        question = "+".join(map(str, rng.integers(chain.modulus, size=chain.digits)))
        if accept(question):
            return question
    return None


def _answer(chain: ChainConfig, question: str) -> str:
    return "=" + running_totals(question, chain.modulus)[-1]


def _document_rest(chain: ChainConfig, question: str, rng: np.random.Generator, index: int) -> str:
    shares = (chain.totals_share, chain.nothing_share, chain.noise_share, chain.copy_share)
    kind = rng.choice(("totals", "nothing", "noise", "copy"), p=np.array(shares) / sum(shares))
    if index < chain.totals_rows or kind == "totals":
        reasoning = running_totals(question, chain.modulus)
    elif kind == "nothing":
        reasoning = ""
    elif kind == "noise":
        length = rng.integers(1, 2 * chain.digits, endpoint=True)
        reasoning = "".join(rng.choice(list(NOISE_SYMBOLS), size=length))
    else:
        start = rng.integers(len(question))
        reasoning = question[start : rng.integers(start + 1, len(question), endpoint=True)]
    return f"\n{reasoning}\n{_answer(chain, question)}"
