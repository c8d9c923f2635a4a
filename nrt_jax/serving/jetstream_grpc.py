"""JetStream's gRPC service for one model: greedy, token by token.

What jetstream.py says of the package holds here too, and:

- Its text is decoded token by token, which breaks characters; here it is not.
- Its server has no room for keys, TLS or another address than all of them; ours serves its service.
- A client that goes away keeps its slot until the last token; here the slot is freed.
"""

import asyncio
import functools
import logging
import queue
import threading
from collections.abc import AsyncIterator, Coroutine
from concurrent import futures
from contextlib import aclosing
from typing import Any

import grpc
import jax
import numpy as np
from google.protobuf.message import DecodeError

from nrt_jax.config.serving import ServingConfig
from nrt_jax.data.detokenizer import Detokenizer
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError
from nrt_jax.serving.access import Address, Keys, Tls
from nrt_jax.serving.engine_loop import STOP_S, EngineFailed, EngineStopped, new_id
from nrt_jax.serving.jetstream import (
    ActiveRequest,
    JetStreamEngine,
    Start,
    import_quietly,
    orchestrator,
)
from nrt_jax.serving.jetstream_drivers import Drivers
from nrt_jax.serving.served_model import ServedModel

log = logging.getLogger(__name__)

_multifuture = import_quietly("jetstream.core.utils.async_multifuture")
messages = import_quietly("jetstream.core.proto.jetstream_pb2")
services = import_quietly("jetstream.core.proto.jetstream_pb2_grpc")

CLOSE_S = 1.0
"""Seconds in which the answers of ended requests may leave."""


