"""lm-eval's model behind a server that speaks like OpenAI's: `nrt-jax evaluate NAME --url URL`."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from lm_eval.api.instance import Instance

from nrt_jax.errors import InputError
from nrt_jax.evaluation.answer_log import CLOSED, AnswerLog, AnswerRow, seed_of
from nrt_jax.evaluation.chat_client import ChatClient, ChatReply
from nrt_jax.evaluation.lm import LoggedLM
from nrt_jax.evaluation.requests import Asked

IN_FLIGHT = 16
"""Requests that the server has at a time."""
DEFAULT_ANSWER_TOKENS = 1024
"""Limit of answers for tasks that set none."""


class ServerLM(LoggedLM):
    """Sends conversations, and takes what comes after the reasoning as the answer.

    A server has one limit for reasoning and answer: the task's, and `trace_limit` on top. Stop
    texts are not sent, since most servers would look for them in the reasoning too.
    """

    def __init__(self, client: ChatClient, answers: AnswerLog, *, seed: int, trace_limit: int):
        super().__init__(answers, seed=seed)
        self._client, self._trace_limit = client, trace_limit
        self._error: BaseException | None = None
        """The first, after which nothing more is sent."""

    def settings(self) -> tuple[Any, ...]:
        return (self._trace_limit,)

    def rows(self, asked: Sequence[Asked]) -> Iterator[AnswerRow]:
        """The answers, as they come; after the first error those that are on their way."""
        pool = ThreadPoolExecutor(IN_FLIGHT)
        try:
            sent = {pool.submit(self._ask, request): request for request in asked}
            for reply in as_completed(sent):
                error = reply.exception()
                if error is None:
                    yield _row(sent[reply], reply.result())
                self._error = self._error or error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        if self._error is not None:
            raise self._error

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Refused: a chat server does not score given answers."""
        raise InputError(
            f"task {requests[0].task_name}: needs log-likelihoods of given answers, which a chat "
            "server does not give; name the other tasks by --tasks"
        )

    def _ask(self, asked: Asked) -> ChatReply:
        if self._error is not None:
            raise self._error
        if asked.context.prefix:
            raise InputError(
                f"{asked.name}: its answer must begin with {asked.context.prefix!r:.40}, which a "
                "chat server does not take; leave the task out by --tasks"
            )
        drawing = asked.drawing
        return self._client.complete(
            asked.context.turns,
            max_tokens=(drawing.max_tokens or DEFAULT_ANSWER_TOKENS) + self._trace_limit,
            temperature=drawing.temperature,
            top_p=drawing.top_p,
            seed=seed_of(asked.key) % 2**31,
        )


def _row(asked: Asked, reply: ChatReply) -> AnswerRow:
    found = [reply.text.find(stop) for stop in asked.drawing.until]
    cut = min((place for place in found if place >= 0), default=None)
    values: dict[str, Any] = {"answer": reply.text[:cut] if reply.closed else ""}
    if reply.reasoning is not None:
        values["trace"] = reply.reasoning
        values["trace_end"] = CLOSED if reply.closed else reply.finish
        values["trace_tokens"] = reply.reasoning_tokens or (0 if reply.closed else reply.tokens)
    if reply.closed:
        values["answer_end"] = "until" if cut is not None else reply.finish
        values["answer_tokens"] = reply.tokens - reply.reasoning_tokens
    return asked.row(**values)
