"""gRPC: every call gets an answer, whatever fails; and who may call."""

import contextlib
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving import jetstream, jetstream_drivers
from nrt_jax.serving.jetstream_grpc import GrpcServer, messages, services
from nrt_jax.serving.server import free_port, start_grpc
from tests.engine.toy import engine, params
from tests.serving.live import wait_until
from tests.serving.models import NEW
from tests.serving.test_jetstream_grpc import decode, of_ids
from tests.serving.tls_files import write_pair

TOKENS = [5, 6, 7]


@contextlib.contextmanager
def serving(served, **settings) -> Iterator[tuple[GrpcServer, Any]]:
    config = ServingConfig(**{"grpc_port": 0, "grpc_slots": 2, "grpc_queue": 8} | settings)
    server = start_grpc(served, config, free_port(config))
    try:
        with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
            yield server, services.OrchestratorStub(channel)
    finally:
        server.stop()


def outcome(stub, request=None, **options) -> grpc.RpcError:
    """How a call ended that must fail, and not by the client's own time limit."""
    with pytest.raises(grpc.RpcError) as ended:
        list(stub.Decode(of_ids(TOKENS) if request is None else request, timeout=60, **options))
    assert "Deadline Exceeded" not in str(ended.value.details())
    return ended.value


def is_live(stub) -> bool:
    return stub.HealthCheck(messages.HealthCheckRequest()).is_live


def fails(*args, **kwargs):
    raise RuntimeError("boom")


def test_a_driver_that_cannot_be_built_anew(served, monkeypatch, caplog):
    """Nobody waits for the dead one, the health check says so, and it comes back by itself."""
    monkeypatch.setattr(jetstream_drivers, "pauses", lambda: iter([0.05] * 9999))
    with serving(served) as (server, stub):
        expected = decode(stub, of_ids(TOKENS))
        run = server.drivers._engine
        monkeypatch.setattr(run, "generate", fails)
        monkeypatch.setattr(run, "allocate", fails)
        with caplog.at_level(logging.ERROR):
            calls = [stub.Decode(of_ids(TOKENS), timeout=60) for _ in range(5)]
            for call in calls:
                with pytest.raises(grpc.RpcError) as ended:
                    list(call)
                assert ended.value.code() == grpc.StatusCode.INTERNAL
            wait_until(lambda: "cannot be built anew; next try in 0.05 s" in caplog.text)
        assert not is_live(stub)
        assert not server.drivers.healthy
        assert outcome(stub).code() == grpc.StatusCode.INTERNAL
        assert not server.drivers.active
        monkeypatch.undo()
        wait_until(lambda: is_live(stub))
        assert decode(stub, of_ids(TOKENS)) == expected


def test_calls_that_come_while_a_driver_is_built_get_it(served, monkeypatch):
    with serving(served) as (server, stub):
        expected = decode(stub, of_ids(TOKENS))
        run, may_build = server.drivers._engine, threading.Event()
        allocate = run.allocate
        monkeypatch.setattr(run, "allocate", lambda: (may_build.wait(60), allocate()))
        with monkeypatch.context() as broken:
            broken.setattr(run, "generate", fails)
            assert outcome(stub).code() == grpc.StatusCode.INTERNAL
        got = []
        late = threading.Thread(target=lambda: got.append(decode(stub, of_ids(TOKENS))))
        late.start()
        wait_until(lambda: server.drivers.active == 1)
        assert not got
        may_build.set()
        late.join()
        assert got == [expected]


def test_threads_of_a_driver_that_cannot_be_started(monkeypatch):
    """Those that were started before end too: they hold the decode state."""
    started = []
    start = jetstream._Thread.start

    def third_fails(thread):
        started.append(thread)
        if len(started) == 3:
            raise RuntimeError("can't start new thread")
        start(thread)

    monkeypatch.setattr(jetstream._Thread, "start", third_fails)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        jetstream.Driver(jetstream.JetStreamEngine(engine()), params(), lambda *_: None)
    assert [thread.ident is None for thread in started] == [False, False, True]
    assert not any(thread.is_alive() for thread in started)


def test_stopping_ends_the_calls_under_way(served, monkeypatch):
    with serving(served) as (server, stub):
        run, go_on = server.drivers._engine, threading.Event()
        generate = run.generate
        monkeypatch.setattr(run, "generate", lambda *args: (go_on.wait(60), generate(*args))[1])
        calls = [stub.Decode(of_ids(TOKENS), timeout=60) for _ in range(4)]
        wait_until(lambda: server.drivers.active == 4)
        stopping = threading.Thread(target=server.stop)
        stopping.start()
        for call in calls:  # before the step ends
            with pytest.raises(grpc.RpcError) as ended:
                list(call)
            assert ended.value.code() == grpc.StatusCode.UNAVAILABLE
        go_on.set()
        stopping.join()
        assert server.stop()


