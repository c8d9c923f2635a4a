"""`nrt-jax serve`: open a model, listen, and drain when told to stop."""

import asyncio
import contextlib
import importlib
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import numpy as np
import uvicorn

from nrt_jax.config.load import load_config
from nrt_jax.config.serving import ServingConfig
from nrt_jax.engine.scheduler import Scheduler
from nrt_jax.errors import InputError
from nrt_jax.serving.access import Address, Keys, Tls, load_keys, load_tls, resolve
from nrt_jax.serving.admission import Admission
from nrt_jax.serving.app import OpenAIServer
from nrt_jax.serving.engine_loop import STOP_S, EngineLoop
from nrt_jax.serving.metrics import Metrics
from nrt_jax.serving.served_model import ServedModel, open_served
from nrt_jax.stop import StopRequest

if TYPE_CHECKING:
    # It imports grpc and JetStream's orchestrator, which grpc_port=null does not need.
    from nrt_jax.serving.jetstream_grpc import GrpcServer

log = logging.getLogger(__name__)

LEAVE_S = 2.0
"""Seconds to wait for the engines' current step after a second signal."""


class Access(NamedTuple):
    """Where the servers listen, and who may ask."""

    address: Address
    keys: Keys | None
    tls: Tls | None


def serve(model: Path, overrides: Sequence[str]) -> None:
    """Answer requests until SIGTERM or Ctrl-C, then finish the running ones and return.

    Overrides `field=value` configure the server; `section.field=value` and `method=value` configure
    the model. Raises InputError for a bad setting, for a path without a model, for a port that is
    taken, and for a host that needs a key.
    """
    of_model = [word for word in overrides if _configures_model(word)]
    with StopRequest() as stop:
        of_server = [word for word in overrides if word not in of_model]
        _refuse_keys(of_server)
        config = with_installed_servers(load_config(ServingConfig, [], of_server))
        access = open_access(config)
        with listen(access.address.host, config.port, "port") as listening, _memory(config):
            grpc_port = None if config.grpc_port is None else free_port(config)
            served = open_served(model, config, of_model)
            grpc = None if grpc_port is None else start_grpc(served, config, grpc_port, access)
            try:
                asyncio.run(_serve(served, config, access, listening, grpc))
                # A further signal must not kill the process while it exits.
                stop.requested = True
            finally:
                if grpc is not None:
                    grpc.stop()


def open_access(config: ServingConfig) -> Access:
    """Keys, TLS files and address of a config. Raises InputError."""
    keys = load_keys(config)
    return Access(resolve(config, keys), keys, load_tls(config))


def _refuse_keys(overrides: Sequence[str]) -> None:
    for override in overrides:
        if override.partition("=")[0] in ("api_key", "api_keys"):
            raise InputError(
                "api_key: every user of this machine sees command lines; write the key into a file "
                "and set api_key_file=FILE, or export a variable and set api_key_env=NAME"
            )


@contextlib.contextmanager
def _memory(config: ServingConfig) -> Iterator[None]:
    """Turn a lack of device memory into an InputError."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(
            f"slots={config.slots}, grpc_slots={config.grpc_slots}: weights and caches do not fit "
            "into the device's memory; lower them, max_prompt_tokens or max_new_tokens, or set "
            "grpc_port=null"
        ) from None


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


def start_grpc(
    served: ServedModel, config: ServingConfig, port: int, access: Access | None = None
) -> "GrpcServer":
    """Start the gRPC server of a model."""
    from nrt_jax.serving.jetstream_grpc import GrpcServer

    address, keys, tls = open_access(config) if access is None else access
    server = GrpcServer(served, config, address, port, keys, tls)
    server.start()
    return server


def make_server(
    served: ServedModel,
    config: ServingConfig,
    access: Access | None = None,
    grpc_healthy: Callable[[], bool] = lambda: True,
) -> OpenAIServer:
    """The HTTP server of a model; its engine is built and not yet started."""
    keys = open_access(config).keys if access is None else access.keys
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
    return OpenAIServer(served, engine, config, admission, metrics, keys, grpc_healthy)


class _Uvicorn(uvicorn.Server):
    """Leaves signals to us: it would stop listening before /health could say so."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Signals:
    """SIGTERM and Ctrl-C while the server runs: the first one drains, the second cuts off.

    Made in the main thread, where its event loop runs.
    """

    def __init__(self) -> None:
        self.drain, self.leave = asyncio.Event(), asyncio.Event()
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> "_Signals":
        # The command line ends the process at the second Ctrl-C, which it would learn here.
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # The loop may be in the middle of anything.
        self._loop.call_soon_threadsafe(self._note)

    def _note(self) -> None:
        (self.leave if self.drain.is_set() else self.drain).set()


