"""`POST /v1/chat/completions`: a conversation in, a trace and an answer out.

A model that reasons is asked twice, as in evaluation: x t_start for a trace z, which any special
token or its limit ends, then x t_start z t_end for the answer.
"""

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from nrt_jax.engine.requests import Request
from nrt_jax.errors import InputError
from nrt_jax.serving.call import Call, merge
from nrt_jax.serving.conversation import read_turns
from nrt_jax.serving.detokenize import Piece, TextWriter, join
from nrt_jax.serving.generation import Generation
from nrt_jax.serving.logprobs import TokenLogprob, chat_logprobs
from nrt_jax.serving.protocol import bad_request, usage
from nrt_jax.serving.request_fields import ChatRequest
from nrt_jax.serving.served_model import ServedModel

FIELDS = {"trace": "reasoning_content", "answer": "content"}


class Part(NamedTuple):
    """A piece of one choice, of its trace or of its answer."""

    of: Literal["trace", "answer"]
    piece: Piece


@dataclass(frozen=True)
class Chat:
    """A checked request; `run` answers it as a whole, `stream` in chunks."""

    served: ServedModel
    body: ChatRequest
    prompt: np.ndarray
    """x, int32, with t_start if the model reasons."""
    trace_limit: int
    """0 if the model does not reason."""
    limit: int
    """Most tokens of trace and answer together."""

    @classmethod
    def prepare(cls, served: ServedModel, body: ChatRequest, *, sequences: int, top: int) -> "Chat":
        """Build the prompt and check it; ApiError 400 when it cannot be served."""
        if body.n > sequences:
            raise bad_request("n", f"{body.n}; this server writes up to {sequences}")
        if body.top_logprobs > top:
            raise bad_request("top_logprobs", f"{body.top_logprobs}; this server gives up to {top}")
        if body.top_logprobs and not body.logprobs:
            raise bad_request("top_logprobs", "needs logprobs=true")
        body.check_stop_ids(served.vocab_size)
        body.check_template_kwargs(served.reasons)
        prompt = _prompt(served, body.messages)
        most = served.limits.new - (2 if served.reasons else 0)
        trace = _at_most(body, "max_reasoning_tokens", served.limits.trace)
        given = body.max_completion_tokens is not None
        limit = _at_most(body, "max_completion_tokens" if given else "max_tokens", most)
        body.check_min_tokens(limit)
        return cls(served, body, prompt, trace, limit)

    @property
    def prompt_tokens(self) -> int:
        """Length of the prompt."""
        return len(self.prompt)

    async def run(self, call: Call) -> dict[str, Any]:
        """The whole answer."""
        parts: list[list[Part]] = [[] for _ in range(self.body.n)]
        async with aclosing(self._parts(call)) as written:
            async for index, part in written:
                parts[index].append(part)
        choices = [self._choice(index, of_choice) for index, of_choice in enumerate(parts)]
        return self._chunk(call, "chat.completion", int(time.time()), choices) | {
            "usage": self._usage([part for of_choice in parts for part in of_choice])
        }

    async def stream(self, call: Call) -> AsyncGenerator[dict[str, Any], None]:
        """The answer in chunks, whose texts and logprobs join to those of `run`."""
        created, parts = int(time.time()), []
        kind = "chat.completion.chunk"
        begun: set[int] = set()
        async with aclosing(self._parts(call)) as written:
            async for index, part in written:
                parts.append(part)
                if index not in begun:
                    begun.add(index)
                    delta = {"role": "assistant", "content": ""}
                    yield self._chunk(call, kind, created, [self._delta(index, delta)])
                if part.piece.text or part.piece.logprobs:
                    delta = {FIELDS[part.of]: part.piece.text}
                    logprobs = part.piece.logprobs if part.of == "answer" else None
                    yield self._chunk(call, kind, created, [self._delta(index, delta, logprobs)])
                if part.of == "answer" and part.piece.finish:
                    last = self._delta(index, {}) | {"finish_reason": part.piece.finish}
                    yield self._chunk(call, kind, created, [last])
        if self.body.include_usage:
            yield self._chunk(call, kind, created, []) | {"usage": self._usage(parts)}

    async def _parts(self, call: Call) -> AsyncGenerator[tuple[int, Part], None]:
        n, limit = self.body.n, min(self.trace_limit or self.limit, self.limit)
        sampling = self.body.sampling
        if self.served.reasons:
            # What the client says of an end is for the answer.
            sampling = sampling._replace(
                stop_ids=self.served.trace_stop_ids,
                ignores_eos=False,
                min_tokens=0,
                obeys_bans=True,
            )
        request = Request(self.prompt, 0, n, limit, sampling)
        first = call.submit(request, self.body.drawn_seed)
        choices = [self._of_choice(call, first, copy) for copy in range(n)]
        async with aclosing(merge(choices)) as merged:
            async for item in merged:
                yield item

    async def _of_choice(
        self, call: Call, first: Generation, copy: int
    ) -> AsyncGenerator[Part, None]:
        tokenizer = self.served.tokenizer
        if not self.served.reasons:
            writer = TextWriter(tokenizer, self.body.shown, prompt=self.prompt)
            async for piece in call.pieces(first, copy, writer):
                yield Part("answer", piece)
            return
        pieces = []
        async for piece in call.pieces(first, copy, TextWriter(tokenizer, prompt=self.prompt)):
            pieces.append(piece)
            yield Part("trace", piece)
        trace = join(pieces)
        limit = self.limit - trace.sampled
        if limit <= 0:
            # The trace has used up the request's tokens: there is no answer.
            yield Part("answer", Piece("", (), trace.tokens[:0], 0, "length"))
            return
        closed = np.concatenate([self.prompt, trace.tokens, [tokenizer.think_end_id]])
        writer = TextWriter(tokenizer, self.body.shown, prompt=closed)
        # Another stream: the answer must not be sampled with the noise of the trace.
        request = Request(closed.astype(np.int32), 1 + copy, 1, limit, self.body.sampling)
        second = call.submit(request, self.body.drawn_seed)
        async for piece in call.pieces(second, 0, writer):
            yield Part("answer", piece)

    def _choice(self, index: int, parts: Sequence[Part]) -> dict[str, Any]:
        answer = join([part.piece for part in parts if part.of == "answer"])
        message = {"role": "assistant", "content": answer.text}
        if self.served.reasons:
            trace = join([part.piece for part in parts if part.of == "trace"])
            message["reasoning_content"] = trace.text
        return {
            "index": index,
            "message": message,
            "logprobs": self._logprobs(answer.logprobs),
            "finish_reason": answer.finish,
        }

    def _delta(
        self, index: int, delta: dict[str, str], logprobs: Sequence[TokenLogprob] | None = None
    ) -> dict[str, Any]:
        shown = self._logprobs(logprobs)
        return {"index": index, "delta": delta, "logprobs": shown, "finish_reason": None}

    def _logprobs(self, logprobs: Sequence[TokenLogprob] | None) -> dict[str, Any] | None:
        if logprobs is None or not self.body.logprobs:
            return None
        return chat_logprobs(self.served.token_texts, logprobs, self.body.top_logprobs)

    def _chunk(
        self, call: Call, kind: str, created: int, choices: list[dict[str, Any]]
    ) -> dict[str, Any]:
        return {
            "id": f"chatcmpl-{call.id}",
            "object": kind,
            "created": created,
            "model": self.served.name,
            "choices": choices,
        }

    def _usage(self, parts: Sequence[Part]) -> dict[str, Any]:
        trace = sum(part.piece.sampled for part in parts if part.of == "trace")
        sampled = sum(part.piece.sampled for part in parts)
        details = {"completion_tokens_details": {"reasoning_tokens": trace}}
        return usage(len(self.prompt), sampled) | details


def _prompt(served: ServedModel, messages: Sequence[Any]) -> np.ndarray:
    turns = read_turns(messages)
    try:
        prompt = served.chat_prompt(turns, opened=served.reasons)
    except InputError as error:
        raise bad_request("messages", str(error)) from None
    # t_start counts among the new tokens.
    length = len(prompt) - served.reasons
    if length > served.limits.prompt:
        raise bad_request(
            "messages", f"prompt 0 has {length} tokens; {served.limits.prompt} are the most"
        )
    return prompt


def _at_most(body: ChatRequest, name: str, most: int) -> int:
    """The field's value, or `most` without one; ApiError 400 when the value is above it."""
    value = getattr(body, name)
    if value is None:
        return most
    if value > most:
        raise bad_request(name, f"{value}; {most} are the most")
    return value
