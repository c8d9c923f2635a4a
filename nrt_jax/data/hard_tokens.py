"""A built-in task in the paper's regime: long answers in which few tokens are hard.

    x   rain 3 1 4 2 ; key ann 2 1 3 ; coins 7 7 0 5
    z   rain 3 4 8 0 ; key ann cat dan gus ; coins 7 4 4 9
    y*  every night the rain filled 0 jars , as it was every spring , ... . at last the key ...

A question names topics, each with a start and additions modulo 10; names count in the order of
NAMES. The answer has one sentence per topic, the same words every time, with the last total in its
gap. A tiny model cannot add up several numbers at once, but can write the running totals first.

An ordered choice of topics is a template. One template in eight and one choice of numbers in eight
serve evaluation alone, whatever the seed and the lengths.
"""

import hashlib
from itertools import accumulate, cycle, islice

import numpy as np

from nrt_jax.config.hard_tokens import HardTokensConfig
from nrt_jax.types import Example

NAMES = ("ann", "bob", "cat", "dan", "eve", "fay", "gus", "hal", "ida", "joe")
COUNTS = {
    "rain": "every night the rain filled {} jars",
    "coins": "the iron box still holds {} coins",
    "boats": "from here we counted {} small boats",
    "eggs": "this morning the hens left {} eggs",
    "lamps": "after dusk the guard lit {} lamps",
    "miles": "the river road runs on {} miles",
}
"""The sentence of each topic whose value is a digit: seven words."""
PEOPLE = {
    "ball": "after the game {} kept the ball",
    "key": "at last the key went to {}",
    "door": "all day long {} guarded the door",
    "song": "the second song was sung by {}",
    "chair": "the tall chair now belongs to {}",
    "letter": "it was {} who read the letter",
}
"""The sentence of each topic whose value is a name: seven words."""
TOPICS = (*COUNTS, *PEOPLE)
CLAUSES = (
    ", as it was every spring",
    ", and nobody there was surprised",
    ", so the clerk noted it",
    ", which made the miller smile",
    ", though the wind had turned",
    ", before the church bells rang",
    ", while all the children slept",
    ", long after the market closed",
    ", just as travellers had said",
    ", under a sky without clouds",
    ", at the close of spring",
    ", with the gate left open",
)
"""Ends of a sentence, six words each: topic i continues with clause i and those that follow it."""
FILLERS = ("well", "hmm", "so", "then", "perhaps", "maybe", "anyway", "right")
BREAK, NEXT = "|", ";"
"""What separates the parts of a document, and the topics of a question."""
_CORE, _CLAUSE = 8, 6
"""Words of a sentence with its full stop, and of a clause."""
_ONE_IN = 8
_TRAIN_STREAM, _EVAL_STREAM = 0, 1


def words() -> tuple[str, ...]:
    """Every word that questions, traces and answers are made of, in a fixed order."""
    texts = (*COUNTS.values(), *PEOPLE.values(), *CLAUSES)
    fixed = [word for text in texts for word in text.split() if word != "{}"]
    every = [*map(str, range(10)), *NAMES, *TOPICS, BREAK, NEXT, ".", *fixed, *FILLERS]
    return tuple(dict.fromkeys(every))


