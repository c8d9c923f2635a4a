"""Logprobs of the answer y* after the prompt x and any context, such as a trace; no gradient.

A row continues x without its last token and begins with that token, so that y* directly after x is
one more context. With x = (x1 x2 x3), z = (z1 z2), y* = (y1 eos):

    prompt      x1 x2
    row         x3       t_start  z1     z2     t_end  y1   eos
    input       x3       t_start  z1     z2     t_end  y1
    target      t_start  z1       z2     t_end  y1     eos

Letters: P prompts, C contexts per prompt, B rows, S tokens of a prompt, W tokens of a row,
A answer tokens, T trace tokens.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Float, Int

from nrt_jax.models.logprobs import TokenLogprobs
from nrt_jax.models.sharding import batch_sharding
from nrt_jax.objective.rewards import padded_length
from nrt_jax.training.batch import CompletionRows, PromptRows
from nrt_jax.training.forward import NrtSettings, row_logprobs
from nrt_jax.types import TokenizedExample

PROMPTS_PER_SHAPE = 32
"""Prompts that share one shape, and so one compiled program; the longest of them sets it."""


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
    entropy_T: Float[np.ndarray, "T"]
    """Of the distribution that each trace token is sampled from."""


class AnswerLogprobs(NamedTuple):
    """Scores answers after contexts, with one compiled program per shape."""

    settings: NrtSettings
    mesh: Mesh
    prompts: int
    """Prompts whose activations exist at once; a multiple of the devices that rows are
    split over."""

    def __call__(
        self,
        params: Any,
        examples: Sequence[TokenizedExample],
        contexts: Sequence[Sequence[Context]],
    ) -> list[list[ContextLogprobs]]:
        """The logprobs of every example's answer after each of its contexts, which are C for all.

        Prompts of similar length share a shape.
        """
        rows = [_Rows(e, of_e) for e, of_e in zip(examples, contexts, strict=True)]
        order = sorted(range(len(rows)), key=lambda p: -rows[p].longest)
        scored: dict[int, list[ContextLogprobs]] = {}
        for start in range(0, len(order), PROMPTS_PER_SHAPE):
            alike = order[start : start + PROMPTS_PER_SHAPE]
            S, W = self._sizes([rows[p] for p in alike])
            for first in range(0, len(alike), self.prompts):
                members = alike[first : first + self.prompts]
                arrays = _arrays([rows[p] for p in members], self.prompts, S, W)
                arrays = jax.device_put(arrays, batch_sharding(self.mesh))
                result = jax.device_get(_logprobs(params, *arrays, settings=self.settings))
                for i, p in enumerate(members):
                    scored[p] = rows[p].cut(result, i)
        return [scored[p] for p in range(len(rows))]

    def _sizes(self, rows: Sequence["_Rows"]) -> tuple[int, int]:
        shards = self.mesh.shape["context"]
        prompt = max(len(row.example.prompt_tokens) - 1 for row in rows)
        longest = max(row.longest for row in rows)
        # A prompt of one token leaves none for its row, which must not be empty.
        S, W = (-(-padded_length(max(1, n)) // shards) * shards for n in (prompt, longest))
        return S, W


class _Rows(NamedTuple):
    """The rows of one prompt."""

    example: TokenizedExample
    contexts: Sequence[Context]

    @property
    def longest(self) -> int:
        """Inputs of the longest row."""
        context = max(len(context.tokens) for context in self.contexts)
        return context + len(self.example.answer_tokens)

    def cut(self, result: TokenLogprobs, prompt: int) -> list[ContextLogprobs]:
        """The values of these rows, which are those of the micro-batch's prompt number `prompt`."""
        cut, answer = [], len(self.example.answer_tokens)
        for c, context in enumerate(self.contexts):
            row, length = prompt * len(self.contexts) + c, len(context.tokens)
            # The target of input i is token i + 1, and the first input is the last token of x.
            z = len(context.before)
            cut.append(
                ContextLogprobs(
                    answer_A=result.logprob_BT[row, length : length + answer],
                    entropy_T=result.entropy_BT[row, z : z + len(context.trace)],
                )
            )
        return cut


def _arrays(rows: Sequence[_Rows], P: int, S: int, W: int) -> tuple[PromptRows, CompletionRows]:
    """The prompts and rows of a micro-batch; P is at least their number."""
    C = len(rows[0].contexts)
    prompts = PromptRows(*[np.zeros((P, S), np.int32) for _ in range(3)])
    ids = partial(np.zeros, (P * C, W), np.int32)
    completions = CompletionRows(ids(), ids(), ids(), ids(), ids(), np.zeros((P * C, W), bool))
    for p, (example, contexts) in enumerate(rows):
        *before, last = example.prompt_tokens.tolist()
        at = (p, slice(0, len(before)))
        prompts.tokens_packs_S[at] = before
        prompts.positions_packs_S[at] = np.arange(len(before))
        prompts.segments_packs_S[at] = 1
        for c, context in enumerate(contexts):
            tokens = np.concatenate([[last], context.tokens, example.answer_tokens])
            at = (p * C + c, slice(0, len(tokens) - 1))
            completions.inputs_BW[at], completions.targets_BW[at] = tokens[:-1], tokens[1:]
            completions.positions_BW[at] = len(before) + np.arange(len(tokens) - 1)
            completions.segments_BW[at] = completions.prompts_BW[at] = 1
            z = len(context.before)
            completions.trace_BW[p * C + c, z : z + len(context.trace)] = True
    return prompts, completions


@partial(jax.jit, static_argnames="settings")
def _logprobs(
    params: Any, prompts: PromptRows, rows: CompletionRows, *, settings: NrtSettings
) -> TokenLogprobs:
    decoder = nnx.merge(settings.definition, params)
    _, prefix = decoder.hidden(*prompts)
    return row_logprobs(decoder, settings, prefix, rows)
