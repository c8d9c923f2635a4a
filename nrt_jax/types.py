"""The nouns that flow through a run: Example → TokenizedExample → Trace → Group."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


@dataclass(frozen=True)
class Example:
    """One question with its reference answer, as text."""

    index: int
    """Row number in its source, from 0; it names the example in keys, logs and samples."""
    question: str
    """x: what the model sees before it reasons, after the prompt template."""
    answer: str
    """y*: the reference answer, without the end-of-sequence token."""
    aliases: tuple[str, ...] = ()
    """Other answers that are right; an evaluation accepts them, and nothing is trained on them."""
    user_text: str = ""
    """What the last user turn says, for people to read; empty where x is that text."""
    source: str = ""
    """Name of its source: that in the mixture, that which its row names, or both with a slash;
    empty where there is neither."""


@dataclass(frozen=True)
class TokenizedExample:
    """An example as token ids."""

    example: Example
    prompt_tokens: np.ndarray
    """x, int32, BOS included where the tokenizer has one; t_start is never part of it."""
    answer_tokens: np.ndarray
    """y* and the end-of-sequence token, int32; its length is the T of the method."""
    after_start_tokens: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """White space that a chat template writes after t_start, int32; the trace follows it."""

    def trace_prompt(self, think_start: int) -> np.ndarray:
        """What a trace follows, int32: x t_start and the template's white space."""
        parts = [self.prompt_tokens, [think_start], self.after_start_tokens]
        return np.concatenate(parts).astype(np.int32)


@dataclass(frozen=True)
class Trace:
    """One sampled continuation, as the engine drew it: ids are never decoded and re-encoded."""

    tokens: np.ndarray
    """Sampled ids, int32, without the special token that ended them."""
    logprobs: np.ndarray
    """log pi(token | before), float32 nats, of the distribution that was sampled from."""
    end_token: int | None
    """The special token that ended the trace; None when the limit did."""
    end_logprob: float
    """log pi of end_token in nats; 0.0 when end_token is None."""


@dataclass(frozen=True)
class Group:
    """One example with the K traces sampled for it."""

    example: TokenizedExample
    traces: tuple[Trace, ...]
    version: int = 0
    """Step whose update made the weights that drew the traces; 0: those before the first."""
    log_c_KA: np.ndarray | None = None
    """log c of y* after each trace under the weights that drew it, float32; None: not scored."""
    log_c_base_A: np.ndarray | None = None
    """log c of y* after the empty trace under the same weights; None: not scored."""


def reward_sources(traces: Sequence[Trace]) -> list[int]:
    """From whose log c the reward of each trace comes: 0 the empty trace's, k + 1 those of trace k.

    Equal traces have equal rewards. Computed for each of them, log c would differ by rounding,
    which a group of otherwise equal rewards would scale up to advantages of 1. So a trace takes
    those of the first one that has the same tokens, and an empty one those of the baseline:

        traces   (5 7)   ()   (5 7)   (5)
        sources  1       0    1       4
    """
    first = {b"": 0}
    return [first.setdefault(trace.tokens.tobytes(), k) for k, trace in enumerate(traces, 1)]


class SuffixLogprobs(NamedTuple):
    """log pi of suffix_tokens[1:], in nats, after each sample and after the empty trace."""

    samples_KA: Float[np.ndarray, "K A"]
    empty_A: Float[np.ndarray, "A"]

    def of_equal_traces(self, traces: Sequence[Trace]) -> "SuffixLogprobs":
        """The same, equal to the bit after equal traces: see `reward_sources`."""
        every_KA = np.concatenate([self.empty_A[None], self.samples_KA])
        return self._replace(samples_KA=every_KA[reward_sources(traces)])
