"""The runs that tests of training make, and models rigged to answer as a test says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from nrt_jax.config.architecture import Architecture
from nrt_jax.data.task_tokenizers import write_quickstart_tokenizer
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.engine.engine import Engine
from tests.engine.toy import one_device
from tests.models.tiny import architecture, decoder
from tests.training.conftest import new_run, reference, tiny_config, words

__all__ = ["new_run", "reference", "tiny_config", "words"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_quickstart_tokenizer(directory)
    return Tokenizer.load(directory)


@pytest.fixture(scope="module")
def a(tokenizer) -> Architecture:
    return architecture(vocab_size=tokenizer.vocab_size)


@pytest.fixture(scope="module")
def engines(tokenizer, a) -> tuple[Engine, Engine]:
    """One for traces, one for answers."""
    one, other = (
        Engine(
            nnx.split(decoder(a))[0],
            a,
            one_device(),
            slots=4,
            max_prompt_tokens=16,
            max_new_tokens=6,
            stop_ids=tokenizer.special_ids,
        )
        for _ in range(2)
    )
    return one, other


@pytest.fixture
def rig(tokenizer, a):
    """Weights of a model whose next token depends on the last alone: rig({"2": "=", ...})."""

    def token_id(name: str) -> int:
        return int(tokenizer.backend.token_to_id(name))

    def make(follows: dict[str, str]) -> nnx.State:
        params = jax.tree.map(jnp.zeros_like, nnx.split(decoder(a))[1])
        params["embedding"][...] = jnp.eye(a.vocab_size, a.hidden_size)
        params["final_norm"]["scale"][...] = jnp.ones(a.hidden_size)
        head_DV = np.zeros((a.hidden_size, a.vocab_size), np.float32)
        for last, following in follows.items():
            head_DV[token_id(last), token_id(following)] = 10.0
        params["head"][...] = jnp.asarray(head_DV)
        return params

    return make