def test_a_step_that_does_not_end_does_not_keep_the_server(served, monkeypatch):
    with serving(served) as (server, stub):
        run, go_on, in_step = server.drivers._engine, threading.Event(), threading.Event()
        generate = run.generate

        def hangs(*args):
            in_step.set()
            go_on.wait(60)
            return generate(*args)

        monkeypatch.setattr(run, "generate", hangs)
        call = stub.Decode(of_ids(TOKENS), timeout=60)
        assert in_step.wait(60)
        began = time.monotonic()
        assert not server.drivers.stop(0.2)
        assert time.monotonic() - began < 30
        with pytest.raises(grpc.RpcError):
            list(call)
        go_on.set()


def test_a_call_that_takes_too_long(served, monkeypatch):
    with serving(served, request_timeout_s=0.3) as (server, stub):
        run, go_on = server.drivers._engine, threading.Event()
        generate = run.generate
        monkeypatch.setattr(run, "generate", lambda *args: (go_on.wait(60), generate(*args))[1])
        ended = outcome(stub)
        assert ended.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        assert ended.details() == "not answered in 0.3 s"
        wait_until(lambda: not server.drivers.active)
        go_on.set()


def test_a_mistake_of_ours_is_one_line_for_the_client(served, monkeypatch, caplog):
    with serving(served) as (server, stub):
        monkeypatch.setattr("nrt_jax.serving.jetstream_grpc.Detokenizer", fails)
        with caplog.at_level(logging.ERROR):
            ended = outcome(stub)
        assert ended.code() == grpc.StatusCode.INTERNAL
        assert "boom" not in str(ended.details())
        assert "RuntimeError: boom" in caplog.text
        assert not server.drivers.active


def test_a_port_that_is_taken_in_the_last_moment(served):
    with serving(served) as (server, _):
        config = ServingConfig(grpc_port=server.port, grpc_slots=2)
        with pytest.raises(ValueError, match=f"grpc_port={server.port}: cannot be listened on"):
            start_grpc(served, config, server.port)
        assert [t.name for t in threading.enumerate()].count("grpc") == 1


# --- who may call ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def guarded(served, tmp_path_factory):
    path = tmp_path_factory.mktemp("guarded") / "keys"
    path.write_text("first-key\nsecond-key\n")
    with serving(served, api_key_file=path) as (_, stub):
        yield stub


@pytest.mark.parametrize(
    "sent",
    [
        [],
        [("authorization", "first-key")],
        [("authorization", "Bearer wrong")],
        [("authorization", "Bearer " + "k" * 4000)],
        [("authorization", "Bearer first-key"), ("authorization", "Bearer first-key")],
        [("authorization-bin", b"Bearer first-key")],
        [("api-key", "first-key")],
    ],
)
def test_calls_without_a_key(guarded, sent):
    ended = outcome(guarded, metadata=sent)
    assert ended.code() == grpc.StatusCode.UNAUTHENTICATED
    assert "authorization: Bearer KEY" in str(ended.details())
    assert is_live(guarded)


@pytest.mark.parametrize("key", ["first-key", "second-key"])
def test_calls_with_a_key(guarded, key):
    sent = [("authorization", f"Bearer {key}")]
    assert list(guarded.Decode(of_ids(TOKENS, 3), metadata=sent, timeout=60))


def test_calls_over_tls(served, tmp_path):
    certificate, key = write_pair(tmp_path)
    with serving(served, ssl_certfile=certificate, ssl_keyfile=key) as (server, plain):
        trusting = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(f"127.0.0.1:{server.port}", trusting) as channel:
            stub = services.OrchestratorStub(channel)
            assert len(list(stub.Decode(of_ids(TOKENS, NEW), timeout=60))) > 1
        assert outcome(plain).code() == grpc.StatusCode.UNAVAILABLE


def test_the_server_listens_where_it_is_told(served):
    with serving(served, host="127.0.0.9") as (server, elsewhere):
        with grpc.insecure_channel(f"127.0.0.9:{server.port}") as channel:
            assert is_live(services.OrchestratorStub(channel))
        with pytest.raises(grpc.RpcError):
            is_live(elsewhere)
