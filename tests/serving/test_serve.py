"""`nrt-jax serve` as a process: what it prints, how it ends, what it refuses."""

import asyncio
import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from nrt_jax.cli import main
from nrt_jax.serving import server
from nrt_jax.serving.app import OpenAIServer
from tests.data.templates import TEMPLATES
from tests.serving.live import wait_until
from tests.serving.runs import STEP, write_chat_model, write_run
from tests.training.runs import REPOSITORY, Process

SMALL = ("slots=4", "decode_steps=4", "max_sequences=1024")
READY = re.compile(r"serving (\S+) \((.+)\) on http://127\.0\.0\.1:(\d+)(.*)\n")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("served"))


@contextlib.contextmanager
def serving(
    run: Path, folder: Path, *overrides: str, what: str = f"step {STEP}"
) -> Iterator[tuple[Process, int, str]]:
    """A server process, its port, and what it says besides."""
    process = Process(["serve", str(run), "port=0", *overrides], folder)
    out = folder / "out"
    assert process.wait_until(lambda: READY.search(out.read_text()) is not None), process.end()
    found = READY.search(out.read_text())
    assert found is not None
    assert found.groups()[:2] == (run.name, what)
    try:
        yield process, int(found[3]), found[4]
    finally:
        process.process.kill()
        process.process.join()


def connect(port: int, body: dict) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/v1/completions", json.dumps({"model": "run"} | body))
    return connection


def health(port: int) -> int:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", "/health")
        return connection.getresponse().status


LONG = {"prompt": [[7, 16, 8]] * 8, "max_tokens": 32, "n": 128, "temperature": 1, "stream": True}
"""1,024 texts in 4 slots: some thousands of steps, which no machine makes in a moment."""


def test_sigterm_drains(run, tmp_path):
    with serving(run, tmp_path, *SMALL, "grpc_port=0") as (
        process,
        port,
        also,
    ):
        assert re.fullmatch(r" and grpc://127\.0\.0\.1:\d+", also)
        under_way = connect(port, LONG).getresponse()
        text = under_way.read(50)
        process.signal(signal.SIGTERM)
        wait_until(lambda: health(port) == 503)
        refused = connect(port, {"prompt": "1"}).getresponse()
        assert refused.status == 503
        assert json.loads(refused.read())["error"]["code"] == "draining"
        # What is under way ends as it would have.
        text += under_way.read()
        assert text.endswith(b"data: [DONE]\n\n")
        outcome = process.end()
        assert outcome.status == 0
        assert "draining: 1 requests are under way" in outcome.err
        assert "cut off" not in outcome.err


def test_a_drain_that_takes_too_long_is_cut_off(run, tmp_path):
    settings = (*SMALL, "grpc_port=null", "drain_s=0.01")
    with serving(run, tmp_path, *settings) as (process, port, _):
        response = connect(port, LONG).getresponse()
        response.read(50)
        process.signal(signal.SIGTERM)
        outcome = process.end()
        assert outcome.status == 0
        assert "drain_s=0.01 is over; 1 requests are cut off" in outcome.err


def test_a_second_sigterm_cuts_the_drain_short(run, tmp_path):
    with serving(run, tmp_path, *SMALL, "grpc_port=0", "drain_s=600") as (process, port, _):
        response = connect(port, LONG).getresponse()
        response.read(50)
        process.signal(signal.SIGTERM)
        wait_until(lambda: health(port) == 503)
        process.signal(signal.SIGTERM)
        text = response.read()
        # A third one, while the process exits, changes nothing.
        process.signal(signal.SIGTERM)
        outcome = process.end()
    assert outcome.status == 0
    assert (
        json.loads(text.split(b"\n\n")[-2].removeprefix(b"data: "))["error"]["code"] == "draining"
    )
    assert "told to stop again; 1 requests are cut off" in outcome.err
    assert "Traceback" not in outcome.err


