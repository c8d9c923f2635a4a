"""Training rows that ask a question of a benchmark, found by the n-grams that both share.

The rule of tulu-3 (arXiv 2411.15124; `decontamination/search.py` of open-instruct): a
word of a benchmark question matches a training prompt when it stands in a run of n = 8 words that
also stands in the prompt, and the prompt is contaminated when more than half of the question's
words match:

    question   a b c d e f g h i j      n = 4
    prompt     x a b c d e y h i j      abcd, bcde
    matched    a b c d e                5 of 10 words: not more than half

With n = 13 and a share of 0 it is the rule of GPT-3 (arXiv 2005.14165): any run that
both have. Here words are runs of letters and digits in lower case. A question of fewer than n words
has no run, and is matched by a last turn of the user that is the same but for case, white space and
the punctuation at its end.
"""

import re
from array import array
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64

from nrt_jax.config.data import DataConfig
from nrt_jax.config.rows import Benchmark
from nrt_jax.data.bad_rows import BadRow, BadRows, LeftOut
from nrt_jax.data.chat_template import Messages
from nrt_jax.data.row_tokens import last_user_turn, read_conversation
from nrt_jax.data.training_rows import benchmark_source, naming_benchmarks, read_source

IN_BENCHMARK = "question of a benchmark"
_NAMED = "(data.contamination)"
_WORD = re.compile(r"[^\W_]+")

# N: n-grams, W: words of all questions, Q: questions.


class Contamination:
    """The questions of the config's benchmarks, against which prompts are compared.

    16 bytes per n-gram and the places of the questions stay in memory. Raises InputError for
    benchmark files that cannot be read.
    """

    def __init__(self, config: DataConfig):
        self._ngram, self._share = config.contamination_ngram, config.contamination_share
        self._vocabulary: dict[str, int] = {}
        self._whole: dict[str, int] = {}
        """Numbers of the questions that are too short for a run, by their words."""
        self._places: list[str] = []
        words, starts = array("q"), array("q", [0])
        for benchmark in config.contamination:
            for place, question in _questions(config, benchmark):
                of_question = _words(question)
                if len(of_question) < self._ngram:
                    self._whole.setdefault(_whole(question), len(self._places))
                ids = (self._vocabulary.setdefault(w, len(self._vocabulary)) for w in of_question)
                words.extend(ids)
                starts.append(len(words))
                self._places.append(place)
        self._starts_Q = np.array(starts[:-1], np.int64)
        self._lengths_Q = np.diff(np.array(starts, np.int64))
        random = np.random.default_rng(0)
        # The last key is that of words that no question has.
        keys = random.integers(2**64, size=len(self._vocabulary) + 1, dtype=np.uint64)
        self._keys, self._factors = keys, random.integers(2**64, size=self._ngram, dtype=np.uint64)
        self._factors |= np.uint64(1)
        self._index = self._build(np.array(words, np.int64))

    def find(self, messages: Messages) -> LeftOut | None:
        """Why to leave out a row with these turns before its answer; None for a clean one."""
        same = self._whole.get(_whole(last_user_turn(messages)))
        if same is not None:
            return LeftOut(IN_BENCHMARK, f"asks the question of {self._places[same]} {_NAMED}")
        unknown = len(self._vocabulary)
        text = "\n".join(turn["content"] for turn in messages)
        ids = np.array([self._vocabulary.get(w, unknown) for w in _words(text)], np.int64)
        match = self._best(self._hashes(ids))
        if match is None or match.share <= self._share:
            return None
        return LeftOut(
            IN_BENCHMARK,
            f"{match.share:.0%} of the words of {self._places[match.question]} {_NAMED} stand in "
            f"the prompt in runs of {self._ngram}",
        )

    def _hashes(self, ids_W: Int64[np.ndarray, "W"]) -> UInt64[np.ndarray, "N"]:
        """A hash of each run of n words; equal runs have equal hashes, on every machine."""
        count = max(0, len(ids_W) - self._ngram + 1)
        hashes_N = np.zeros(count, np.uint64)
        keys_W = self._keys[ids_W]
        for i, factor in enumerate(self._factors):
            hashes_N += keys_W[i : i + count] * factor
        return hashes_N

    def _build(self, ids_W: Int64[np.ndarray, "W"]) -> "_Index":
        hashes_N = self._hashes(ids_W)
        ends_W = np.repeat(self._starts_Q + self._lengths_Q, self._lengths_Q)
        first_words_N = np.arange(len(hashes_N))
        within = first_words_N + self._ngram <= ends_W[: len(hashes_N)]
        hashes_N, first_words_N = hashes_N[within], first_words_N[within]
        order = np.argsort(hashes_N, kind="stable")
        return _Index(hashes_N[order], first_words_N[order])

    def _best(self, hashes: UInt64[np.ndarray, "_"]) -> "_Match | None":
        """The question of which the largest share of words stands in these n-grams."""
        left = np.searchsorted(self._index.hashes_N, hashes, "left")
        right = np.searchsorted(self._index.hashes_N, hashes, "right")
        found = np.flatnonzero(right > left)
        if not len(found):
            return None
        entries = np.concatenate([np.arange(left[i], right[i]) for i in found])
        first_words = self._index.first_words_N[entries]
        words = np.unique(first_words[:, None] + np.arange(self._ngram))
        of_word = np.searchsorted(self._starts_Q, words, "right") - 1
        questions, counts = np.unique(of_word, return_counts=True)
        shares = counts / self._lengths_Q[questions]
        best = int(np.argmax(shares))
        return _Match(int(questions[best]), float(shares[best]))


class _Index(NamedTuple):
    """The n-grams of all questions in the order of their hashes."""

    hashes_N: UInt64[np.ndarray, "N"]
    first_words_N: Int64[np.ndarray, "N"]
    """Position of the first word among the words of all questions."""


class _Match(NamedTuple):
    question: int
    share: float
    """Of the question's words."""


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


def _whole(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .:?!")


def _questions(config: DataConfig, benchmark: Benchmark) -> Iterator[tuple[str, str]]:
    """Place and text of each question; rows without one count as those of training do."""
    source = benchmark_source(config, benchmark)
    assert source.path is not None, "Benchmark requires a path"
    bad, good = BadRows(source.location), 0
    with naming_benchmarks():
        for row in read_source(source, source.path):
            try:
                if isinstance(row.fields, BadRow):
                    raise row.fields
                messages, _ = read_conversation(source, row.fields)
            except BadRow as error:
                bad.add(row.place, error, file=row.file, fields=row.fields)
                continue
            good += 1
            yield f"{row.file} {row.place_in_file}", last_user_turn(messages)
        bad.check(good, config.max_bad_share)
