"""The HTTP application: routes, limits and errors of completions and chats."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from nrt_jax.config.serving import ServingConfig
from nrt_jax.errors import InputError
from nrt_jax.serving.access import Guard, Keys
from nrt_jax.serving.admission import Admission
from nrt_jax.serving.call import Call
from nrt_jax.serving.chat import Chat
from nrt_jax.serving.completions import Completion
from nrt_jax.serving.engine_loop import EngineFailed, EngineLoop, EngineStopped
from nrt_jax.serving.http_exchange import (
    CLIENT_GONE,
    ClientGone,
    EventStream,
    Exchanges,
    read_body,
    unless_gone,
)
from nrt_jax.serving.metrics import Metrics
from nrt_jax.serving.openapi import document
from nrt_jax.serving.protocol import (
    ApiError,
    JsonResponse,
    dump,
    error_response,
)
from nrt_jax.serving.request_fields import ChatRequest, CompletionRequest, parse
from nrt_jax.serving.served_model import ServedModel

log = logging.getLogger(__name__)

KINDS = {
    "/v1/completions": (CompletionRequest, Completion),
    "/v1/chat/completions": (ChatRequest, Chat),
}
ROUTES = frozenset([*KINDS, "/v1/models", "/health", "/metrics", "/openapi.json"])

Job = Completion | Chat


@dataclass
class OpenAIServer:
    """The routes and what they share."""

    served: ServedModel
    engine: EngineLoop
    config: ServingConfig
    admission: Admission
    metrics: Metrics
    keys: Keys | None = None
    grpc_healthy: Callable[[], bool] = lambda: True

    def __post_init__(self) -> None:
        self._started = int(time.time())
        admission, engine = self.admission, self.engine
        for name, description, value in (
            ("requests_running", "Requests in work.", lambda: admission.running),
            ("requests_waiting", "Requests in the queue.", lambda: admission.waiting),
            ("slots_in_use", "Sequences that are decoded.", lambda: engine.slots_in_use),
            ("slots", "Sequences that can be.", lambda: self.config.slots),
            ("sequences_waiting", "Sequences without a slot.", lambda: engine.waiting),
        ):
            self.metrics.gauge(name, description, value)

    def app(self) -> FastAPI:
        """The ASGI application."""
        app = FastAPI(title="nrt-jax serve", openapi_url=None)
        for path in KINDS:
            app.add_api_route(path, self._answer, methods=["POST"], response_model=None)
        app.add_api_route("/v1/models", self._models, response_model=None)
        app.add_api_route("/v1/models/{name:path}", self._model, response_model=None)
        app.add_api_route("/health", self._health, response_model=None)
        app.add_api_route("/metrics", self._show_metrics, response_model=None)
        app.add_api_route("/openapi.json", self._openapi, response_model=None)
        app.add_exception_handler(HTTPException, _http_error)
        if self.keys is not None:
            app.add_middleware(Guard, keys=self.keys)
        app.add_middleware(Exchanges, metrics=self.metrics, routes=ROUTES)
        return app

    async def _answer(self, request: Request) -> Response:
        request_id: str = request.state.request_id
        call = Call(self.engine, self.metrics, request_id, self.config.request_timeout_s)
        try:
            async with AsyncExitStack() as stack:
                stack.callback(call.close)
                async with asyncio.timeout_at(call.deadline):
                    return await self._begin(request, call, stack)
        except ClientGone:
            return Response(status_code=CLIENT_GONE)
        except TimeoutError:
            return error_response(call.timed_out())
        except Exception as error:
            return error_response(_api_error(error, request_id))

    async def _begin(self, request: Request, call: Call, stack: AsyncExitStack) -> Response:
        """The whole answer, or a stream that has its first chunk and holds `stack`."""
        job = await self._read(request)
        admitted = self.admission.admit()
        await unless_gone(request, stack.enter_async_context(admitted))
        self.metrics.tokens_in.inc(job.prompt_tokens)
        if not job.body.stream:
            return JsonResponse(await unless_gone(request, job.run(call)))
        chunks = job.stream(call)
        stack.push_async_callback(chunks.aclose)
        # A failure before the first chunk still gets its own status.
        first = await unless_gone(request, anext(chunks))
        return EventStream(_events(first, chunks, call.id), stack.pop_all())

    async def _read(self, request: Request) -> Job:
        if self.admission.draining:
            raise ApiError(503, "the server is shutting down; ask another one", code="draining")
        schema, kind = KINDS[request.url.path]
        body = parse(schema, await read_body(request, self.config.max_body_bytes))
        self._check_name(body.model)
        # In a thread: a large body takes long to tokenise.
        return await asyncio.to_thread(
            kind.prepare,
            self.served,
            body,
            sequences=self.config.max_sequences,
            top=self.config.top_logprobs,
        )

    def _check_name(self, name: str) -> None:
        if name != self.served.name:
            raise ApiError(
                404,
                f"no model {name[:60]!r} here; there is {self.served.name!r}",
                param="model",
                code="model_not_found",
            )

    # --- other routes -----------------------------------------------------------------------------

    async def _models(self) -> Response:
        return JsonResponse({"object": "list", "data": [self._card()]})

    async def _model(self, name: str) -> Response:
        try:
            self._check_name(name)
        except ApiError as error:
            return error_response(error)
        return JsonResponse(self._card())

    def _card(self) -> dict[str, Any]:
        limits = self.served.limits
        return {
            "id": self.served.name,
            "object": "model",
            "created": self._started,
            "owned_by": "nrt-jax",
            "max_model_len": limits.context,
            "max_prompt_tokens": limits.prompt,
            "max_new_tokens": limits.new,
            "reasons": self.served.reasons,
            "step": self.served.opened.step,
        }

    async def _health(self) -> Response:
        if self.admission.draining:
            return JsonResponse({"status": "draining"}, 503)
        if not self.engine.healthy:
            return JsonResponse({"status": "the engine failed"}, 503)
        if not self.grpc_healthy():
            return JsonResponse({"status": "the engine of gRPC failed"}, 503)
        return JsonResponse({"status": "ok"})

    async def _openapi(self) -> Response:
        return JsonResponse(document(self.served, self.config, keys=self.keys is not None))

    async def _show_metrics(self) -> Response:
        return Response(
            generate_latest(self.metrics.registry), headers={"Content-Type": CONTENT_TYPE_LATEST}
        )


async def _events(
    first: dict[str, Any], chunks: AsyncGenerator[dict[str, Any], None], request_id: str
) -> AsyncGenerator[str, None]:
    """The chunks as server-sent events; an error is the last event, as the status is sent."""
    try:
        yield _event(first)
        async for chunk in chunks:
            yield _event(chunk)
        yield "data: [DONE]\n\n"
    except Exception as error:
        yield _event(_api_error(error, request_id).body)


def _event(content: dict[str, Any]) -> str:
    return f"data: {dump(content)}\n\n"


def _api_error(error: Exception, request_id: str) -> ApiError:
    """The error that the client gets; for a mistake of ours only its id, and the log has more."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, InputError):
        return ApiError(400, str(error))
    if isinstance(error, EngineStopped):
        return ApiError(503, "the server is shutting down; ask another one", code="draining")
    if not isinstance(error, EngineFailed):
        log.error("request %s failed", request_id, exc_info=error)
    return ApiError(500, f"internal error; the server's log has more on request {request_id}")


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    where = f"{request.method} {request.url.path[:60]}"
    return error_response(
        ApiError(error.status_code, f"{where}: {error.detail}", headers=error.headers)
    )