def is_held_out(text: str) -> bool:
    """Whether a template or a choice of numbers is reserved for evaluation: by its text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _ONE_IN == 0


def worked_steps(question: str) -> str:
    """The running totals of every topic: "rain 3 1 4 2" → "rain 3 4 8 0"."""
    return f" {NEXT} ".join(map(_worked, question.split(f" {NEXT} ")))


def answer_to(task: HardTokensConfig, question: str) -> str:
    """One sentence per topic, with its last total."""
    parts = worked_steps(question).split(f" {NEXT} ")
    per_sentence = task.answer_tokens / task.values
    clauses = max(0, round((per_sentence - _CORE) / _CLAUSE))
    return " ".join(_sentence(part.split()[0], part.split()[-1], clauses) for part in parts)


def row(task: HardTokensConfig, seed: int, index: int) -> Example:
    """Training row `index` of the task: a question with its answer."""
    question = _question(task, np.random.default_rng((seed, _TRAIN_STREAM, index)), held_out=False)
    return Example(index, question, answer_to(task, question))


def document(task: HardTokensConfig, seed: int, index: int) -> Example:
    """Training row `index` of the plain documents that the shipped base model learns from.

    The answer is the rest of the document, "| {z} | {answer}", in which z is the worked steps,
    nothing, filler words, or a copied piece of the question.
    """
    rng = np.random.default_rng((seed, _TRAIN_STREAM, index))
    question = _question(task, rng, held_out=False)
    return Example(index, question, _document_rest(task, question, rng, index))


def evaluation_examples(task: HardTokensConfig, count: int, *, documents: bool) -> list[Example]:
    """`count` different questions of held-out templates and numbers, the same for every seed."""
    rng = np.random.default_rng((0, _EVAL_STREAM))
    questions: dict[str, None] = {}
    while len(questions) < count:
        questions[_question(task, rng, held_out=True)] = None
    if not documents:
        return [Example(i, text, answer_to(task, text)) for i, text in enumerate(questions)]
    # Past the curriculum: evaluation documents follow the mixture.
    return [
        Example(i, text, _document_rest(task, text, rng, task.worked_rows + i))
        for i, text in enumerate(questions)
    ]


def _question(task: HardTokensConfig, rng: np.random.Generator, *, held_out: bool) -> str:
    template = [TOPICS[i] for i in rng.permutation(len(TOPICS))[: task.values]]
    while is_held_out(" ".join(template)) != held_out:
        template = [TOPICS[i] for i in rng.permutation(len(TOPICS))[: task.values]]
    size = (task.values, task.hops + 1)
    numbers = rng.integers(10, size=size)
    while is_held_out(" ".join(map(str, numbers.ravel()))) != held_out:
        numbers = rng.integers(10, size=size)
    chains = zip(template, numbers.tolist(), strict=True)
    return f" {NEXT} ".join(
        " ".join((topic, _spelled(topic, start), *map(str, steps)))
        for topic, (start, *steps) in chains
    )


def _spelled(topic: str, value: int) -> str:
    return NAMES[value] if topic in PEOPLE else str(value)


def _worked(chain: str) -> str:
    topic, start, *steps = chain.split()
    first = NAMES.index(start) if topic in PEOPLE else int(start)
    totals = accumulate(map(int, steps), initial=first)
    return " ".join((topic, *(_spelled(topic, total % 10) for total in totals)))


def _sentence(topic: str, value: str, clauses: int) -> str:
    core = {**COUNTS, **PEOPLE}[topic].format(value)
    first = TOPICS.index(topic)
    ends = islice(cycle(CLAUSES), first, first + clauses)
    return " ".join((core, *ends, "."))


def _document_rest(
    task: HardTokensConfig, question: str, rng: np.random.Generator, index: int
) -> str:
    shares = (task.worked_share, task.nothing_share, task.noise_share, task.copy_share)
    kind = rng.choice(("worked", "nothing", "noise", "copy"), p=np.array(shares) / sum(shares))
    asked = question.split()
    if index < task.worked_rows or kind == "worked":
        reasoning = worked_steps(question)
    elif kind == "nothing":
        reasoning = ""
    elif kind == "noise":
        length = rng.integers(1, len(asked), endpoint=True)
        reasoning = " ".join(rng.choice(list(FILLERS), size=length))
    else:
        start = rng.integers(len(asked))
        end = rng.integers(start + 1, len(asked), endpoint=True)
        reasoning = " ".join(asked[start:end])
    return " ".join(filter(None, (BREAK, reasoning, BREAK, answer_to(task, question))))
