"""`load_pretrained` on meshes: the same logits, its part to each device, padding."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh

from nrt_jax.checkpoints import load_pretrained
from nrt_jax.checkpoints.import_format import import_directory
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import Decoder
from nrt_jax.models.logprobs import TokenLogprobs, token_logprobs
from tests.models.parity import assert_close_logits, assert_parity
from tests.models.references import IDS, VOCAB, Reference
from tests.models.tiny import close, mesh, tokens

MESHES = {
    "fsdp": {"fsdp": 8},
    "all": {"tensor": 2, "fsdp": 2, "data": 2},
    "tensor": {"tensor": 4},
}
meshes = pytest.mark.parametrize("sizes", MESHES.values(), ids=MESHES.keys())
forward = nnx.jit(lambda model, *inputs: model(*inputs))

# The mesh axis that splits each dim; layers come first in what is stacked.
SPLIT = {
    "embedding": ("tensor", "fsdp"),
    "head": ("fsdp", "tensor"),
    "final_norm.scale": (None,),
    "layers.attention_norm.scale": (None, None),
    "layers.mlp_norm.scale": (None, None),
    "layers.attention.query": (None, "fsdp", "tensor", None),
    "layers.attention.key": (None, "fsdp", "tensor", None),
    "layers.attention.value": (None, "fsdp", "tensor", None),
    "layers.attention.output": (None, "tensor", None, "fsdp"),
    "layers.mlp.gate": (None, "fsdp", "tensor"),
    "layers.mlp.up": (None, "fsdp", "tensor"),
    "layers.mlp.down": (None, "tensor", "fsdp"),
}


@cache
def load(directory: Path, **sizes: int) -> Decoder:
    """Read once for all tests, so not to be changed."""
    return load_pretrained(directory, mesh=mesh(**sizes))


def weights(model: Decoder) -> dict[str, jax.Array]:
    """Every weight by its dotted path."""
    tree = nnx.to_pure_dict(nnx.state(model))
    return {
        ".".join(key.key for key in path): weight
        for path, weight in jax.tree_util.tree_leaves_with_path(tree)
    }


@pytest.fixture(scope="module", params=["llama_mha", "llama3.2_tied"])
def reference(request, reference_of) -> Reference:
    return reference_of(request.param)


@pytest.fixture
def untied(reference_of) -> Reference:
    return reference_of("llama_mha")


@meshes
def test_a_mesh_changes_no_logit(untied, sizes):
    logits = forward(load(untied.directory, **sizes), jnp.asarray(IDS))
    close(logits, forward(load(untied.directory), jnp.asarray(IDS)), 1e-5)
    assert_close_logits(logits, untied.logits)


def test_gradients_on_a_mesh_are_those_of_transformers(untied):
    """A mesh that splits everything, without padding, so that the shapes are those of the files."""
    definition, state = nnx.split(load(untied.directory, fsdp=8))
    assert_parity(definition, nnx.to_pure_dict(state), untied)


@meshes
def test_each_device_holds_its_part(untied, sizes):
    on = mesh(**sizes)
    found, expected = weights(load(untied.directory, **sizes)), weights(load(untied.directory))
    assert found.keys() == SPLIT.keys()
    for name, weight in found.items():
        parts = tuple(on.shape[axis] if axis else 1 for axis in SPLIT[name])
        shape = tuple(size // n for size, n in zip(weight.shape, parts, strict=True))
        assert len(weight.addressable_shards) == on.size
        assert {shard.data.shape for shard in weight.addressable_shards} == {shape}, name
        # Replicas are alike, and what differs is another part.
        pieces = {str(shard.index) for shard in weight.addressable_shards}
        assert len(pieces) == np.prod(parts), name
        inside = tuple(slice(size) for size in expected[name].shape)
        np.testing.assert_array_equal(weight[inside], expected[name])


def test_without_a_mesh_all_is_on_the_first_device(untied):
    for weight in weights(load_pretrained(str(untied.directory))).values():
        assert weight.devices() == {jax.devices()[0]}


# --- the padded vocabulary -----------------------------------------------------------------------


# In place of the zeros of the padding; would rule every softmax.
JUNK = 100.0


def padding_of(model: Decoder) -> dict[str, jax.Array]:
    """The rows and columns of embedding and head that stand for no token."""
    found = weights(model)
    padding = {"embedding": found["embedding"][VOCAB:]}
    return padding | ({"head": found["head"][:, VOCAB:]} if "head" in found else {})


def fill_padding(model: Decoder, value: float) -> Decoder:
    """The same decoder with something else where the zeros were."""
    definition, state = nnx.split(model)
    params = nnx.to_pure_dict(state)
    params["embedding"] = jax.jit(lambda x: x.at[VOCAB:].set(value))(params["embedding"])
    if "head" in params:
        params["head"] = jax.jit(lambda x: x.at[:, VOCAB:].set(value))(params["head"])
    return nnx.merge(definition, nnx.State(params))


@pytest.fixture
def padded(reference) -> Decoder:
    """97 ids do not divide by 4: three rows more."""
    on = {"tensor": 4} if "mha" in reference.directory.name else {"tensor": 2, "fsdp": 2}
    return load(reference.directory, **on)


def test_padding_is_zero(padded):
    for name, padding in padding_of(padded).items():
        assert padding.size > 0, name
        np.testing.assert_array_equal(padding, 0)


def test_no_padded_id_is_in_the_logits(reference, padded):
    logits = forward(fill_padding(padded, JUNK), jnp.asarray(IDS))
    assert logits.shape[-1] == VOCAB
    assert_close_logits(logits, reference.logits)


def scores(definition: nnx.GraphDef, params: dict, ids: jax.Array) -> TokenLogprobs:
    """As in training: hidden states, and the head with its padding."""
    model = nnx.merge(definition, nnx.State(params))
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1])[None], ids.shape)
    hidden, _ = model.hidden(ids, positions, jnp.ones_like(ids))
    return token_logprobs(
        hidden[:, :-1], model.head_DV(), ids[:, 1:], vocab_size=VOCAB, chunk_tokens=100
    )


def test_no_padded_id_is_in_a_softmax(reference, padded):
    definition, state = nnx.split(fill_padding(padded, JUNK))
    ids = jnp.asarray(IDS)
    found = jax.jit(scores, static_argnums=0)(definition, nnx.to_pure_dict(state), ids)
    log_pi = jax.nn.log_softmax(jnp.asarray(reference.logits)[:, :-1])
    close(found.logprob_BT, jnp.take_along_axis(log_pi, ids[:, 1:, None], axis=-1)[..., 0])
    close(found.entropy_BT, -jnp.sum(jnp.exp(log_pi) * log_pi, axis=-1))


def test_padding_gets_no_gradient(padded):
    """Exactly none, through logprobs and entropies as well as through logits."""
    definition, state = nnx.split(fill_padding(padded, JUNK))
    ids = tokens((2, 24), VOCAB)

    @jax.jit
    @jax.grad
    def gradient(params):
        found = scores(definition, params, ids)
        logits = nnx.merge(definition, nnx.State(params))(ids)
        return jnp.sum(found.logprob_BT + 0.3 * found.entropy_BT) + jnp.sum(jnp.sin(logits))

    found = nnx.merge(definition, nnx.State(gradient(nnx.to_pure_dict(state))))
    for name, padding in padding_of(found).items():
        np.testing.assert_array_equal(padding, 0, name)
    assert min(float(jnp.abs(weight).max()) for weight in weights(found).values()) > 0


# --- arguments -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "sizes", "message"),
    [
        (
            "llama3",
            {"tensor": 4},
            r"tensor=4 does not divide layers.attention.key of size 2; sizes that do: \[1, 2\]",
        ),
        (
            "llama_mha",
            {"fsdp": 5},
            r"fsdp=5 does not divide embedding of size 32; sizes that do: \[1, 2, 4\]",
        ),
        (
            "llama3.2_tied",
            {"tensor": 3},
            r"tensor=3 does not divide layers.attention.key of size 2; sizes that do: \[1, 2\]",
        ),
    ],
)
def test_a_mesh_that_does_not_divide_is_refused(reference_of, variant, sizes, message):
    with pytest.raises(InputError, match=f"^mesh: {message}$"):
        load_pretrained(reference_of(variant).directory, mesh=mesh(**sizes))


def test_a_mesh_with_other_axes_is_refused(untied):
    other = Mesh(np.asarray(jax.devices()[:2]).reshape(2, 1), ("x", "y"))
    with pytest.raises(InputError, match=r"^mesh: axes \('x', 'y'\); they must be \('data', "):
        load_pretrained(untied.directory, mesh=other)


def test_a_directory_that_is_none(tmp_path):
    with pytest.raises(InputError, match=r"config.json: no such file; give a Hugging Face"):
        load_pretrained(tmp_path / "nothing")


def test_bfloat16_weights_and_computation(untied):
    """Weights are those of the files, rounded; the logits are float32 and near the reference."""
    model = load_pretrained(untied.directory, dtype=jnp.bfloat16)
    exact = weights(load(untied.directory))
    for name, weight in weights(model).items():
        np.testing.assert_array_equal(weight, exact[name].astype(jnp.bfloat16))
    logits = forward(model, jnp.asarray(IDS))
    assert logits.dtype == jnp.float32
    error = np.abs(logits - untied.logits)
    assert 0 < error.max() < 0.25
    assert error.mean() < 0.02


@pytest.mark.parametrize(
    ("variant", "sizes"), [("llama3.2_tied", {}), ("llama_mha", {"fsdp": 2, "tensor": 2})]
)
def test_an_imported_directory_gives_the_same(reference_of, tmp_path, variant, sizes):
    reference = reference_of(variant)
    import_directory(reference.directory, tmp_path / "imported", mesh(fsdp=2))
    model = load_pretrained(tmp_path / "imported", mesh=mesh(**sizes))
    expected = weights(load(reference.directory, **sizes))
    found = weights(model)
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        assert weight.sharding == expected[name].sharding
        np.testing.assert_array_equal(weight, expected[name])
    assert_close_logits(forward(model, jnp.asarray(IDS)), reference.logits)
