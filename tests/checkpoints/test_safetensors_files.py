"""Files of tensors: what is read as a model, what is refused, and shards with their index."""

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from safetensors.torch import load_file as load_torch_file

from nrt_jax.checkpoints import load_pretrained
from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.hf_weights import write_directory
from nrt_jax.checkpoints.safetensors_files import NewTensor, open_tensors, write_tensors
from nrt_jax.errors import InputError
from tests.checkpoints.bits import INDEX, bits_of
from tests.models.tiny import mesh, read

SINGLE = "model.safetensors"


def refusal(directory: Path) -> str:
    """The message with which the weights are refused."""
    with pytest.raises(InputError) as error:
        read(directory, read_architecture(directory))
    message = str(error.value)
    assert message.startswith(str(directory))
    assert "\n" not in message
    return message


# --- one file or many ----------------------------------------------------------------------------


@pytest.fixture
def shards(reference_of, tmp_path) -> Path:
    """A directory of many files, and one more that the index does not name."""
    source = reference_of("llama3.1_shards").directory
    folder = Path(shutil.copytree(source, tmp_path / "shards"))
    assert len(list(folder.glob("*.safetensors"))) > 2
    save_file({"other": np.zeros(1, np.float32)}, folder / "consolidated.safetensors")
    return folder


def edit_index(folder: Path, **changes: str | None) -> None:
    """Say that a weight is in another file (`__` for a dot), or in none."""
    content = json.loads((folder / INDEX).read_text())
    content["weight_map"] |= {name.replace("__", "."): file for name, file in changes.items()}
    content["weight_map"] = {k: v for k, v in content["weight_map"].items() if v is not None}
    (folder / INDEX).write_text(json.dumps(content))


def test_many_files_read_as_one(reference_of, shards):
    one = reference_of("llama3.1").directory
    a = read_architecture(one)
    jax.tree.map(np.testing.assert_array_equal, read(shards, a), read(one, a))


NORM = "model__norm__weight"


def test_index_and_files_must_agree(shards):
    where = json.loads((shards / INDEX).read_text())["weight_map"]["model.norm.weight"]
    edit_index(shards, **{NORM: None})
    assert "model.norm.weight: the index says None, the files say" in refusal(shards)
    edit_index(shards, **{NORM: "model-00099-of-00099.safetensors"})
    assert "model-00099-of-00099.safetensors: no such file, but model.safet" in refusal(shards)
    shutil.copy(shards / where, shards / "model-00099-of-00099.safetensors")
    assert "stored also in" in refusal(shards)
    (shards / where).unlink()
    edit_index(shards, **{NORM: where})
    assert f"{where}: no such file" in refusal(shards)


def test_an_index_that_names_nothing(shards):
    for text, message in [
        ("{}", "weight_map: must map names of weights to files"),
        ('{"weight_map": []}', "weight_map: must map names of weights to files"),
        ("{", "must be JSON"),
    ]:
        (shards / INDEX).write_text(text)
        assert f"{INDEX}: {message}" in refusal(shards)


@pytest.mark.parametrize("file", ["../model.safetensors", "/etc/passwd", "", None, 3])
def test_an_index_names_files_beside_it(shards, file):
    content = json.loads((shards / INDEX).read_text())
    content["weight_map"]["model.norm.weight"] = file
    (shards / INDEX).write_text(json.dumps(content))
    assert f"model.norm.weight: {file!r} must be the name of a file beside it" in refusal(shards)


def test_two_models_in_one_directory(shards):
    save_file({"other": np.zeros(1, np.float32)}, shards / SINGLE)
    assert f"{SINGLE} and {INDEX}: two models; remove one of them" in refusal(shards)


# --- refused -------------------------------------------------------------------------------------


def edit_weights(folder: Path, **changes: np.ndarray | None) -> Path:
    """Set tensors by name with `__` for a dot; None removes one."""
    tensors = load_file(folder / SINGLE) | {k.replace("__", "."): v for k, v in changes.items()}
    save_file({k: v for k, v in tensors.items() if v is not None}, folder / SINGLE)
    return folder


