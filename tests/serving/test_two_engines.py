"""The HTTP engine and the gRPC engine in one process, on one mesh of eight devices."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import grpc
import jax
import pytest
from flax import nnx

from nrt_jax.checkpoints.abstract_model import Model
from nrt_jax.config.serving import ServingConfig
from nrt_jax.models.sharding import param_shardings, spread_mesh
from nrt_jax.serving.jetstream_grpc import services
from nrt_jax.serving.served_model import ServedModel, serve_model
from nrt_jax.serving.server import free_port, make_server, start_grpc
from tests.serving.conftest import SETTINGS
from tests.serving.live import listening
from tests.serving.models import NEW, make_opened
from tests.serving.test_jetstream_grpc import decode, of_text

TEXTS = ["Natalia sold clips to 48", "a", "数学的な推論", "Die Straße"]


@pytest.fixture(scope="module")
def spread(tmp_path_factory) -> ServedModel:
    """The model of the other tests, with its weights sharded over all devices."""
    opened = make_opened(tmp_path_factory.mktemp("spread"))
    architecture = opened.model.architecture
    mesh = spread_mesh(architecture)
    assert mesh.size == 8
    model = Model(opened.model.definition, architecture, mesh, target={})
    weights = jax.device_put(nnx.to_pure_dict(opened.params), param_shardings(mesh, opened.params))
    return serve_model(dataclasses.replace(opened, model=model, params=weights), ServingConfig())


@pytest.mark.slow
def test_both_servers_at_once_answer_as_each_does_alone(spread):
    config = ServingConfig(**SETTINGS, grpc_port=0, grpc_slots=2)
    server = start_grpc(spread, config, free_port(config))
    try:
        with (
            listening(make_server(spread, config)) as live,
            grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel,
        ):
            stub = services.OrchestratorStub(channel)

            def over_http(text: str) -> str:
                return live.complete(text, max_tokens=NEW).json["choices"][0]["text"]

            def over_grpc(text: str) -> str:
                return decode(stub, of_text(text, NEW))[0]

            alone = [over_http(text) for text in TEXTS]
            assert [over_grpc(text) for text in TEXTS] == alone
            with ThreadPoolExecutor(8) as pool:
                for _ in range(4):
                    http = [pool.submit(over_http, text) for text in TEXTS]
                    calls = [pool.submit(over_grpc, text) for text in TEXTS]
                    assert [answer.result(120) for answer in http] == alone
                    assert [answer.result(120) for answer in calls] == alone
    finally:
        server.stop()
