"""`POST /v1/completions`: prompts in, continuations out."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from nrt_jax.engine.requests import Request
from nrt_jax.serving.call import Call, join, merge
from nrt_jax.serving.errors import bad_request
from nrt_jax.serving.logprobs import legacy_logprobs, prompt_scores
from nrt_jax.serving.prompts import Prompt, read_prompts
from nrt_jax.serving.sampling import check_stop_ids, sampling_of, usage
from nrt_jax.serving.schemas import CompletionRequest
from nrt_jax.serving.served_model import ServedModel
from nrt_jax.serving.text import Piece, TextWriter, TokenScore, prompt_offsets

DEFAULT_MAX_TOKENS = 16


@dataclass(frozen=True)
class Completion:
    """A checked request; `run` answers it as a whole, `stream` in chunks."""

    served: ServedModel
    body: CompletionRequest
    prompts: Sequence[Prompt]
    limits: Sequence[int]
    """Most tokens that are written after each prompt."""

    @classmethod
    def prepare(
        cls, served: ServedModel, body: CompletionRequest, *, sequences: int, top: int
    ) -> "Completion":
        """Tokenise and check; ApiError 400 for a prompt or a size that cannot be served."""
        if body.logprobs is not None and body.logprobs > top:
            raise bad_request("logprobs", f"{body.logprobs}; this server gives up to {top}")
        if body.max_tokens == 0 and not body.echo:
            raise bad_request("max_tokens", "0 writes nothing; set 1 or more, or echo=true")
        prompts = read_prompts(served, body.prompt, sequences // body.n)
        limits = [_limit(served, body, index, prompt) for index, prompt in enumerate(prompts)]
        check_stop_ids(served, body)
        return cls(served, body, prompts, limits)

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts."""
        return sum(len(prompt.tokens) for prompt in self.prompts)

    async def run(self, call: Call) -> dict[str, Any]:
        """The whole answer."""
        pieces: list[list[Piece]] = [[] for _ in range(len(self.prompts) * self.body.n)]
        async with aclosing(self._pieces(call)) as written:
            async for index, piece in written:
                pieces[index].append(piece)
        whole = [join(parts) for parts in pieces]
        choices = [self._choice(index, piece) for index, piece in enumerate(whole)]
        usage = self._usage(sum(piece.sampled for piece in whole))
        return self._chunk(call, int(time.time()), choices) | {"usage": usage}

    async def stream(self, call: Call) -> AsyncGenerator[dict[str, Any], None]:
        """The same in chunks, whose texts and logprobs join to those of the whole."""
        created, sampled = int(time.time()), 0
        async with aclosing(self._pieces(call)) as written:
            async for index, piece in written:
                sampled += piece.sampled
                if piece.text or piece.scores or piece.finish:
                    yield self._chunk(call, created, [self._choice(index, piece)])
        if self.body.include_usage:
            yield self._chunk(call, created, []) | {"usage": self._usage(sampled)}

    async def _pieces(self, call: Call) -> AsyncGenerator[tuple[int, Piece], None]:
        n = self.body.n
        echoes = [
            await self._echo(call, *pair) for pair in zip(self.prompts, self.limits, strict=True)
        ]
        streams = []
        for index, (prompt, limit) in enumerate(zip(self.prompts, self.limits, strict=True)):
            sampling = sampling_of(self.body)
            request = Request(prompt.tokens, index, n, limit, sampling)
            generation = call.submit(request, self.body.seed) if limit else None
            echo = echoes[index]
            for copy in range(n):
                writer = TextWriter(
                    self.served.tokenizer, self.body.stops, len(echo.text) if echo else 0
                )
                written = call.pieces(generation, copy, writer) if generation else None
                streams.append(_after(echo, written))
        async with aclosing(merge(streams)) as merged:
            async for item in merged:
                yield item

    async def _echo(self, call: Call, prompt: Prompt, limit: int) -> Piece | None:
        """The prompt as the first piece of its answers, scored where logprobs are asked for."""
        if not self.body.echo:
            return None
        ids = prompt.tokens.tolist()
        text, offsets = prompt_offsets(self.served.tokenizer, ids)
        scores: tuple[TokenScore, ...] = ()
        if self.body.logprobs is not None:
            scored = await call.score(prompt.tokens) if len(ids) > 1 else None
            scores = prompt_scores(ids, offsets, scored)
        text = text if prompt.text is None else prompt.text
        return Piece(text, scores, prompt.tokens[:0], 0, None if limit else "length")

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        top = self.body.logprobs
        scores = (
            None if top is None else legacy_logprobs(self.served.token_texts, piece.scores, top)
        )
        return {
            "index": index,
            "text": piece.text,
            "logprobs": scores,
            "finish_reason": piece.finish,
        }

    def _chunk(self, call: Call, created: int, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": f"cmpl-{call.id}",
            "object": "text_completion",
            "created": created,
            "model": self.served.name,
            "choices": choices,
        }

    def _usage(self, sampled: int) -> dict[str, int]:
        return usage(self.prompt_tokens, sampled)


async def _after(
    first: Piece | None, rest: AsyncGenerator[Piece, None] | None
) -> AsyncGenerator[Piece, None]:
    if first is not None:
        yield first
    if rest is not None:
        async for piece in rest:
            yield piece


def _limit(served: ServedModel, body: CompletionRequest, index: int, prompt: Prompt) -> int:
    """Most tokens after one prompt; ApiError 400 when it does not fit."""
    length, limits = len(prompt.tokens), served.limits
    room = limits.context - length
    if room < 0 or (room == 0 and body.max_tokens != 0):
        most = limits.context - (body.max_tokens != 0)
        raise bad_request("prompt", f"prompt {index} has {length} tokens; {most} is the most")
    if body.max_tokens is None:
        return min(DEFAULT_MAX_TOKENS, limits.new, room)
    most = min(limits.new, room)
    if body.max_tokens > most:
        raise bad_request(
            "max_tokens",
            f"{body.max_tokens}; after the {length} tokens of prompt {index} {most} are the most",
        )
    return body.max_tokens
