"""JetStream's orchestrator and gRPC server on an engine of ours: greedy, token by token.

The one place that knows what they have to be told (google-jetstream 0.2.2):

- Importing them sets the root logger to DEBUG and gives it a handler; that is undone.
- `jax.tree_map`, which they call, is gone from jax.
- Their threads answer any exception with SIGKILL of the process. Here it is logged, the requests
  under way end with the status INTERNAL, and a new driver takes over.
- A prompt of token ids gets a beginning-of-sequence token put in front, and one that is too long
  loses its head; here prompts are run as they are, or refused.
- Their text is decoded token by token, which breaks characters; here it is not.
- Their server listens on every address; here on the one that it is given.
- A client that goes away keeps its slot until its last token; here it is freed.
"""

import asyncio
import contextlib
import importlib
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent import futures
from types import ModuleType
from typing import Any

import grpc
import jax
import numpy as np

from nrt_jax.engine.decode_state import padded
from nrt_jax.engine.engine import DecoderEngine
from nrt_jax.errors import InputError
from nrt_jax.serving.engine_loop import EngineFailed, new_id
from nrt_jax.serving.served_model import ServedModel
from nrt_jax.serving.text import Detokenizer

log = logging.getLogger(__name__)

STOP_S = 60
"""Seconds that the end of the server waits for a step under way, or its compilation."""


def _import_quietly(name: str) -> ModuleType:
    root = logging.getLogger()
    level, handlers = root.level, list(root.handlers)
    module = importlib.import_module(name)
    root.setLevel(level)
    root.handlers[:] = handlers
    return module


# What these take from seqio has been stood in for by engine/jetstream_compat.py, which the import
# of our engine has run.
_orchestrator = _import_quietly("jetstream.core.orchestrator")
_server_lib = _import_quietly("jetstream.core.server_lib")
_multifuture = _import_quietly("jetstream.core.utils.async_multifuture")
_tokenizer_api = _import_quietly("jetstream.engine.tokenizer_api")
messages = _import_quietly("jetstream.core.proto.jetstream_pb2")
services = _import_quietly("jetstream.core.proto.jetstream_pb2_grpc")


class JetStreamTokenizer(_tokenizer_api.Tokenizer):
    """A run's tokenizer, as JetStream wants one."""

    def __init__(self, served: ServedModel):
        self._served = served

    def encode(self, s: str, **kwargs: Any) -> tuple[np.ndarray, int]:
        """A text's ids as the run begins a sequence, padded to a bucket; and how many they are."""
        tokens = self._served.text_prompt(s)
        return padded(tokens), len(tokens)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        """The text of a whole sequence."""
        return self._served.tokenizer.decode(token_ids)

    @property
    def pad_id(self) -> int:
        """What a prompt is padded with; never looked at."""
        return 0

    @property
    def eos_id(self) -> int:
        """The end-of-sequence token."""
        return self._served.tokenizer.eos_id

    @property
    def bos_id(self) -> int:
        """The beginning-of-sequence token; the end-of-sequence token where there is none."""
        bos = self._served.tokenizer.bos_id
        return self.eos_id if bos is None else bos

    @property
    def stop_tokens(self) -> set[int]:
        """Every special token."""
        return set(self._served.tokenizer.special_ids)


class JetStreamEngine(DecoderEngine):
    """Our engine, with the tokenizer that JetStream asks it for."""

    served: ServedModel

    def build_tokenizer(self, metadata: Any) -> JetStreamTokenizer:
        """That of the run."""
        return JetStreamTokenizer(self.served)


class _Thread(threading.Thread):
    """In the place of JetThread: hands an exception to the driver that the thread works for."""

    def __init__(self, target: Any, name: str, daemon: bool = True):
        super().__init__(target=target, name=name, daemon=True)
        self._driver: _Driver = target.func.__self__

    def run(self) -> None:
        """Work until the driver stops, or fails."""
        try:
            super().run()
        except Exception:
            self._driver.failed()


def _delete(prefix: Any) -> None:
    jax.tree.map(lambda leaf: leaf.delete(), prefix)


vars(_orchestrator).update(JetThread=_Thread, delete_pytree=_delete)


