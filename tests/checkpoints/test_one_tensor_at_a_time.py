"""No host holds a model: what is read of a file, what is fetched to write one, and when."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.checkpoints import hf_weights
from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.checkpoints.hf_weights import read_weights, write_directory
from nrt_jax.checkpoints.import_format import import_directory
from nrt_jax.checkpoints.safetensors_files import NewTensor, StoredTensor, open_tensors
from nrt_jax.models.decoder import abstract_decoder
from nrt_jax.models.sharding import abstract_params
from tests.models.references import VARIANTS, make_model
from tests.models.tiny import mesh, read

LAYERS = 6


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """A model of many layers, so that one tensor is little of it."""
    folder = tmp_path_factory.mktemp("deep")
    config = VARIANTS["llama_mha"].config
    make_model(type(config)(**config.to_dict() | {"num_hidden_layers": LAYERS})).save_pretrained(
        folder
    )
    return folder


class Held:
    """Bytes of the arrays given to it that something still holds."""

    def __init__(self) -> None:
        self.nbytes = 0
        self.most = 0

    def add(self, array: np.ndarray) -> np.ndarray:
        self.nbytes += array.nbytes
        self.most = max(self.most, self.nbytes)
        weakref.finalize(array, self._free, array.nbytes)
        return array

    def _free(self, nbytes: int) -> None:
        self.nbytes -= nbytes


class Reads:
    """Every read of a stored tensor: its name and its share of the tensor."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.of: dict[str, list[float]] = {}
        self.held = Held()
        plain = StoredTensor.read

        def read(tensor: StoredTensor, index: tuple[slice, ...]) -> np.ndarray:
            values = plain(tensor, index)
            share = values.size / np.prod(tensor.shape)
            self.of.setdefault(tensor.name, []).append(float(share))
            return self.held.add(np.array(values))

        monkeypatch.setattr(StoredTensor, "read", read)


def parts_of(name: str, sizes: dict[str, int]) -> int:
    """Into how many pieces the mesh cuts a tensor; the norms stay whole."""
    return 1 if "norm" in name else sizes.get("fsdp", 1) * sizes.get("tensor", 1)


@pytest.mark.parametrize(
    "sizes",
    [{"fsdp": 8}, {"tensor": 4}, {"data": 2, "fsdp": 2, "tensor": 2}, {"data": 8}],
    ids=["fsdp", "tensor", "all", "data"],
)
def test_of_a_split_tensor_pieces_are_read_and_each_once(directory, monkeypatch, sizes):
    """Replicas share what is read; a vocabulary of 97 is cut into pieces of 25 and a last of 22."""
    names = open_tensors(directory).keys()
    reads = Reads(monkeypatch)
    read(directory, read_architecture(directory), mesh(**sizes), sizes.get("tensor", 1))
    assert reads.of.keys() == names
    for name, shares in reads.of.items():
        parts = parts_of(name, sizes)
        assert len(shares) == parts, name
        assert max(shares) <= 1 / parts * 1.04, name
        assert sum(shares) == pytest.approx(1), name


def test_the_host_never_holds_more_than_two_tensors(directory, monkeypatch):
    """The weights go to another dtype, so that no device keeps the host's own memory."""
    a = read_architecture(directory)
    target = abstract_params(mesh(fsdp=8), abstract_decoder(a), jnp.bfloat16)
    sizes = [4 * int(np.prod(tensor.shape)) for tensor in open_tensors(directory).values()]
    reads = Reads(monkeypatch)
    read_weights(directory, a, target)
    assert max(sizes) <= reads.held.most <= 2 * max(sizes) < sum(sizes) / 8


def test_a_read_maps_a_file_and_lets_it_go(directory):
    """Pages of a file that stays mapped would count as memory of the process."""
    tensors = open_tensors(directory)
    values = [tensor.read((slice(None),)) for tensor in tensors.values()]
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("the system does not list the mapped files")
    assert str(directory) not in maps.read_text()
    assert len(values) == len(tensors)


# --- writing -------------------------------------------------------------------------------------


class Fetches:
    """Every tensor that is brought to the host to be written."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.names: list[str] = []
        self.held = Held()
        self.on_host: list[int] = []
        self.on_devices: list[int] = []

        def spied(name: str, shape: Any, dtype: Any, fetch: Callable[[], np.ndarray]) -> NewTensor:
            def fetch_one() -> np.ndarray:
                self.names.append(name)
                self.on_host.append(self.held.nbytes)
                self.on_devices.append(sum(x.nbytes for x in jax.live_arrays()))
                return self.held.add(np.array(fetch()))

            return NewTensor(name, shape, dtype, fetch_one)

        monkeypatch.setattr(hf_weights, "NewTensor", spied)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 30_000], ids=["one", "many"])
def test_tensors_are_fetched_one_by_one(directory, tmp_path, monkeypatch, max_shard_bytes):
    """None is on the host when the next is fetched, and none is copied on the devices."""
    a = read_architecture(directory)
    params = read(directory, a, mesh(fsdp=8))
    sizes = {t.name: 4 * int(np.prod(t.shape)) for t in open_tensors(directory).values()}
    fetches = Fetches(monkeypatch)
    before = sum(x.nbytes for x in jax.live_arrays())
    write_directory(tmp_path / "out", a, params, max_shard_bytes=max_shard_bytes)
    assert sorted(fetches.names) == sorted(sizes)
    assert set(fetches.on_host) == {0}, "the tensor before is still held"
    assert max(fetches.on_devices) <= before + max(sizes.values())


def test_an_import_writes_what_it_reads(directory, tmp_path, monkeypatch):
    """Shards of tensors go from the files to the mesh, and nothing is read twice."""
    reads = Reads(monkeypatch)
    import_directory(directory, tmp_path / "out", mesh(fsdp=8))
    assert {max(shares) for name, shares in reads.of.items() if "norm" not in name} == {1 / 8}
    assert all(sum(shares) == pytest.approx(1) for shares in reads.of.values())


def test_the_record_of_reads_sees_a_whole_tensor(directory, monkeypatch):
    """What the tests above would find if a tensor were read whole, or read and kept."""
    reads = Reads(monkeypatch)
    tensors = open_tensors(directory).values()
    kept = [tensor.read((slice(None),)) for tensor in tensors]
    assert {share for shares in reads.of.values() for share in shares} == {1.0}
    assert reads.held.nbytes == reads.held.most == sum(array.nbytes for array in kept)
    kept.clear()
    assert reads.held.nbytes == 0
