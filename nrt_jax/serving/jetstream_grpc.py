"""JetStream's gRPC server for one model: greedy, token by token.

What jetstream.py says of the package holds here too, and:

- Its text is decoded token by token, which breaks characters; here it is not.
- Its server listens on every address; here on the one that it is given.
- A client that goes away keeps its slot until the last token; here the slot is freed.
"""

import asyncio
import contextlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent import futures
from types import ModuleType
from typing import Any

import grpc
import jax
import numpy as np

from nrt_jax.data.detokenizer import Detokenizer
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.serving.engine_loop import EngineFailed, new_id
from nrt_jax.serving.jetstream import (
    STOP_S,
    ActiveRequest,
    Driver,
    JetStreamEngine,
    Start,
    import_quietly,
    orchestrator,
)
from nrt_jax.serving.served_model import ServedModel

log = logging.getLogger(__name__)

_server_lib = import_quietly("jetstream.core.server_lib")
_multifuture = import_quietly("jetstream.core.utils.async_multifuture")
messages = import_quietly("jetstream.core.proto.jetstream_pb2")
services = import_quietly("jetstream.core.proto.jetstream_pb2_grpc")


class Drivers:
    """One driver at a time, replaced when it fails; JetStream sees it as a driver."""

    def __init__(self, served: ServedModel, slots: int, most: int):
        self._engine = JetStreamEngine(served.engine(slots))
        self._params, self._most = served.opened.params, most
        self._lock = threading.Lock()
        self._requests: dict[int, Any] = {}
        self.live, self.draining = True, False
        self._driver = self._make()

    def _make(self) -> Driver:
        return Driver(self._engine, self._params, self._replace)

    @property
    def active(self) -> int:
        """Requests that run or wait."""
        return len(self._requests)

    def place_request_on_prefill_queue(self, request: Any) -> None:
        """Accept a request; queue.Full when there are too many."""
        with self._lock:
            if len(self._requests) >= self._most:
                raise queue.Full
            self._requests[id(request)] = request
            self._driver.place_request_on_prefill_queue(request)

    def release(self, request: Any) -> None:
        """The request has ended or its client has left: its slot is free at the next step."""
        request.max_tokens = 0
        with self._lock:
            self._requests.pop(id(request), None)

    def stop(self) -> None:
        """End all threads and wait for them: exiting while one runs aborts the process."""
        self.live = False
        self._driver.end().join(STOP_S)

    def _replace(self, failed: Driver, _: Exception) -> None:
        with self._lock:
            # Before `end` takes them away from the requests.
            channels = [request.return_channel for request in self._requests.values()]
            self._requests = {}
            failed.end()
            if self.live:
                self._driver = self._make()
        for channel in channels:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                channel.set_exception(EngineFailed("the engine failed"))


class _Service(orchestrator.LLMOrchestrator):
    """The gRPC service, with requests checked before they reach a thread."""

    def __init__(self, served: ServedModel, drivers: Drivers):
        super().__init__(driver=drivers)
        self._served, self._drivers = served, drivers

    async def Decode(self, request: Any, context: Any = None) -> AsyncIterator[Any]:
        """Stream the greedy continuation of a text or of token ids."""
        if self._drivers.draining:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
        try:
            tokens = self._prompt(request)
        except InputError as error:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        channel = _multifuture.AsyncMultifuture()
        context.add_done_callback(channel.cancel)
        active = ActiveRequest(
            max_tokens=request.max_tokens,
            return_channel=channel,
            prefill_content=tokens,
            start=Start(jax.random.key(0), request.max_tokens, Sampling(temperature=0.0)),
        )
        request_id = new_id("grpc")
        try:
            self._drivers.place_request_on_prefill_queue(active)
            written = Detokenizer(self._served.tokenizer, tokens)
            as_text = request.HasField("text_content")
            async for response in self._responses(channel, written if as_text else None):
                yield response
        except queue.Full:
            await context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED, "too many requests wait; try again later"
            )
        except EngineFailed:
            log.error("request %s ended with the failure of the gRPC server's engine", request_id)
            await context.abort(
                grpc.StatusCode.INTERNAL,
                f"internal error; the server's log has more on request {request_id}",
            )
        except futures.CancelledError:
            pass  # the client went away
        finally:
            self._drivers.release(active)

    async def _responses(self, channel: Any, detokenizer: Detokenizer | None) -> AsyncIterator[Any]:
        """A message for every token that settles text, or without text for every token."""
        held: list[int] = []
        async for drawn in channel:
            for token, _ in drawn:
                if token in self._served.tokenizer.special_ids:
                    continue
                held.append(token)
                text = "" if detokenizer is None else detokenizer.feed(token)
                if text or detokenizer is None:
                    yield _response(text, held)
                    held = []
        if held:
            yield _response("" if detokenizer is None else detokenizer.flush(), held)

    def _prompt(self, request: Any) -> np.ndarray:
        """Ids of the prompt; InputError when the prompt or max_tokens cannot be served."""
        served, limits = self._served, self._served.limits
        kind = request.WhichOneof("content")
        if kind == "text_content":
            tokens = served.text_prompt(request.text_content.text)
        else:
            tokens = np.array(request.token_content.token_ids, np.int32)
        size = served.vocab_size
        if not len(tokens):
            raise InputError("content: is empty; send a text or token ids")
        if tokens.min() < 0 or tokens.max() >= size:
            raise InputError(f"token_ids: must be 0 to {size - 1}")
        most = min(limits.new, limits.context - len(tokens))
        if most < 1:
            raise InputError(f"content: {len(tokens)} tokens; {limits.context - 1} are the most")
        if not 1 <= request.max_tokens <= most:
            raise InputError(
                f"max_tokens: {request.max_tokens}; after {len(tokens)} tokens 1 to {most} can be"
            )
        return tokens


def _response(text: str, token_ids: list[int]) -> Any:
    content = messages.DecodeResponse.StreamContent
    sample = content.Sample(text=text, token_ids=token_ids)
    return messages.DecodeResponse(stream_content=content(samples=[sample]))


@contextlib.contextmanager
def _replaced(module: ModuleType, **attributes: Any) -> Iterator[None]:
    before = {name: getattr(module, name) for name in attributes}
    vars(module).update(attributes)
    try:
        yield
    finally:
        vars(module).update(before)


class GrpcServer:
    """JetStream's server for one model, listening from `start` to `stop`."""

    def __init__(self, served: ServedModel, host: str, port: int, *, slots: int, most: int):
        self.drivers = Drivers(served, slots, most)
        self.port = port
        shown = f"[{host}]" if ":" in host else host

        def service(driver: Drivers) -> _Service:
            return _Service(served, driver)

        # Both are read while the server is made.
        with _replaced(_server_lib, _HOST=shown), _replaced(orchestrator, LLMOrchestrator=service):
            self._server = _server_lib.JetStreamServer(
                self.drivers, threads=4, port=port, credentials=grpc.insecure_server_credentials()
            )

    def start(self) -> None:
        """Begin to listen."""
        self._server.start()

    async def drain(self) -> None:
        """Refuse new requests, and return when all others have ended."""
        self.drivers.draining = True
        while self.drivers.active:
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        """End the server and its threads."""
        self._server.stop()
