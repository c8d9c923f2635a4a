"""Weights from files to params and back: bit for bit, and as transformers reads them."""

import json
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.hf_weights import read_weights, stored_dtypes, write_directory
from nrt_jax.checkpoints.import_format import (
    VOCAB_MULTIPLE,
    import_directory,
    read_params,
    saved_target,
)
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import Decoder, abstract_decoder
from nrt_jax.models.sharding import abstract_params
from tests.checkpoints.bits import INDEX, assert_same_bits, write_bits
from tests.models.references import IDS, VARIANTS, load_model
from tests.models.tiny import mesh, read

MESHES = {"one": {}, "all": {"tensor": 2, "fsdp": 2, "data": 2}}
DTYPES = {
    "float32": ("float32", None),
    "bfloat16": ("bfloat16", None),
    "float16": ("float16", None),
    "mixed": ("bfloat16", "float32"),
}


def read_as_stored(directory: Path, sizes: dict[str, int]) -> dict:
    """The params on a mesh, each weight in the dtype of the files."""
    a = read_architecture(directory)
    decoder = abstract_decoder(a, vocab_multiple=VOCAB_MULTIPLE)
    target = jax.tree.map(
        lambda want, dtype: want.update(dtype=dtype),
        abstract_params(mesh(**sizes), decoder),
        stored_dtypes(directory, a),
    )
    return read_weights(directory, a, target)


def test_params_are_those_of_the_decoder(reference_of):
    for variant in ("llama3", "llama3.2_tied"):
        directory = reference_of(variant).directory
        a = read_architecture(directory)
        expected = jax.eval_shape(lambda a=a: nnx.to_pure_dict(nnx.state(Decoder(a, nnx.Rngs(0)))))
        actual = read(directory, a)
        assert jax.tree.structure(actual) == jax.tree.structure(expected)
        assert jax.tree.map(lambda x: (x.shape, x.dtype), actual) == jax.tree.map(
            lambda x: (x.shape, x.dtype), expected
        )


# --- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variant", "dtype", "norms"),
    [
        ("llama3", *DTYPES["float32"]),
        ("llama3", *DTYPES["float16"]),
        ("mistral_v0.1", *DTYPES["bfloat16"]),
        ("llama3.2_tied", *DTYPES["mixed"]),
    ],
)
def test_there_and_back_is_exact(tmp_path, variant, dtype, norms):
    """From one file, over a mesh, to many."""
    source = write_bits(tmp_path / "in", VARIANTS[variant].config, dtype, norms=norms)
    params = read_as_stored(source, MESHES["all"])
    write_directory(tmp_path / "out", read_architecture(source), params, max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    assert_same_bits(source, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["torch_dtype"] == dtype


def test_from_many_files_to_one_is_exact(tmp_path):
    config = VARIANTS["llama3"].config
    source = write_bits(tmp_path / "in", config, "bfloat16", norms="float32", shards=3)
    params = read_as_stored(source, MESHES["one"])
    write_directory(tmp_path / "out", read_architecture(source), params)
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert not (tmp_path / "out" / INDEX).exists()
    assert_same_bits(source, tmp_path / "out")


def test_over_an_import_is_exact(tmp_path):
    config = VARIANTS["llama3"].config
    source = write_bits(tmp_path / "in", config, "bfloat16", norms="float32")
    middle = tmp_path / "imported"
    import_directory(source, middle, mesh(**MESHES["all"]))
    params = read_params(middle, saved_target(middle, mesh(fsdp=4)))
    write_directory(tmp_path / "out", read_architecture(middle), params)
    assert_same_bits(source, tmp_path / "out")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_over_float32_is_exact(tmp_path, dtype):
    """As training holds the weights; float32 has every number of both."""
    source = write_bits(tmp_path / "in", VARIANTS["llama3"].config, dtype)
    a = read_architecture(source)
    params = read(source, a, mesh(**MESHES["all"]), vocab_multiple=2)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.float32)}
    expected = load_file(source / "model.safetensors")["model.embed_tokens.weight"]
    np.testing.assert_array_equal(params["embedding"][: a.vocab_size], expected.float().numpy())
    write_directory(tmp_path / "out", a, params, dtype=dtype)
    assert_same_bits(source, tmp_path / "out")