REFUSED = [
    ({NORM: None}, "model.norm.weight: missing (1 of 21 weights are)"),
    ({"lm_head__weight": None}, "lm_head.weight: missing"),
    ({"lm_head__weight": None}, "or tie_word_embeddings must be true"),
    ({"model__layers__2__mlp__up_proj__weight": np.zeros(1, np.float32)}, "no weight of a llama"),
    ({"model__layers__0__self_attn__q_proj__bias": np.zeros(32, np.float32)}, "q_proj.bias: no"),
    ({"model__layers__0__self_attn__q_norm__weight": np.zeros(8, np.float32)}, "q_norm.weight: no"),
    ({NORM: np.zeros(31, np.float32)}, "shape (31,), but config.json makes it (32,)"),
    ({"lm_head__weight": np.zeros((32, 97), np.float32)}, "shape (32, 97), but"),
    ({"model__embed_tokens__weight": np.zeros((98, 32), np.float32)}, "shape (98, 32), but"),
    ({NORM: np.zeros(32, np.float64)}, "model.norm.weight: dtype F64; store F32, BF16 or F16"),
    ({NORM: np.zeros(32, np.int8)}, "model.norm.weight: dtype I8; store F32, BF16 or F16"),
    ({NORM: np.zeros(32, ml_dtypes.float8_e4m3fn)}, "model.norm.weight: dtype F8_E4M3; store"),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED)
def test_weights_are_refused_by_name(copy, changes, message):
    edit_weights(copy, **changes)
    assert message in refusal(copy)


def test_rotary_constants_of_old_exports_are_no_weights(copy):
    edit_weights(copy, model__layers__0__self_attn__rotary_emb__inv_freq=np.ones(4, np.float32))
    read(copy, read_architecture(copy))


@pytest.mark.parametrize("rows", [97, 20_000])
def test_tied_head_in_the_file_must_be_the_embedding(copy, rows):
    """Compared in blocks of rows; the last row of all is the one that differs."""
    embedding = np.random.default_rng(0).normal(size=(rows, 32)).astype(np.float32)
    head = embedding.copy()
    head[-1, -1] += 1
    config = json.loads((copy / "config.json").read_text())
    config |= {"tie_word_embeddings": True, "vocab_size": rows}
    (copy / "config.json").write_text(json.dumps(config))
    edit_weights(copy, lm_head__weight=head, model__embed_tokens__weight=embedding)
    message = refusal(copy)
    assert "lm_head.weight: differs from model.embed_tokens.weight" in message
    assert message.endswith("tie_word_embeddings=true; set it to false")
    edit_weights(copy, lm_head__weight=embedding)
    assert "head" not in read(copy, read_architecture(copy))


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_a_file_that_was_cut(copy, kept):
    """In the length, in the header, in the data."""
    whole = (copy / SINGLE).read_bytes()
    (copy / SINGLE).write_bytes(whole[: int(kept if kept >= 1 else kept * len(whole))])
    assert f"{SINGLE}: cannot be read as safetensors" in refusal(copy)


def test_a_file_that_goes_while_it_is_read(copy):
    tensor = open_tensors(copy)["model.norm.weight"]
    (copy / SINGLE).unlink()
    with pytest.raises(InputError, match=r"model.safetensors: model.norm.weight: No such file"):
        tensor.read((slice(None),))


def test_no_safetensors_at_all(copy):
    (copy / SINGLE).write_bytes(b"no")
    assert f"{SINGLE}: cannot be read as safetensors" in refusal(copy)
    (copy / SINGLE).unlink()
    assert "holds no *.safetensors; give a Hugging Face model directory" in refusal(copy)
    (copy / "pytorch_model.bin").write_bytes(b"no")
    assert "pytorch_model.bin: pickled weights are refused" in refusal(copy)


def test_a_rectangle_of_a_tensor(tmp_path):
    values = np.arange(24, dtype=np.float32).reshape(4, 6).astype(ml_dtypes.bfloat16)
    save_file({"x": values}, tmp_path / SINGLE)
    tensor = open_tensors(tmp_path)["x"]
    assert (tensor.shape, tensor.dtype) == ((4, 6), jnp.bfloat16)
    found = tensor.read((slice(1, 3), slice(2, 5)))
    assert found.dtype == jnp.bfloat16
    np.testing.assert_array_equal(found, values[1:3, 2:5])


# --- shards --------------------------------------------------------------------------------------


