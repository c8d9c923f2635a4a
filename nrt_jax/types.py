"""The nouns that flow through a run: Example → TokenizedExample → Trace → Group."""

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
    rewards: np.ndarray | None = None
    """R of each trace under the weights that drew it, float32; None: not scored."""
    baseline: float = 0.0
    """R of the empty trace under the same weights, where there are rewards."""


class SuffixLogprobs(NamedTuple):
    """log pi of suffix_tokens[1:], in nats, after each sample and after the empty trace."""

    samples_KA: Float[np.ndarray, "K A"]
    empty_A: Float[np.ndarray, "A"]
