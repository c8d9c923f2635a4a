"""Imported directories: whole or not at all, damage in one line, any padding, files unchanged."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file, save_file

from nrt_jax.checkpoints import hf_weights, import_format, load_pretrained
from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.import_format import (
    VOCAB_MULTIPLE,
    import_directory,
    is_imported,
    read_params,
    saved_target,
    source_name,
    tokenizer_files,
)
from nrt_jax.checkpoints.safetensors_files import StoredTensor
from nrt_jax.errors import InputError
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params
from tests.models.references import VARIANTS, VOCAB, edit_config, make_model
from tests.models.tiny import mesh, read

TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


@pytest.fixture(scope="module")
def source(reference_of, tmp_path_factory) -> Path:
    """A directory with the files of a tokenizer, in bytes that no JSON writer would give."""
    folder = tmp_path_factory.mktemp("source") / "model"
    shutil.copytree(reference_of("llama_mha").directory, folder)
    for name in (*TOKENIZER, "chat_template.jinja", "tokenizer.model"):
        (folder / name).write_bytes(b'{"b":1,\r\n "a": "\xc3\xa9"}')
    config = folder / "config.json"
    config.write_text(config.read_text().replace("\n", "  \n"))
    (folder / "notes.txt").write_text("no part of the model")
    return folder


@pytest.fixture(scope="module")
def imported(source, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("imported") / "imported"
    import_directory(source, folder, mesh(fsdp=2))
    return folder


@pytest.fixture
def damaged(imported, tmp_path) -> Path:
    """A copy, to be damaged."""
    return Path(shutil.copytree(imported, tmp_path / "damaged"))


def test_files_are_copied_as_they_are(source, imported):
    found = {path.name for path in imported.iterdir()}
    copied = {*TOKENIZER, "chat_template.jinja", "tokenizer.model", "config.json"}
    assert found == {*copied, "generation_config.json", "params", "import.json"}
    for name in (*copied, "generation_config.json"):
        assert (imported / name).read_bytes() == (source / name).read_bytes(), name
    assert {file.name for file in tokenizer_files(imported)} == copied - {"config.json"}
    assert json.loads((imported / "import.json").read_text()) == {"source": str(source)}
    assert source_name(imported) == "model"
    assert is_imported(imported)
    assert not is_imported(source)


@pytest.mark.parametrize("multiple", [1, 2, 256])
def test_any_vocabulary_multiple(source, imported, multiple):
    """97 rows saved as 128: cut to 97 and 98, filled up to 256."""
    a = read_architecture(source)
    on = mesh(tensor=2 if multiple > 1 else 1)
    target = abstract_params(on, abstract_decoder(a, vocab_multiple=multiple))
    found = read_params(imported, target)
    expected = read(source, a, on, multiple)
    rows = -(-VOCAB // multiple) * multiple
    assert found["embedding"].shape == (rows, a.hidden_size)
    for actual, want, struct in zip(
        jax.tree.leaves(found), jax.tree.leaves(expected), jax.tree.leaves(target), strict=True
    ):
        np.testing.assert_array_equal(actual, want)
        assert actual.sharding == struct.sharding
        assert actual.dtype == struct.dtype


def test_what_is_saved_has_no_weight_in_its_padding(source, imported):
    params = read_params(imported, saved_target(imported, mesh(fsdp=8)))
    assert params["embedding"].shape[0] == VOCAB_MULTIPLE
    np.testing.assert_array_equal(params["embedding"][VOCAB:], 0)
    np.testing.assert_array_equal(params["head"][:, VOCAB:], 0)


def test_dtypes_are_kept_unless_one_is_given(reference_of, tmp_path):
    directory = reference_of("llama3.1_mixed").directory
    import_directory(directory, tmp_path / "kept", mesh())
    import_directory(directory, tmp_path / "cast", mesh(), dtype="float32")
    kept, cast = (saved_target(tmp_path / name, mesh()) for name in ("kept", "cast"))
    assert kept["embedding"].dtype == kept["layers"]["mlp"]["up"].dtype == jnp.bfloat16
    assert kept["final_norm"]["scale"].dtype == jnp.float32
    assert kept["layers"]["mlp_norm"]["scale"].dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(cast)} == {jnp.dtype(jnp.float32)}


def test_a_mesh_of_three_reads_what_it_divides(tmp_path):
    """Heads and feed-forward do, and a vocabulary of 99; 128, as it is saved, does not."""
    config = VARIANTS["llama_mha"].config
    changes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 6}
    make_model(type(config)(**config.to_dict() | changes)).save_pretrained(tmp_path / "in")
    import_directory(tmp_path / "in", tmp_path / "out", mesh())
    on = mesh(tensor=3)
    plain, imported = (load_pretrained(tmp_path / name, mesh=on) for name in ("in", "out"))
    np.testing.assert_array_equal(imported.head_DV(), plain.head_DV())


# --- whole or not at all -------------------------------------------------------------------------


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    ("moment", "error"),
    [
        ("reading", KeyboardInterrupt),
        ("saving", KeyboardInterrupt),
        ("saving", FULL),
        ("copying", FULL),
    ],
)
def test_an_interrupted_import_leaves_nothing(source, tmp_path, monkeypatch, moment, error):
    seen = []

    def fail(*args, **kwargs):
        seen.append({path.name for path in tmp_path.iterdir()})
        raise error

    if moment == "reading":
        # Not the first tensor, so that some are on the mesh.
        plain = StoredTensor.read

        def read_some(tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
            return fail() if "layers.1" in tensor.name else plain(tensor, index)

        monkeypatch.setattr(StoredTensor, "read", read_some)
    elif moment == "saving":
        monkeypatch.setattr(ocp.Checkpointer, "save", fail)
    else:
        monkeypatch.setattr(Path, "write_bytes", fail)
    before = set(tmp_path.iterdir())
    expected = KeyboardInterrupt if error is KeyboardInterrupt else InputError
    with pytest.raises(expected):
        import_directory(source, tmp_path / "out", mesh(fsdp=2))
    assert seen, "it never came to that"
    assert any(name.startswith(".out.") for name in seen[0])
    assert set(tmp_path.iterdir()) == before


def test_an_existing_directory_is_refused(source, imported, monkeypatch):
    """Before anything is read."""

    def read_nothing(*args):
        raise AssertionError("it was read")

    monkeypatch.setattr(hf_weights, "_load", read_nothing)
    before = {path.name for path in imported.iterdir()}
    with pytest.raises(InputError, match=r"imported: exists and is not empty; give a new folder"):
        import_directory(source, imported, mesh())
    assert {path.name for path in imported.iterdir()} == before


def test_a_bad_source_makes_no_directory(copy, tmp_path):
    (copy / "model.safetensors").write_bytes(b"no")
    before = set(tmp_path.iterdir())
    with pytest.raises(InputError, match=r"cannot be read as safetensors"):
        import_directory(copy, tmp_path / "out", mesh())
    assert set(tmp_path.iterdir()) == before


# --- damage --------------------------------------------------------------------------------------


def empty_params(directory: Path) -> None:
    shutil.rmtree(directory / "params")
    (directory / "params").mkdir()


def drop_manifest(directory: Path) -> None:
    (directory / "params" / "manifest.ocdbt").unlink()


def data_files(directory: Path) -> list[Path]:
    files = [path for path in (directory / "params").rglob("d/*") if path.is_file()]
    assert files
    return files


def drop_data(directory: Path) -> None:
    for file in data_files(directory):
        file.unlink()


def cut_data(directory: Path) -> None:
    for file in data_files(directory):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def garble_metadata(directory: Path) -> None:
    (directory / "params" / "_METADATA").write_text("no")


def wider(directory: Path) -> None:
    edit_config(directory, intermediate_size=64)


def deeper(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=3)


def shallower(directory: Path) -> None:
    edit_config(directory, num_hidden_layers=1)


def other_heads(directory: Path) -> None:
    """As many numbers, in another shape."""
    edit_config(directory, num_attention_heads=8, num_key_value_heads=8, head_dim=4)


def tied(directory: Path) -> None:
    edit_config(directory, tie_word_embeddings=True)


DAMAGE = [
    empty_params,
    drop_manifest,
    drop_data,
    cut_data,
    garble_metadata,
    wider,
    deeper,
    shallower,
    other_heads,
    tied,
]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage.__name__)
def test_damage_is_told_in_one_line(damaged, damage):
    damage(damaged)
    with pytest.raises(InputError) as error:
        load_pretrained(damaged)
    message = str(error.value)
    assert message.startswith(f"{damaged / 'params'}: cannot be read")
    assert message.endswith("import it again")
    assert "\n" not in message


@pytest.mark.parametrize("damage", [empty_params, garble_metadata], ids=["empty", "metadata"])
def test_damage_is_told_before_an_export(damaged, damage):
    damage(damaged)
    with pytest.raises(InputError, match=r"params: cannot be read .*; import it again$"):
        saved_target(damaged, mesh())


def test_stored_dtype_is_that_of_the_files(reference_of, source, imported, tmp_path):
    """Whatever config.json says."""
    assert import_format.stored_dtype(source) == import_format.stored_dtype(imported) == "float32"
    half = reference_of("llama3.1_bf16").directory
    assert import_format.stored_dtype(half) == "bfloat16"
    import_directory(source, tmp_path / "half", mesh(), dtype="bfloat16")
    assert import_format.stored_dtype(tmp_path / "half") == "bfloat16"


def test_weights_beyond_float16_are_refused_on_the_way_in(source, tmp_path):
    large = Path(shutil.copytree(source, tmp_path / "large"))
    tensors = load_file(large / "model.safetensors")
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, large / "model.safetensors")
    said = r"model.norm.weight: holds values too large for float16 \(100000\); use bfloat16"
    for read_it in (
        lambda: import_directory(large, tmp_path / "out", mesh(), dtype="float16"),
        lambda: load_pretrained(large, dtype="float16"),
    ):
        with pytest.raises(InputError, match=said):
            read_it()
    assert not (tmp_path / "out").exists()
    load_pretrained(large, dtype="bfloat16")


def test_out_may_be_a_link_to_an_empty_folder(source, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    import_directory(source, tmp_path / "link", mesh())
    assert is_imported(tmp_path / "real")


def test_what_a_killed_try_left_is_cleared_by_the_next(source, tmp_path):
    left = tmp_path / ".out.partial"
    left.mkdir()
    (left / "half").write_text("")
    import_directory(source, tmp_path / "out", mesh())
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("dtype", ["int8", "complex64", "bf16", "nonsense"])
def test_a_dtype_that_weights_do_not_have(source, dtype):
    said = f"dtype {dtype}: must be one of float32, bfloat16, float16"
    with pytest.raises(InputError, match=said):
        load_pretrained(source, dtype=dtype)