def new_tensors(sizes: list[int]) -> list[NewTensor]:
    """Vectors of so many float32 numbers, each of its own values."""
    return [
        NewTensor(f"t{n}", (size,), np.dtype("float32"), lambda n=n, size=size: vector(n, size))
        for n, size in enumerate(sizes)
    ]


def vector(n: int, size: int) -> np.ndarray:
    return np.arange(size, dtype=np.float32) + 1000 * n


def test_shards_hold_every_tensor_once_and_the_index_names_them(tmp_path):
    sizes = [100, 200, 50, 1, 300, 10, 400]
    limit = 2000
    write_tensors(tmp_path, new_tensors(sizes), max_shard_bytes=limit)
    index = json.loads((tmp_path / INDEX).read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    count = len(files)
    assert count > 1
    assert files == [f"model-{n + 1:05}-of-{count:05}.safetensors" for n in range(count)]
    assert index["metadata"]["total_size"] == 4 * sum(sizes)
    assert index["weight_map"].keys() == {f"t{n}" for n in range(len(sizes))}
    for file in files:
        found = load_file(tmp_path / file)
        assert {index["weight_map"][name] for name in found} == {file}
        for name, values in found.items():
            n = int(name[1:])
            np.testing.assert_array_equal(values, vector(n, sizes[n]))


@pytest.mark.parametrize("limit", [1000, 2000, 2100, 5000])
def test_a_shard_is_no_larger_than_the_limit(tmp_path, limit):
    """Header included, unless it holds one tensor alone that is larger by itself."""
    sizes = [100, 200, 50, 1, 300, 10, 400] * 3
    write_tensors(tmp_path, new_tensors(sizes), max_shard_bytes=limit)
    for file in tmp_path.glob("*.safetensors"):
        assert file.stat().st_size <= limit or len(load_file(file)) == 1, file.name


def test_shards_are_filled(tmp_path):
    """400 bytes of data and less than 100 of header a tensor: six of them in 3200 bytes."""
    write_tensors(tmp_path, new_tensors([100] * 20), max_shard_bytes=3200)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert [min(len(load_file(file)), 6) for file in files[:-1]] == [6] * (len(files) - 1)


def test_one_file_needs_no_index(tmp_path):
    write_tensors(tmp_path, new_tensors([3, 4]))
    assert [path.name for path in tmp_path.iterdir()] == [SINGLE]


def test_the_layout_of_a_file(tmp_path):
    """8 bytes of length, a header of a multiple of 8 bytes, then the data without a gap."""
    write_tensors(tmp_path, new_tensors([3, 4]))
    raw = (tmp_path / SINGLE).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    assert length % 8 == 0
    assert header["__metadata__"] == {"format": "pt"}
    assert header["t1"] == {"dtype": "F32", "shape": [4], "data_offsets": [12, 28]}
    assert len(raw) == 8 + length + 28
    with safe_open(tmp_path / SINGLE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_a_process_that_only_lends_its_shards_writes_nothing(tmp_path):
    fetched = []

    def fetch() -> np.ndarray:
        fetched.append(1)
        return np.zeros(2, np.float32)

    tensors = [NewTensor(f"t{n}", (2,), np.dtype("float32"), fetch) for n in range(3)]
    write_tensors(None, tensors, max_shard_bytes=8)
    assert len(fetched) == 3
    assert list(tmp_path.iterdir()) == []


def test_shards_of_a_model(reference_of, tmp_path):
    """The index names every tensor of the config, each shard opens in torch, and it reads again."""
    directory, limit = reference_of("llama3.2_tied").directory, 20_000
    a = read_architecture(directory)
    params = read(directory, a, mesh(fsdp=2))
    write_directory(tmp_path / "out", a, params, dtype="bfloat16", max_shard_bytes=limit)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    found: dict[str, Any] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        tensors = load_torch_file(file)
        assert file.stat().st_size <= limit or len(tensors) == 1, file.name
        assert {index["weight_map"][name] for name in tensors} == {file.name}
        found |= tensors
    assert index["weight_map"].keys() == found.keys() == bits_of(directory).keys()
    assert index["metadata"]["total_size"] == sum(x.nbytes for x in found.values())
    load_pretrained(tmp_path / "out")
