"""`POST /v1/completions`: prompts in, continuations out."""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from nrt_jax.data.detokenizer import REPLACEMENT
from nrt_jax.engine.requests import Request
from nrt_jax.errors import InputError
from nrt_jax.serving.call import Call, merge
from nrt_jax.serving.detokenize import Piece, TextWriter, join, prompt_offsets
from nrt_jax.serving.logprobs import TokenLogprob, completion_logprobs, prompt_logprobs
from nrt_jax.serving.protocol import bad_request, usage
from nrt_jax.serving.request_fields import CompletionRequest
from nrt_jax.serving.served_model import ServedModel

DEFAULT_MAX_TOKENS = 16


class Prompt(NamedTuple):
    """One prompt of a request."""

    tokens: np.ndarray
    text: str | None
    """None when it came as token ids."""
    limit: int
    """Most tokens that are written after it."""


@dataclass(frozen=True)
class Completion:
    """A checked request; `run` answers it as a whole, `stream` in chunks."""

    served: ServedModel
    body: CompletionRequest
    prompts: Sequence[Prompt]

    @classmethod
    def prepare(
        cls, served: ServedModel, body: CompletionRequest, *, sequences: int, top: int
    ) -> "Completion":
        """Tokenise and check; ApiError 400 for a prompt or a size that cannot be served."""
        if body.logprobs is not None and body.logprobs > top:
            raise bad_request("logprobs", f"{body.logprobs}; this server gives up to {top}")
        if body.max_tokens == 0 and not body.echo:
            raise bad_request("max_tokens", "0 writes nothing; set 1 or more, or echo=true")
        prompts = _read_prompts(served, body, sequences // body.n)
        body.check_stop_ids(served.vocab_size)
        return cls(served, body, prompts)

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
        """The answer in chunks, whose texts and logprobs join to those of `run`."""
        created, sampled = int(time.time()), 0
        async with aclosing(self._pieces(call)) as written:
            async for index, piece in written:
                sampled += piece.sampled
                if piece.text or piece.logprobs or piece.finish:
                    yield self._chunk(call, created, [self._choice(index, piece)])
        if self.body.include_usage:
            yield self._chunk(call, created, []) | {"usage": self._usage(sampled)}

    async def _pieces(self, call: Call) -> AsyncGenerator[tuple[int, Piece], None]:
        n = self.body.n
        echoes = [await self._echo(call, prompt) for prompt in self.prompts]
        streams = []
        for index, (prompt, echo) in enumerate(zip(self.prompts, echoes, strict=True)):
            request = Request(prompt.tokens, index, n, prompt.limit, self.body.sampling)
            generation = call.submit(request, self.body.drawn_seed) if prompt.limit else None
            for copy in range(n):
                writer = TextWriter(
                    self.served.tokenizer,
                    self.body.shown,
                    len(echo.text) if echo else 0,
                    prompt=prompt.tokens,
                    mends=self._mends(prompt),
                )
                written = call.pieces(generation, copy, writer) if generation else None
                streams.append(_after(echo, written))
        async with aclosing(merge(streams)) as merged:
            async for item in merged:
                yield item

    async def _echo(self, call: Call, prompt: Prompt) -> Piece | None:
        """The prompt as the first piece of its answers, with logprobs if they are asked for."""
        if not self.body.echo:
            return None
        tokenizer, ids = self.served.tokenizer, prompt.tokens.tolist()
        text, offsets = prompt_offsets(tokenizer, ids, prompt.text)
        logprobs: tuple[TokenLogprob, ...] = ()
        if self.body.logprobs is not None:
            scored = await call.score(prompt.tokens) if len(ids) > 1 else None
            logprobs = prompt_logprobs(ids, offsets, scored, tokenizer.bos_id)
        if prompt.limit and self._mends(prompt):
            text = text.rstrip(REPLACEMENT)
        return Piece(text, logprobs, prompt.tokens[:0], 0, None if prompt.limit else "length")

    def _mends(self, prompt: Prompt) -> bool:
        """Whether a character that the prompt does not complete is part of the answer's text."""
        return self.body.echo and prompt.text is None

    def _choice(self, index: int, piece: Piece) -> dict[str, Any]:
        top, logprobs = self.body.logprobs, None
        if top is not None:
            logprobs = completion_logprobs(self.served.token_texts, piece.logprobs, top)
        return {
            "index": index,
            "text": piece.text,
            "logprobs": logprobs,
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


# --- prompts -------------------------------------------------------------------------------------


def _read_prompts(served: ServedModel, body: CompletionRequest, most: int) -> list[Prompt]:
    """A text, a list of texts, token ids, or a list of lists of token ids."""
    value = body.prompt
    if isinstance(value, str) or _is_ids(value):
        value = [value]
    if not isinstance(value, list) or not value:
        raise bad_request("prompt", "must be a text, token ids, or a list of one of these")
    if len(value) > most:
        raise bad_request("prompt", f"{len(value)} prompts; with this n {most} are the most")
    tokens = [_prompt_tokens(served, body, index, item) for index, item in enumerate(value)]
    return [
        Prompt(
            tokens=ids,
            text=item if isinstance(item, str) else None,
            limit=_limit(served, body, index, len(ids)),
        )
        for index, (item, ids) in enumerate(zip(value, tokens, strict=True))
    ]


def _is_ids(value: Any) -> bool:
    # Python's bool is an int, but not a token id.
    return isinstance(value, list) and bool(value) and all(type(item) is int for item in value)


def _prompt_tokens(
    served: ServedModel, body: CompletionRequest, index: int, value: Any
) -> np.ndarray:
    if isinstance(value, str):
        return _text_tokens(served, index, value, adds_bos=body.add_special_tokens)
    if not _is_ids(value):
        raise bad_request(
            "prompt", f"prompt {index} must be a text or a list of one or more token ids"
        )
    size = served.vocab_size
    unknown = next((token for token in value if not 0 <= token < size), None)
    if unknown is not None:
        raise bad_request("prompt", f"prompt {index} has {unknown}; token ids are 0 to {size - 1}")
    return np.array(value, np.int32)


def _text_tokens(served: ServedModel, index: int, text: str, *, adds_bos: bool) -> np.ndarray:
    try:
        tokens = served.text_prompt(text, adds_bos=adds_bos)
    except InputError as error:
        raise bad_request("prompt", f"prompt {index} {error}") from None
    if not len(tokens):
        raise bad_request("prompt", f"prompt {index} is empty; write something")
    return tokens


def _limit(served: ServedModel, body: CompletionRequest, index: int, length: int) -> int:
    """Most tokens after one prompt; ApiError 400 when it does not fit."""
    limits = served.limits
    left = limits.context - length
    if left < 0 or (left == 0 and body.max_tokens != 0):
        most = limits.context - (body.max_tokens != 0)
        raise bad_request("prompt", f"prompt {index} has {length} tokens; {most} is the most")
    most = min(limits.new, left)
    limit = min(DEFAULT_MAX_TOKENS, most) if body.max_tokens is None else body.max_tokens
    if limit > most:
        raise bad_request(
            "max_tokens",
            f"{body.max_tokens}; after the {length} tokens of prompt {index} {most} are the most",
        )
    if limit:
        body.check_min_tokens(limit)
    return limit
