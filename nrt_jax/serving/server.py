"""`nrt-jax serve`: open a model, listen, and drain when told to stop."""

import asyncio
import contextlib
import importlib
import logging
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import uvicorn

from nrt_jax.config.load import load_config
from nrt_jax.config.serving import ServingConfig
from nrt_jax.engine.scheduler import Scheduler
from nrt_jax.errors import InputError
from nrt_jax.serving.admission import Admission
from nrt_jax.serving.app import OpenAIServer
from nrt_jax.serving.engine_loop import EngineLoop
from nrt_jax.serving.metrics import Metrics
from nrt_jax.serving.served_model import ServedModel, open_served
from nrt_jax.stop import StopRequest

if TYPE_CHECKING:
    # It imports grpc and JetStream's orchestrator, which grpc_port=null does not need.
    from nrt_jax.serving.jetstream_grpc import GrpcServer

log = logging.getLogger(__name__)


def serve(model: Path, overrides: Sequence[str]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish the running ones and return.

    Overrides `field=value` configure the server; `section.field=value` and `method=value` configure
    the model. Raises InputError for a bad setting, for a path without a model and for a port that
    is taken.
    """
    of_model = [word for word in overrides if _configures_model(word)]
    with StopRequest():
        of_server = [word for word in overrides if word not in of_model]
        config = with_installed_servers(load_config(ServingConfig, [], of_server))
        with listen(config.host, config.port, "port") as listening:
            grpc_port = None if config.grpc_port is None else free_port(config)
            served = open_served(model, config, of_model)
            grpc = None if grpc_port is None else start_grpc(served, config, grpc_port)
            try:
                asyncio.run(_serve(served, config, listening, grpc))
            finally:
                if grpc is not None:
                    grpc.stop()


def _configures_model(override: str) -> bool:
    key = override.partition("=")[0]
    return "." in key or key == "method"


def with_installed_servers(config: ServingConfig) -> ServingConfig:
    """The config without gRPC where its packages are missing and nobody asked for it.

    Raises InputError when `grpc_port` is set and they are missing.
    """
    if config.grpc_port is None:
        return config
    try:
        importlib.import_module("nrt_jax.serving.jetstream_grpc")
    except ModuleNotFoundError as missing:
        remedy = "pip install 'nrt-jax[jetstream]'"
        if "grpc_port" in config.model_fields_set:
            raise InputError(
                f"grpc_port={config.grpc_port}: the package {missing.name} is not installed; "
                f"{remedy}, or set grpc_port=null"
            ) from None
        log.info("gRPC is off: the package %s is not installed; %s", missing.name, remedy)
        return config.model_copy(update={"grpc_port": None})
    return config


def listen(host: str, port: int, name: str) -> socket.socket:
    """A socket bound to the port; InputError when it cannot be."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{name}={port}: {reason} on host={host}; choose another") from None
    return bound


def free_port(config: ServingConfig) -> int:
    """A port for the gRPC server, which takes a number, not a socket."""
    assert config.grpc_port is not None
    with listen(config.host, config.grpc_port, "grpc_port") as found:
        return found.getsockname()[1]


def start_grpc(served: ServedModel, config: ServingConfig, port: int) -> "GrpcServer":
    """Start the gRPC server of a model."""
    from nrt_jax.serving.jetstream_grpc import GrpcServer

    server = GrpcServer(served, config.host, port, slots=config.grpc_slots, most=config.grpc_queue)
    server.start()
    return server


def make_server(served: ServedModel, config: ServingConfig) -> OpenAIServer:
    """The HTTP server of a model; its engine is built and not yet started."""
    decoder = served.engine(config.slots, config.top_logprobs)
    params, metrics = served.opened.params, Metrics()

    def score(tokens: np.ndarray) -> tuple[Any, Any, Any]:
        return decoder.prompt_logprobs(params, tokens, config.top_logprobs)

    engine = EngineLoop(
        lambda: Scheduler(decoder, params, steps=config.decode_steps),
        score,
        seed=config.seed,
        on_failure=metrics.errors.inc,
    )
    admission = Admission(config.max_concurrent_requests, config.queue)
    return OpenAIServer(served, engine, config, admission, metrics)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: it would stop listening before /health could say so."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


async def _serve(
    served: ServedModel,
    config: ServingConfig,
    listening: socket.socket,
    grpc: "GrpcServer | None",
) -> None:
    api = make_server(served, config)
    http = _Uvicorn(
        uvicorn.Config(
            api.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=1,
        )
    )
    asked = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, asked.set)
    api.engine.start()
    running = asyncio.create_task(http.serve([listening]))
    while not (http.started or running.done()):
        await asyncio.sleep(0.01)
    host, port = listening.getsockname()[:2]
    also = "" if grpc is None else f" and grpc://{host}:{grpc.port}"
    what = served.opened.description
    print(f"serving {served.name} ({what}) on http://{host}:{port}{also}", flush=True)
    try:
        await asyncio.wait(
            (running, asyncio.create_task(asked.wait())), return_when=asyncio.FIRST_COMPLETED
        )
        await _drain(api, grpc, config.drain_s)
        http.should_exit = True
        await running
    finally:
        api.engine.stop()


async def _drain(api: OpenAIServer, grpc: "GrpcServer | None", seconds: float) -> None:
    """Refuse new requests, and wait up to `seconds` for the running ones."""

    def left() -> int:
        over_grpc = 0 if grpc is None else grpc.drivers.active
        return api.admission.running + api.admission.waiting + over_grpc

    log.info("draining: %d requests are under way", left())
    drains = [api.admission.drain()] if grpc is None else [api.admission.drain(), grpc.drain()]
    try:
        async with asyncio.timeout(seconds):
            await asyncio.gather(*drains)
    except TimeoutError:
        log.warning("drain_s=%g is over; %d requests are cut off", seconds, left())