async def _serve(
    served: ServedModel,
    config: ServingConfig,
    access: Access,
    listening: socket.socket,
    grpc: "GrpcServer | None",
) -> None:
    healthy = (lambda: True) if grpc is None else (lambda: grpc.drivers.healthy)
    api = make_server(served, config, access, healthy)
    http = _Uvicorn(
        uvicorn.Config(
            api.app(),
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=1,
            ssl_certfile=None if access.tls is None else access.tls.certfile,
            ssl_keyfile=None if access.tls is None else access.tls.keyfile,
        )
    )
    with _Signals() as signals:
        api.engine.start()
        running = asyncio.create_task(http.serve([listening]))
        while not (http.started or running.done()):
            await asyncio.sleep(0.01)
        if http.started:
            print(_announcement(served, access, listening, grpc), flush=True)
        try:
            await _first_of(running, signals.drain.wait())
            await _drain(api, grpc, config.drain_s, signals.leave)
        finally:
            ended = await _stop_engines(api, grpc, signals.leave)
            http.should_exit = True
            await running
            if not ended:
                _leave()


def _announcement(
    served: ServedModel, access: Access, listening: socket.socket, grpc: "GrpcServer | None"
) -> str:
    secure, host, port = "s" * bool(access.tls), access.address.in_url, listening.getsockname()[1]
    also = "" if grpc is None else f" and grpc{secure}://{host}:{grpc.port}"
    what = served.opened.description
    return f"serving {served.name} ({what}) on http{secure}://{host}:{port}{also}"


async def _first_of(*work: Awaitable[Any], seconds: float | None = None) -> None:
    """Return when the first of them is done, or after `seconds`; the coroutines are cancelled."""
    tasks = [asyncio.ensure_future(part) for part in work]
    await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    for part, task in zip(work, tasks, strict=True):
        if part is not task:
            task.cancel()


async def _drain(
    api: OpenAIServer, grpc: "GrpcServer | None", seconds: float, leave: asyncio.Event
) -> None:
    """Refuse new requests, and wait for the running ones, up to `seconds` or to `leave`."""

    def left() -> int:
        over_grpc = 0 if grpc is None else grpc.drivers.active
        return api.admission.running + api.admission.waiting + over_grpc

    async def all_ended() -> None:
        drains = [api.admission.drain()] if grpc is None else [api.admission.drain(), grpc.drain()]
        await asyncio.gather(*drains)

    log.info("draining: %d requests are under way", left())
    await _first_of(all_ended(), leave.wait(), seconds=seconds)
    if left():
        why = "told to stop again" if leave.is_set() else f"drain_s={seconds:g} is over"
        log.warning("%s; %d requests are cut off", why, left())


async def _stop_engines(api: OpenAIServer, grpc: "GrpcServer | None", leave: asyncio.Event) -> bool:
    """End the engines' threads after their current step; whether they have ended."""
    loop, stopped, ended = asyncio.get_running_loop(), asyncio.Event(), [False]

    def stop() -> None:
        over_grpc = grpc is None or grpc.stop(STOP_S)
        ended[0] = api.engine.stop(STOP_S) and over_grpc
        loop.call_soon_threadsafe(stopped.set)

    # Not one of asyncio's own threads: the loop would wait for it without end.
    threading.Thread(target=stop, daemon=True).start()
    await _first_of(stopped.wait(), leave.wait())
    await _first_of(stopped.wait(), seconds=LEAVE_S)
    return ended[0]


def _leave() -> None:
    """Exit while a thread is in a step: a regular exit would abort the process."""
    log.warning("an engine's step has not ended; the process exits without it")
    logging.shutdown()
    with contextlib.suppress(OSError):  # its reader may be gone
        sys.stdout.flush()
    os._exit(0)