class _Driver(_orchestrator.Driver):
    """JetStream's threads around one engine; `on_failure` is called once when one of them fails."""

    def __init__(
        self, engine: JetStreamEngine, params: Any, on_failure: "Callable[[_Driver], None]"
    ):
        self._on_failure = on_failure
        self._ending = threading.Lock()
        super().__init__(
            prefill_engines=[engine],
            generate_engines=[engine],
            prefill_params=[params],
            generate_params=[params],
            interleaved_mode=True,
            jax_padding=False,
        )

    def failed(self) -> None:
        """Called in the thread that has raised."""
        # A driver that ends takes its queues away from under its threads, which then raise too.
        if self._ending.acquire(blocking=False):
            log.exception("a thread of the gRPC server's engine failed")
            self._on_failure(self)

    def end(self) -> threading.Thread:
        """Stop the threads, which may still be in a step; the thread that waits for them."""
        self._ending.acquire(blocking=False)
        stopping = threading.Thread(target=self.stop, daemon=True)
        stopping.start()
        return stopping

    def _process_prefill_content(
        self, request: Any, tokenizer: Any, is_bos: bool, max_prefill_length: int
    ) -> tuple[np.ndarray, int]:
        tokens = request.prefill_content
        return padded(tokens), len(tokens)


class Drivers:
    """The driver there is, for JetStream to see as one that does not fail."""

    def __init__(self, served: ServedModel, slots: int, most: int):
        self._engine = served.engine(slots, kind=JetStreamEngine)
        self._engine.served = served
        self._params, self._most = served.trained.params, most
        self._lock = threading.Lock()
        self._requests: dict[int, Any] = {}
        self.live, self.draining = True, False
        self._driver = self._make()

    def _make(self) -> _Driver:
        return _Driver(self._engine, self._params, self._replace)

    @property
    def active(self) -> int:
        """Requests in work or waiting."""
        return len(self._requests)

    def place_request_on_prefill_queue(self, request: Any) -> None:
        """Take on a request; queue.Full when there are too many."""
        with self._lock:
            if len(self._requests) >= self._most:
                raise queue.Full
            self._requests[id(request)] = request
            self._driver.place_request_on_prefill_queue(request)

    def release(self, request: Any) -> None:
        """The request has ended, or nobody waits for it: its slot is free at the next step."""
        request.max_tokens = 0
        with self._lock:
            self._requests.pop(id(request), None)

    def stop(self) -> None:
        """End all threads, and wait for them: a process that exits under one that runs aborts."""
        self.live = False
        self._driver.end().join(STOP_S)

    def _replace(self, failed: _Driver) -> None:
        with self._lock:
            # Its end takes them away from the requests.
            channels = [request.return_channel for request in self._requests.values()]
            self._requests = {}
            failed.end()
            if self.live:
                self._driver = self._make()
        for channel in channels:
            with contextlib.suppress(RuntimeError):  # its event loop has ended
                channel.set_exception(EngineFailed("the engine failed"))


class _Service(_orchestrator.LLMOrchestrator):
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
        active = _orchestrator.ActiveRequest(
            max_tokens=request.max_tokens,
            return_channel=channel,
            prefill_content=tokens,
            is_client_side_tokenization=True,
        )
        request_id = new_id("grpc")
        try:
            self._drivers.place_request_on_prefill_queue(active)
            async for response in self._responses(channel, request.HasField("text_content")):
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

    async def _responses(self, channel: Any, as_text: bool) -> AsyncIterator[Any]:
        """A message for every token that completes a character, or for every token."""
        detokenizer, held = Detokenizer(self._served.tokenizer), []
        async for (sample,) in channel:
            if not sample.token_ids:
                continue
            held += sample.token_ids
            text = "".join(map(detokenizer.feed, sample.token_ids)) if as_text else ""
            if text or not as_text:
                yield _response(text, held)
                held = []
        if held:
            yield _response(detokenizer.flush(), held)

    def _prompt(self, request: Any) -> np.ndarray:
        """Ids of the prompt; InputError when it, or max_tokens, cannot be served."""
        served, limits = self._served, self._served.limits
        kind = request.WhichOneof("content")
        if kind == "text_content":
            tokens = served.text_prompt(request.text_content.text)
        else:
            tokens = np.array(request.token_content.token_ids, np.int32)
        size = served.tokenizer.vocab_size
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
        with _replaced(_server_lib, _HOST=shown), _replaced(_orchestrator, LLMOrchestrator=service):
            self._server = _server_lib.JetStreamServer(
                self.drivers, threads=4, port=port, credentials=grpc.insecure_server_credentials()
            )

    def start(self) -> None:
        """Begin to listen."""
        self._server.start()

    async def drain(self) -> None:
        """Take on nothing more, and return when all requests have ended."""
        self.drivers.draining = True
        while self.drivers.active:
            await asyncio.sleep(0.05)

    def stop(self) -> None:
        """End the server and its threads."""
        self._server.stop()
