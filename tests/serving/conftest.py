"""One model of each method for all tests, and a server of each that nothing disturbs."""

from collections.abc import Iterator

import pytest

from nrt_jax.config.serving import ServingConfig
from nrt_jax.serving.served_model import ServedModel
from nrt_jax.serving.server import make_server
from tests.serving.live import Live, listening
from tests.serving.models import DECODE_STEPS, SLOTS, Reference, make_served

SETTINGS = {"slots": SLOTS, "decode_steps": DECODE_STEPS}


@pytest.fixture(scope="session")
def served(tmp_path_factory) -> ServedModel:
    """A run that reasons."""
    return make_served(tmp_path_factory.mktemp("nrt"))


@pytest.fixture(scope="session")
def direct(tmp_path_factory) -> ServedModel:
    """A run that answers at once."""
    return make_served(tmp_path_factory.mktemp("sft"), "sft")


@pytest.fixture(scope="session")
def reference(served) -> Reference:
    return Reference(served)


@pytest.fixture(scope="session")
def live(served) -> Iterator[Live]:
    with listening(make_server(served, ServingConfig(**SETTINGS))) as server:
        yield server


@pytest.fixture(scope="session")
def live_direct(direct) -> Iterator[Live]:
    with listening(make_server(direct, ServingConfig(**SETTINGS))) as server:
        yield server
