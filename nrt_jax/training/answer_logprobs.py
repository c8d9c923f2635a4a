"""Logprobs of the answer y* after the prompt x and any context, such as a trace; no gradient.

A row continues x without its last token and begins with that token, so that y* directly after x is
one more context. With x = (x1 x2 x3), z = (z1 z2), y* = (y1 eos):

    prompt      x1 x2
    row         x3       t_start  z1     z2     t_end  y1   eos
    input       x3       t_start  z1     z2     t_end  y1
    target      t_start  z1       z2     t_end  y1     eos

A pack holds several prompts in one row and completions of them in another, as in packing.py.
Letters: B packs, S tokens of a row of prompts, W tokens of a row of completions, A answer tokens,
T trace tokens; p is the index of an example, c that of a context.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from nrt_jax.models.logprobs import TokenLogprobs
from nrt_jax.models.rows import TokenRows
from nrt_jax.models.sharding import batch_sharding, place, replicated
from nrt_jax.objective.rewards import padded_length
from nrt_jax.training.batch import CompletionRows, PromptRows, write_text
from nrt_jax.training.forward import NrtSettings, score_rows
from nrt_jax.types import TokenizedExample

SHORTEST_ROW = 256
"""Tokens of the rows, unless a prompt or an answer with its context has more: scores of short texts
and of somewhat longer ones share one compiled program."""


class Context(NamedTuple):
    """What stands between x and y*."""

    before: Int[np.ndarray, "before"]
    """Tokens before the trace."""
    trace: Int[np.ndarray, "T"]
    after: Int[np.ndarray, "after"]
    """Tokens after the trace."""

    @property
    def tokens(self) -> Int[np.ndarray, "context"]:
        """All of them."""
        return np.concatenate(self)


class ContextLogprobs(NamedTuple):
    """What one row gives, in nats."""

    answer_A: Float[np.ndarray, "A"]
    """log pi(y*_i | x, context, y*_<i)."""
    answer_entropy_A: Float[np.ndarray, "A"]
    """Of the distribution over the vocabulary that each answer token is one value of."""
    entropy_T: Float[np.ndarray, "T"]
    """Of the distribution that each trace token is sampled from."""


class AnswerLogprobs(NamedTuple):
    """Scores answers after contexts, in packs of one row of prompts and one of completions."""

    settings: NrtSettings
    mesh: Mesh
    packs: int
    """Packs whose activations exist at once; a multiple of the devices that rows are split over."""

    def __call__(
        self,
        params: Any,
        examples: Sequence[TokenizedExample],
        contexts: Sequence[Sequence[Context]],
    ) -> list[list[ContextLogprobs]]:
        """The logprobs of every example's answer after each of its contexts."""
        S, W = self._sizes(examples, contexts)
        scored: list[list[Any]] = [[None] * len(of_example) for of_example in contexts]
        packs = _pack(examples, contexts, S, W)
        for start in range(0, len(packs), self.packs):
            chosen = packs[start : start + self.packs]
            arrays = _arrays(chosen, examples, contexts, (self.packs, S, W))
            arrays = place(arrays, batch_sharding(self.mesh))
            of_rows = answer_logprobs(params, *arrays, settings=self.settings, mesh=self.mesh)
            result = jax.device_get(of_rows)
            for row, pack in enumerate(chosen):
                for p, c, first in pack.places:
                    context, answer = contexts[p][c], len(examples[p].answer_tokens)
                    # The target of input i is token i + 1, and the first input is x's last token.
                    y, z = first + len(context.tokens), first + len(context.before)
                    scored[p][c] = ContextLogprobs(
                        answer_A=result.logprob_BT[row, y : y + answer],
                        answer_entropy_A=result.entropy_BT[row, y : y + answer],
                        entropy_T=result.entropy_BT[row, z : z + len(context.trace)],
                    )
        return scored

    def _sizes(
        self, examples: Sequence[TokenizedExample], contexts: Sequence[Sequence[Context]]
    ) -> tuple[int, int]:
        """Tokens of a pack's row of prompts, and of its row of completions."""
        shards = self.mesh.shape["context"]
        prompt = max(len(example.prompt_tokens) - 1 for example in examples)
        completion = max(
            len(context.tokens) + len(example.answer_tokens)
            for example, of_example in zip(examples, contexts, strict=True)
            for context in of_example
        )
        S, W = (
            -(-padded_length(max(SHORTEST_ROW, n)) // shards) * shards for n in (prompt, completion)
        )
        return S, W


@dataclass
class _Pack:
    """One row of prompts and one of completions."""

    prompts: dict[int, int] = field(default_factory=dict)
    """First token of each example's prompt, by the example's index."""
    places: list[tuple[int, int, int]] = field(default_factory=list)
    """Example, context, and first token of its row."""
    prompt_used: int = 0
    used: int = 0

    def add(self, p: int, c: int, prompt: int, completion: int, sizes: tuple[int, int]) -> bool:
        """Add a completion of so many tokens, and its prompt where it is new; False for no room."""
        more = 0 if p in self.prompts else prompt
        if self.prompt_used + more > sizes[0] or self.used + completion > sizes[1]:
            return False
        if p not in self.prompts:
            self.prompts[p] = self.prompt_used
        self.places.append((p, c, self.used))
        self.prompt_used, self.used = self.prompt_used + more, self.used + completion
        return True


def _pack(
    examples: Sequence[TokenizedExample], contexts: Sequence[Sequence[Context]], S: int, W: int
) -> list[_Pack]:
    """Every completion in the first pack that has room, in order."""
    packs: list[_Pack] = []
    for p, (example, of_example) in enumerate(zip(examples, contexts, strict=True)):
        for c, context in enumerate(of_example):
            # The last token of x is the first input of the completion.
            prompt = len(example.prompt_tokens) - 1
            lengths = (prompt, len(context.tokens) + len(example.answer_tokens))
            if not any(pack.add(p, c, *lengths, (S, W)) for pack in packs):
                packs.append(_Pack())
                assert packs[-1].add(p, c, *lengths, (S, W)), "the sizes hold the longest"
    return packs


def _arrays(
    packs: Sequence[_Pack],
    examples: Sequence[TokenizedExample],
    contexts: Sequence[Sequence[Context]],
    sizes: tuple[int, int, int],
) -> tuple[PromptRows, CompletionRows]:
    """The rows of at most `sizes[0]` packs, of S and of W tokens."""
    B, S, W = sizes
    prompts = PromptRows(*[np.zeros((B, S), np.int32) for _ in range(3)])
    ids = partial(np.zeros, (B, W), np.int32)
    rows = CompletionRows(ids(), ids(), ids(), ids(), ids(), np.zeros((B, W), bool))
    for b, pack in enumerate(packs):
        segments = {p: i for i, p in enumerate(pack.prompts, start=1)}
        for p, start in pack.prompts.items():
            before = examples[p].prompt_tokens[:-1]
            at = (b, slice(start, start + len(before)))
            prompts.tokens_packs_S[at] = before
            prompts.positions_packs_S[at] = np.arange(len(before))
            prompts.segments_packs_S[at] = segments[p]
        for p, c, first in pack.places:
            x, context = examples[p].prompt_tokens, contexts[p][c]
            tokens = np.concatenate([x[-1:], context.tokens, examples[p].answer_tokens])
            at = write_text(rows, (b, first), tokens, position=len(x) - 1)
            rows.prompts_BW[at] = segments[p]
            z = first + len(context.before)
            rows.trace_BW[b, z : z + len(context.trace)] = True
    return prompts, rows


@partial(jax.jit, static_argnames=("settings", "mesh"))
@jax.named_scope("scoring")
def answer_logprobs(
    params: Any, prompts: PromptRows, rows: CompletionRows, *, settings: NrtSettings, mesh: Mesh
) -> TokenLogprobs:
    """log pi of every target of the rows, and the entropy there, as [B, W]."""
    decoder = nnx.merge(settings.definition, params)
    continuations = TokenRows(rows.inputs_BW, rows.positions_BW, rows.segments_BW, rows.prompts_BW)
    _, hidden_BWD = decoder.hidden_of_packs(TokenRows(*prompts), continuations)
    logprobs = score_rows(decoder, settings, hidden_BWD, rows)
    # A process reads only what its own devices hold.
    return jax.lax.with_sharding_constraint(logprobs, replicated(mesh))