def test_layers_of_different_dtypes_become_the_one_that_holds_both(tmp_path):
    source = write_bits(tmp_path / "in", VARIANTS["llama3"].config, "bfloat16")
    file = source / "model.safetensors"
    tensors = load_file(file)
    odd = "model.layers.1.mlp.up_proj.weight"
    tensors[odd] = tensors[odd].clamp(-100, 100).half()
    save_file(tensors, file)
    params = read_as_stored(source, {})
    assert params["layers"]["mlp"]["up"].dtype == jnp.float32
    np.testing.assert_array_equal(params["layers"]["mlp"]["up"][1], tensors[odd].float().T.numpy())
    assert params["layers"]["mlp"]["gate"].dtype == jnp.bfloat16


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_rounding_is_that_of_torch(reference_of, tmp_path, dtype):
    """To nearest, ties to even: what `model.to(dtype)` would have saved."""
    directory = reference_of("llama3").directory
    a = read_architecture(directory)
    write_directory(tmp_path / "out", a, read(directory, a), dtype=dtype)
    load_model(directory).to(getattr(torch, dtype)).save_pretrained(tmp_path / "expected")
    assert_same_bits(tmp_path / "out", tmp_path / "expected")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)


# --- what transformers makes of it ---------------------------------------------------------------


EXPORTED = ["llama3.1_old_spelling", "llama3.2_tied", "mistral_v0.1"]


@pytest.mark.parametrize("name", EXPORTED)
def test_export_gives_the_same_logits_in_transformers(reference_of, tmp_path, name):
    reference, out = reference_of(name), tmp_path / "runs" / "export"
    a = read_architecture(reference.directory)
    write_directory(
        out,
        a,
        read(reference.directory, a, mesh(fsdp=2), vocab_multiple=8),
        generation={"eos_token_id": 3},
        max_shard_bytes=30_000,
    )
    assert (out / INDEX).exists()
    assert read_architecture(out) == a
    model, original = load_model(out), load_model(reference.directory)
    ids = torch.tensor(IDS, dtype=torch.long)
    with torch.no_grad():
        np.testing.assert_array_equal(model(ids).logits.numpy(), original(ids).logits.numpy())
    assert type(model) is type(original)
    assert (model.config.bos_token_id, model.config.eos_token_id) == (None, 3)
    assert model.generation_config.eos_token_id == 3
    shown = model.generate(torch.tensor(IDS[:, :4]).long(), max_new_tokens=2, do_sample=False)
    assert shown.shape[1] in (5, 6)


# --- whole or not at all -------------------------------------------------------------------------


def test_other_files_come_along_and_a_failure_leaves_nothing(reference_of, tmp_path):
    directory = reference_of("llama_mha").directory
    a = read_architecture(directory)
    params = read(directory, a)

    def copy_tokenizer(folder: Path) -> None:
        (folder / "tokenizer.json").write_text("{}")

    def fail(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=r"out: cannot be written: No space left on device"):
        write_directory(tmp_path / "out", a, params, add_files=fail)
    assert list(tmp_path.iterdir()) == []
    write_directory(tmp_path / "out", a, params, add_files=copy_tokenizer)
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    with pytest.raises(InputError, match=r"out: exists and is not empty"):
        write_directory(tmp_path / "out", a, params)
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}


def test_an_empty_folder_is_filled(reference_of, tmp_path):
    directory = reference_of("llama_mha").directory
    a = read_architecture(directory)
    (tmp_path / "out").mkdir()
    write_directory(tmp_path / "out", a, read(directory, a))
    assert_same_bits(directory, tmp_path / "out")


def test_params_that_do_not_fit_are_not_written(reference_of, tmp_path):
    directory = reference_of("llama_mha").directory
    a = read_architecture(directory)
    params = read(directory, a)
    head, embedding = params["head"], params["embedding"]
    tied = a.model_copy(update={"tie_word_embeddings": True})
    deeper = a.model_copy(update={"num_hidden_layers": 3})
    cases = [
        (tied, params, "float32", "params: head: no weight of a llama"),
        (a, {k: v for k, v in params.items() if k != "head"}, "float32", "params: head: missing"),
        (deeper, params, "float32", r"layers.attention_norm.scale: shape \(2, 32\)"),
        (a, params | {"head": head + 1e5}, "float16", "lm_head.weight: .* too large"),
        (a, params | {"head": head[:, :-1]}, "float32", r"params: head: shape \(32, 96\)"),
        # Only the vocabulary may be larger than in the files.
        (a, params | {"head": jnp.tile(head, (2, 1))}, "float32", r"params: head: shape \(64, 97"),
        (
            a,
            params | {"embedding": jnp.tile(embedding, (1, 2))},
            "float32",
            r"params: embedding: shape \(97, 64\)",
        ),
    ]
    for architecture, weights, dtype, message in cases:
        with pytest.raises(InputError, match=message):
            write_directory(tmp_path / "out", architecture, weights, dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_needs_neither_torch_nor_transformers():
    code = (
        "import sys, nrt_jax.checkpoints.hf_weights, nrt_jax.checkpoints.open\n"
        "print({'torch', 'transformers'} & sys.modules.keys())"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True)
    assert result.stdout.strip() == b"set()"