def test_a_step_that_does_not_end_is_left_after_a_second_signal(monkeypatch):
    monkeypatch.setattr(server, "LEAVE_S", 0.1)
    go_on = threading.Event()
    api = object.__new__(OpenAIServer)
    api.engine = SimpleNamespace(stop=lambda seconds: go_on.wait(seconds))

    async def stop() -> bool:
        leave = asyncio.Event()
        asyncio.get_running_loop().call_later(0.1, leave.set)
        async with asyncio.timeout(30):
            return await server._stop_engines(api, None, leave)

    assert asyncio.run(stop()) is False
    go_on.set()
    assert asyncio.run(stop()) is True


def test_a_hugging_face_directory(tmp_path):
    """Overrides with a section are the model's, the others the server's."""
    model = write_chat_model(tmp_path / "chat", TEMPLATES["llama3"])
    settings = (*SMALL, "grpc_port=null", "data.template=plain", "max_new_tokens=3")
    with serving(model, tmp_path, *settings, what="Hugging Face directory") as (process, port, _):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        body = {"model": "chat", "messages": [{"role": "user", "content": "a"}]}
        connection.request("POST", "/v1/chat/completions", json.dumps(body))
        answer = json.loads(connection.getresponse().read())
        connection.close()
        # The beginning of sequence and one letter; with its chat template they would be many.
        assert answer["usage"]["prompt_tokens"] == 2
        assert answer["usage"]["completion_tokens"] == 3
        process.signal(signal.SIGTERM)
        outcome = process.end()
    assert outcome.status == 0
    assert "answers directly" in outcome.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.tmplate=tulu", "override data.tmplate=tulu: unknown key; did you mean 'template'?"),
        ("method=none", "override method=none: must be 'nrt' or 'sft'"),
        ("prot=1", "override prot=1: unknown key; did you mean 'port'?"),
        ("port=70000", "override port=70000: must be less than or equal to 65535"),
        ("slots=0", "override slots=0: must be greater than or equal to 1"),
        ("host=nowhere.invalid", "on host=nowhere.invalid; choose another"),
        ("host=0.0.0.0", "host=0.0.0.0: others reach this address, and no key is asked for; set"),
        ("api_key=s3cret", "api_key: every user of this machine sees command lines; write the"),
        ("ssl_certfile=c", "ssl_certfile and ssl_keyfile: set both, or neither"),
        ("max_new_tokens=3", "max_new_tokens=3: t_start, trace, t_end and answer need 4 tokens"),
    ],
)
def test_settings(run, override, said, capsys):
    assert main(["serve", str(run), "port=0", "grpc_port=null", override]) == 2
    err = capsys.readouterr().err
    assert err.startswith("nrt-jax: error: ")
    assert said in err
    assert err.count("\n") == 1
    assert "s3cret" not in err


@pytest.mark.parametrize("name", ["port", "grpc_port"])
def test_a_port_that_is_taken(run, name, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        settings = {"port": "0", "grpc_port": "0"} | {name: str(port)}
        words = [f"{key}={value}" for key, value in settings.items()]
        assert main(["serve", str(run), *words]) == 2
    assert f"{name}={port}: Address already in use on host=127.0.0.1" in capsys.readouterr().err


def test_no_run(tmp_path, capsys):
    assert main(["serve", str(tmp_path / "none"), "port=0", "grpc_port=0"]) == 2
    assert "no such directory; name a run, RUN/checkpoints/STEP" in capsys.readouterr().err


@pytest.mark.slow
def test_a_small_soak(run):
    words = [str(run), "--requests", "60", "--questions", "15", "--clients", "8"]
    # So few requests meet lengths that are compiled for the first time to the end, even short ones.
    words += ["max_prompt_tokens=20", "max_new_tokens=12"]
    command = [sys.executable, "benchmarks/serve_soak.py", *words, "--growth-mb", "200", *SMALL]
    one_device = os.environ | {"JAX_NUM_CPU_DEVICES": "1"}
    result = subprocess.run(command, cwd=REPOSITORY, env=one_device, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    figures = json.loads(result.stdout)
    assert figures["requests"] == sum(figures["by_kind"].values()) == 60
    assert figures["slots_in_use_at_the_end"] == 0
