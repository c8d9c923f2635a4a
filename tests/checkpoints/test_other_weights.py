"""Model directories in another form: the message says what they hold and what to do."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.open import find_model
from nrt_jax.checkpoints.safetensors_files import open_tensors
from nrt_jax.errors import InputError
from tests.models.tiny import read

SINGLE = "model.safetensors"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def refusal(call, *args) -> str:
    with pytest.raises(InputError) as error:
        call(*args)
    message = str(error.value)
    assert "\n" not in message
    return message


def read_all(folder: Path) -> None:
    read(folder, read_architecture(folder))


# --- names of tensors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prefix", "said"),
    [
        ("_orig_mod.", "the '_orig_mod.' in it comes from torch.compile; save the module inside, "),
        ("module.", "the 'module.' in it comes from DataParallel and DistributedDataParallel; "),
        ("_fsdp_wrapped_module.", "the '_fsdp_wrapped_module.' in it comes from FSDP; save a full"),
        ("base_model.model.", "the 'base_model.model.' in it comes from peft; merge with merge_an"),
        (
            "language_model.",
            "must be named lm_head.weight; remove 'language_model.' from the names",
        ),
        ("module._orig_mod.", "remove 'module._orig_mod.' from the names"),
    ],
)
def test_names_with_a_prefix(copy, prefix, said):
    tensors = {prefix + name: value for name, value in load_file(copy / SINGLE).items()}
    save_file(tensors, copy / SINGLE)
    message = refusal(read_all, copy)
    assert message.startswith(f"{copy / SINGLE}: {prefix}lm_head.weight: ")
    assert said in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("model.", "", "the weight must be named model.embed_tokens.weight; save the whole model"),
        ("layers.1.", "layers.1._checkpoint_wrapped_module.", "activation checkpointing; save the"),
        ("layers.0.self_attn.q_proj", "layers.0.self_attn.q_proj.lora_A", "a LoRA adapter is no w"),
        ("model.embed_tokens", "tok_embeddings", "is a name of the model's original format; name"),
    ],
)
def test_other_names(copy, old, new, said):
    tensors = {name.replace(old, new): value for name, value in load_file(copy / SINGLE).items()}
    save_file(tensors, copy / SINGLE)
    assert said in refusal(read_all, copy)


def test_a_name_twice_in_a_header(copy):
    """The library keeps the last of the two."""
    path = copy / SINGLE
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = content[8 : 8 + length].decode().rstrip()
    entry = json.dumps({"model.norm.weight": json.loads(header)["model.norm.weight"]})
    twice = (header[:-1] + ", " + entry[1:]).encode()
    path.write_bytes(struct.pack("<Q", len(twice)) + twice + content[8 + length :])
    assert refusal(open_tensors, copy) == (
        f"{path}: header: the key 'model.norm.weight' occurs twice in one object; keep one"
    )


# --- files ---------------------------------------------------------------------------------------

IN_PLACE = [
    ("adapter_model.safetensors", "a LoRA adapter is no model; merge it into its base with peft: "),
    ("adapter_config.json", "a LoRA adapter is no model; merge it into its base with peft: Auto"),
    ("model.Q4_K_M.gguf", "GGUF weights are not read; name the safetensors that they were made"),
    ("pytorch_model.bin", "pickled weights are refused, since loading a pickle runs the code in"),
    ("model.ckpt", "pickled weights are refused"),
    ("tf_model.h5", "weights of another framework are not read; convert with transformers"),
]


@pytest.mark.parametrize(("name", "said"), IN_PLACE)
def test_what_is_there_instead(copy, name, said):
    (copy / SINGLE).unlink()
    (copy / name).write_bytes(b"x")
    (copy / "training_args.bin").write_bytes(b"x")
    said = f"{copy / name}: {said}"
    assert refusal(read_all, copy).startswith(said)
    (copy / "config.json").unlink()
    for call in (read_architecture, find_model):
        assert refusal(call, copy).startswith(said)


def test_an_adapter_beside_a_model(copy):
    """transformers would add it to the weights."""
    save_file({LORA: np.zeros((2, 2), np.float32)}, copy / "adapter_model.safetensors")
    assert refusal(read_all, copy) == (
        f"{copy}/adapter_model.safetensors: a LoRA adapter beside a model; merge or remove it"
    )


def test_state_of_a_training_is_no_model(copy):
    (copy / SINGLE).unlink()
    (copy / "training_args.bin").write_bytes(b"x")
    assert "holds no *.safetensors; give a Hugging Face model directory" in refusal(read_all, copy)


@pytest.mark.parametrize(
    ("name", "call"), [("config.json", read_architecture), (SINGLE, open_tensors)]
)
def test_files_of_other_kinds(copy, name, call):
    path = copy / name
    for content, said in (
        (LFS, "is a Git LFS pointer, not the file itself; run git lfs pull, or download"),
        (b"\x1f\x8b\x08", "is compressed with gzip"),
        (b"<!doctype html>", "is a web page, not the file"),
        (b"PK\x03\x04" + b"x" * 99, "is a zip archive"),
    ):
        path.write_bytes(content)
        assert refusal(call, copy).startswith(f"{path}: {said}")
    path.unlink()
    path.symlink_to("/nowhere/blob")
    said = f"{path}: is a symbolic link to /nowhere/blob, which does not exist; restore it"
    assert refusal(call, copy) == said
    path.unlink()
    path.mkdir()
    assert "s a directory" in refusal(call, copy)


def test_a_config_that_is_empty_or_has_a_mark(copy):
    path = copy / "config.json"
    whole, text = read_architecture(copy), path.read_text()
    path.write_text("\ufeff" + text)
    assert read_architecture(copy) == whole
    path.write_text("")
    assert refusal(read_architecture, copy) == f"{path}: is empty; copy or download it again"


def test_an_index_that_leads_nowhere(copy):
    index = copy / "model.safetensors.index.json"
    index.symlink_to("/nowhere/index")
    assert refusal(open_tensors, copy).startswith(f"{index}: is a symbolic link to /nowhere/index")


def test_a_file_in_place_of_the_directory(copy):
    for name in (SINGLE, "config.json"):
        for call in (read_architecture, find_model):
            assert refusal(call, copy / name) == f"{copy / name}: is a file; name its directory"


def test_a_link_in_place_of_the_directory(tmp_path):
    link = tmp_path / "model"
    link.symlink_to("/nowhere/model")
    said = f"{link}: is a symbolic link to /nowhere/model, which does not exist; restore it"
    for call in (read_architecture, find_model):
        assert refusal(call, link) == said


def test_a_run_in_place_of_the_directory(tmp_path):
    (tmp_path / "config.yaml").touch()
    assert refusal(read_architecture, tmp_path) == (
        f"{tmp_path}: is a run, not a model's directory; write one: nrt-jax export RUN OUT"
    )
