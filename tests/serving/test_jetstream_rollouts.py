"""Rollouts by JetStream's orchestrator are those of our loop; failures and a missing package."""

import logging
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from nrt_jax.cli import main
from nrt_jax.config.load import load_config
from nrt_jax.config.serving import ServingConfig
from nrt_jax.engine.requests import Request
from nrt_jax.engine.sampling import Sampling
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.serving.jetstream_rollouts import generate
from nrt_jax.serving.server import with_installed_servers
from tests.engine.toy import (
    LLAMA_64,
    STOPS,
    assert_same,
    engine,
    expected_logprobs,
    logprobs,
    params,
    prompts,
    sample,
)

KEY = jax.random.key(0)
QUICKSTART = Path(__file__).resolve().parents[2] / "configs/quickstart/nrt.yaml"


def test_the_traces_are_those_of_our_loop():
    """Samples of several prompts in fewer slots, with limits and stop tokens of their own."""
    requests = [
        Request(tokens, stream=10 + i, num_samples=n, max_tokens=limits, sampling=settings)
        for i, (tokens, n, limits, settings) in enumerate(
            zip(
                prompts(3, 20, 16, 17, 1),
                [3, 1, 5, 0, 2],
                [12, 7, (12, 1, 5, 12, 3), 4, 9],
                [
                    Sampling(),
                    Sampling(temperature=0.7, top_p=0.9),
                    Sampling(stop_ids=frozenset(range(0, 64, 8))),
                    Sampling(),
                    Sampling(repetition_penalty=1.3),
                ],
                strict=True,
            )
        )
    ]
    expected = sample(engine(), params(), requests)
    traces = generate(engine(num_samples=1), params(), requests, KEY)
    assert_same(traces, expected)
    assert [len(group) for group in traces] == [3, 1, 5, 0, 2]
    ends = {trace.end_token for group in traces for trace in group}
    assert None in ends
    assert ends & STOPS
    assert ends - STOPS - {None}, "a stop token of the request's own"
    for trace in traces[0]:
        assert trace.tokens.dtype == np.int32
        assert trace.logprobs.dtype == np.float32
        true = expected_logprobs(LLAMA_64, requests[0].prompt_tokens, trace)
        np.testing.assert_allclose(logprobs(trace), true, atol=1e-4)
    # Another step of training has another key.
    (other,) = generate(engine(num_samples=1), params(), requests[:1], jax.random.key(1))
    assert {tuple(t.tokens) for t in other}.isdisjoint(tuple(t.tokens) for t in traces[0])


def test_a_request_beyond_the_limits_is_refused():
    request = Request(prompts(5)[0], 0, 1, max_tokens=13)
    with pytest.raises(InputError, match=r"^prompt 0: a limit of 13 new tokens"):
        generate(engine(num_samples=1), params(), [request], KEY)


@pytest.mark.parametrize("method", ["prefill", "insert", "generate"])
def test_a_failure_in_a_thread_is_one_line(monkeypatch, method):
    run = engine(num_samples=1)

    def fails(*args, **kwargs):
        raise RuntimeError("boom\nbang")

    monkeypatch.setattr(run, method, fails)
    request = Request(prompts(5)[0], 0, num_samples=3, max_tokens=4)
    with pytest.raises(RunFailed) as failed:
        generate(run, params(), [request], KEY)
    assert str(failed.value).startswith("rollout.driver=jetstream: a thread of JetStream failed")
    assert "(RuntimeError: boom bang)" in str(failed.value)
    assert "\n" not in str(failed.value)


def test_jaxs_own_errors_are_left_to_the_caller(monkeypatch):
    """Training explains which part of a device's memory is too large."""
    run = engine(num_samples=1)

    def fails(*args, **kwargs):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: 1 GiB")

    monkeypatch.setattr(run, "init_decode_state", fails)
    request = Request(prompts(5)[0], 0, num_samples=1, max_tokens=4)
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED"):
        generate(run, params(), [request], KEY)


class NoJetStream:
    """A finder of modules for whom the extra is not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "jetstream":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def without_jetstream(monkeypatch):
    for name in list(sys.modules):
        if name.partition(".")[0] == "jetstream" or name.startswith("nrt_jax.serving.jetstream"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "meta_path", [NoJetStream(), *sys.meta_path])


def test_training_without_the_package_is_one_line(without_jetstream, capsys):
    assert main(["train", str(QUICKSTART), "rollout.driver=jetstream"]) == 2
    assert capsys.readouterr().err == (
        "nrt-jax: error: rollout.driver=jetstream: the package jetstream is not installed; "
        "pip install 'nrt-jax[jetstream]', or set rollout.driver=loop\n"
    )


def test_serving_without_the_package_is_http_alone(without_jetstream, caplog):
    with caplog.at_level(logging.INFO, "nrt_jax.serving"):
        config = with_installed_servers(ServingConfig())
    assert config.grpc_port is None
    (record,) = caplog.records
    assert record.getMessage() == (
        "gRPC is off: the package jetstream is not installed; pip install 'nrt-jax[jetstream]'"
    )
    off = ServingConfig(grpc_port=None)
    assert with_installed_servers(off) is off
    with pytest.raises(InputError, match=r"^grpc_port=9000: the package jetstream is not"):
        with_installed_servers(load_config(ServingConfig, [], ["grpc_port=9000"]))


def test_serving_with_the_package_keeps_the_port():
    config = ServingConfig()
    assert with_installed_servers(config) is config