class _Service(orchestrator.LLMOrchestrator):
    """The gRPC service, with requests checked before they reach a thread."""

    def __init__(self, served: ServedModel, drivers: Drivers, keys: Keys | None, timeout_s: float):
        super().__init__(driver=drivers)
        self._served, self._drivers, self._keys = served, drivers, keys
        self._timeout_s = timeout_s

    async def Decode(self, request: Any, context: Any = None) -> AsyncIterator[Any]:
        """Stream the greedy continuation of a text or of token ids."""
        request_id = new_id("grpc")
        try:
            self._check_key(context)
            async with aclosing(self._answer(request, context)) as responses:
                async for response in responses:
                    yield response
        except futures.CancelledError:
            return  # the client went away
        except Exception as error:
            code, said = self._status(error, request_id)
            await context.abort(code, said)

    def _check_key(self, context: Any) -> None:
        if self._keys is None:
            return
        sent = [value for name, value in context.invocation_metadata() if name == "authorization"]
        if not self._keys.allow([v if isinstance(v, bytes) else v.encode("utf-8") for v in sent]):
            raise _Unauthenticated

    async def _answer(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Its messages; however it ends, the slot is freed."""
        if isinstance(request, InputError):
            raise request
        if self._drivers.draining:
            raise EngineStopped
        # In a thread: a long text takes long to tokenise.
        tokens = await asyncio.to_thread(self._prompt, request)
        channel = _multifuture.AsyncMultifuture()
        context.add_done_callback(channel.cancel)
        active = ActiveRequest(
            max_tokens=request.max_tokens,
            return_channel=channel,
            prefill_content=tokens,
            start=Start(
                jax.random.key(0), request.max_tokens, Sampling(temperature=0.0, obeys_bans=False)
            ),
        )
        loop = asyncio.get_running_loop()
        timer = loop.call_later(self._timeout_s, channel.set_exception, TimeoutError())
        try:
            self._drivers.place_request_on_prefill_queue(active)
            written = Detokenizer(self._served.tokenizer, tokens)
            as_text = request.HasField("text_content")
            async for response in self._responses(channel, written if as_text else None):
                yield response
        finally:
            timer.cancel()
            self._drivers.release(active)

    def _status(self, error: Exception, request_id: str) -> tuple[grpc.StatusCode, str]:
        """Code and text for the client; for a mistake of ours only its id, and the log has more."""
        match error:
            case _Unauthenticated():
                return grpc.StatusCode.UNAUTHENTICATED, (
                    "no valid API key; send one as metadata, authorization: Bearer KEY"
                )
            case InputError():
                return grpc.StatusCode.INVALID_ARGUMENT, str(error)
            case queue.Full():
                return (
                    grpc.StatusCode.RESOURCE_EXHAUSTED,
                    "too many requests wait; try again later",
                )
            case EngineStopped():
                return grpc.StatusCode.UNAVAILABLE, "the server is shutting down; ask another one"
            case TimeoutError():
                return (
                    grpc.StatusCode.DEADLINE_EXCEEDED,
                    f"not answered in {self._timeout_s:g} s",
                )
        if isinstance(error, EngineFailed):
            log.error("request %s ended with the failure of the gRPC server's engine", request_id)
        else:
            log.error("request %s failed", request_id, exc_info=error)
        return (
            grpc.StatusCode.INTERNAL,
            f"internal error; the server's log has more on request {request_id}",
        )

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


def _handlers(service: _Service) -> grpc.GenericRpcHandler:
    """The service's methods; the generated ones answer bytes that are no message by a traceback."""
    orchestrator_service = messages.DESCRIPTOR.services_by_name["Orchestrator"]
    decode, health = (
        {
            "request_deserializer": functools.partial(_parse, request),
            "response_serializer": response.SerializeToString,
        }
        for request, response in (
            (messages.DecodeRequest, messages.DecodeResponse),
            (messages.HealthCheckRequest, messages.HealthCheckResponse),
        )
    )
    return grpc.method_handlers_generic_handler(
        orchestrator_service.full_name,
        {
            "Decode": grpc.unary_stream_rpc_method_handler(service.Decode, **decode),
            "HealthCheck": grpc.unary_unary_rpc_method_handler(service.HealthCheck, **health),
        },
    )


def _parse(kind: Any, data: bytes) -> Any:
    """The message, or the error that its method raises."""
    try:
        return kind.FromString(data)
    except DecodeError:
        return InputError(f"the request is no {kind.DESCRIPTOR.name}")


class _Unauthenticated(Exception):
    """The call has no key of the server."""


class GrpcServer:
    """JetStream's service for one model, on a thread of its own from `start` to `stop`."""

    def __init__(
        self,
        served: ServedModel,
        config: ServingConfig,
        address: Address,
        port: int,
        keys: Keys | None = None,
        tls: Tls | None = None,
    ):
        """Raises InputError for a port that is taken."""
        engine = JetStreamEngine(served.engine(config.grpc_slots))
        self.drivers = Drivers(engine, served.opened.params, config.grpc_queue)
        self.port = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc", daemon=True)
        self._thread.start()
        service = _Service(served, self.drivers, keys, config.request_timeout_s)
        try:
            self._server = self._run(self._make(service, config, address, tls))
        except BaseException:
            self.drivers.stop()
            self._end_loop()
            raise

    async def _make(
        self, service: _Service, config: ServingConfig, address: Address, tls: Tls | None
    ) -> Any:
        server = grpc.aio.server(
            options=[
                # Otherwise Linux lets a second server take part of the first one's calls.
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", config.max_body_bytes),
            ]
        )
        server.add_generic_rpc_handlers((_handlers(service),))
        try:
            server.add_secure_port(f"{address.in_url}:{self.port}", _credentials(tls))
        except RuntimeError:
            raise InputError(
                f"grpc_port={self.port}: cannot be listened on at host={config.host}; "
                "choose another"
            ) from None
        return server

    def start(self) -> None:
        """Begin to listen."""
        self._run(self._server.start())

    async def drain(self) -> None:
        """Refuse new requests, and return when all others have ended."""
        self.drivers.draining = True
        while self.drivers.active:
            await asyncio.sleep(0.05)

    def stop(self, seconds: float = STOP_S) -> bool:
        """End all requests, the server and its threads; whether these ended within `seconds`."""
        if self._loop.is_closed():
            return True
        ended = self.drivers.stop(seconds)
        self._run(self._server.stop(CLOSE_S))
        self._end_loop()
        return ended

    def _run(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def _end_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _credentials(tls: Tls | None) -> grpc.ServerCredentials:
    if tls is None:
        return grpc.insecure_server_credentials()
    return grpc.ssl_server_credentials([(tls.key, tls.certificate)])
