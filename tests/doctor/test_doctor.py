"""The doctor: broken folders, missing drivers, models and data, a full disk, a sound machine."""

import errno
import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from nrt_jax import cli
from nrt_jax.chips import CHIPS, chip_of
from nrt_jax.config.compilation import CompilationConfig
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.doctor import devices, folders, run
from nrt_jax.doctor.finding import Finding, first_wrong, table
from nrt_jax.doctor.host import Host, accelerators, driver_cuda
from nrt_jax.errors import RunFailed

Usage = namedtuple("Usage", "total used free")
NOTHING = Host((), (), libtpu=False, cuda_plugin=None, driver_cuda=None, cpu_asked=False)
QUICKSTART = [Path("quickstart/nrt")]


@pytest.fixture
def no_setting(monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)


def cache(folder: Path | str) -> Finding:
    return folders.check_cache(load_config(CompilationConfig, [], [f"cache={folder}"]))


# --- folders -------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_made_for_the_check_alone(no_setting, tmp_path):
    found = cache(tmp_path / "a" / "b")
    assert found.remedy is None
    assert float(found.figures["write_bytes_per_s"]) > 0
    assert not list(tmp_path.iterdir())


def test_a_file_in_place_of_the_cache_folder(no_setting, tmp_path):
    (tmp_path / "cache").write_text("")
    found = cache(tmp_path / "cache")
    assert found.value == f"{tmp_path / 'cache'}: File exists"
    assert "compilation.cache" in (found.remedy or "")


def test_a_file_above_the_cache_folder(no_setting, tmp_path):
    (tmp_path / "file").write_text("")
    assert "Not a directory" in cache(tmp_path / "file" / "cache").value


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_cache_folder_without_rights(no_setting, tmp_path):
    (tmp_path / "cache").mkdir(mode=0o500)
    assert "Permission denied" in cache(tmp_path / "cache").value


def test_a_cache_folder_that_even_root_may_not_write(no_setting):
    assert cache("/proc/nrt_jax").remedy is not None


def test_a_file_in_place_of_the_cache_of_rows(tmp_path):
    (tmp_path / "file").write_text("")
    words = ["data.source=jsonl", "data.path=rows.jsonl", f"data.cache={tmp_path / 'file'}"]
    found = list(run.check_folders(load_config(RunConfig, QUICKSTART, words)))
    named = {finding.name: finding for finding in found}
    assert "data.cache" in (named["data cache"].remedy or "")


def test_jax_s_own_setting_is_the_folder_that_is_looked_at(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file"))
    found = cache("off")
    assert "JAX_COMPILATION_CACHE_DIR" in (found.remedy or "")


def test_a_disk_with_too_little_room(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 10**12 - 10**8, 10**8))
    found = folders.check_folder("cache", tmp_path, 1e9, "")
    assert "100 MB free, 1 GB needed" in found.value
    assert (found.remedy or "").startswith("make room for 1 GB")


def test_a_disk_that_is_full_while_it_is_written(monkeypatch, tmp_path):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    found = folders.check_folder("run directory", tmp_path, 2e9, "")
    assert found.value == f"{tmp_path}: No space left on device"
    assert (found.remedy or "").startswith(f"make room for 2 GB on the disk of {tmp_path}")
    assert not list(tmp_path.iterdir())


def test_the_run_directory_needs_room_for_its_checkpoints(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**12, 0, 2 * 10**11))
    config = load_config(RunConfig, QUICKSTART, [f"run_dir={tmp_path}", "checkpoint.keep_last=2"])
    assert folders.check_run_dir(config, 1e9).remedy is None
    # 8 billion weights, 12 bytes each, twice and one that is being written.
    assert "290 GB needed" in folders.check_run_dir(config, 8e9).value


def test_a_missing_model(tmp_path):
    config = load_config(RunConfig, QUICKSTART, [f"model.path={tmp_path / 'no'}"])
    found, weights = folders.check_model(config)
    assert found.remedy
    assert (str(tmp_path / "no") in found.value, weights) == (True, 0)


def test_a_model_without_its_weights(tmp_path):
    path = load_config(RunConfig, QUICKSTART).model.path
    assert path is not None
    shutil.copy(path / "config.json", tmp_path)
    found, _ = folders.check_model(load_config(RunConfig, QUICKSTART, [f"model.path={tmp_path}"]))
    assert "holds no *.safetensors" in found.value


def test_the_weights_are_counted_as_the_checkpoint_holds_them():
    from nrt_jax.checkpoints.safetensors_files import open_tensors

    config = load_config(RunConfig, QUICKSTART)
    tensors = open_tensors(config.model.path)
    matrices = sum(t.shape[0] * t.shape[1] for t in tensors.values() if len(t.shape) == 2)
    assert folders.check_model(config)[1] == matrices


def test_missing_data(tmp_path):
    words = ["data.source=jsonl", f"data.path={tmp_path / 'no.jsonl'}"]
    found = folders.check_data(load_config(RunConfig, QUICKSTART, words).data)
    assert "no.jsonl" in found.value
    assert found.remedy


def test_data_that_can_be_read(tmp_path):
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text('{"question": "q", "answer": "a"}\n')
    words = ["data.source=jsonl", f"data.path={tmp_path}"]
    found = folders.check_data(load_config(RunConfig, QUICKSTART, words).data)
    assert found.value.endswith(": 2 files can be read")


# --- drivers -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "remedy"),
    [
        (NOTHING, None),
        (NOTHING._replace(libtpu=True), "libtpu is installed and this host shows no TPU"),
        (NOTHING._replace(libtpu=True, cpu_asked=True), None),
        (NOTHING._replace(libtpu=True, tpu_files=["/dev/accel0"]), None),
        (NOTHING._replace(tpu_files=["/dev/vfio/0"]), "pip install 'jax[tpu]'"),
        (NOTHING._replace(cuda_plugin=12), "finds no NVIDIA driver"),
        (NOTHING._replace(cuda_plugin=12, cpu_asked=True), None),
        (NOTHING._replace(cuda_plugin=13, driver_cuda=13000), "shows no GPU"),
        (
            NOTHING._replace(cuda_plugin=13, driver_cuda=12080, gpu_files=["/dev/nvidia0"]),
            "runs CUDA 12.8 and jax's plugin needs 13",
        ),
        (NOTHING._replace(cuda_plugin=12, driver_cuda=13000, gpu_files=["/dev/nvidia0"]), None),
        (
            NOTHING._replace(driver_cuda=13000, gpu_files=["/dev/nvidia0"]),
            "pip install 'jax[cuda13]'",
        ),
        (NOTHING._replace(gpu_files=["/dev/nvidia0"]), "pip install 'jax[cuda12]'"),
        (
            NOTHING._replace(
                libtpu=True, cuda_plugin=12, driver_cuda=12090, gpu_files=["/dev/nvidia0"]
            ),
            None,
        ),
        (NOTHING._replace(libtpu=True, cuda_plugin=12, tpu_files=["/dev/accel0"]), None),
    ],
)
def test_each_accelerator_has_its_library_and_each_library_its_driver(host, remedy):
    found = accelerators(host).remedy
    assert found == remedy if remedy is None else remedy in (found or "")


def test_without_the_driver_s_library_there_is_no_version():
    def load(_: str) -> None:
        raise OSError("libcuda.so.1: cannot open shared object file")

    assert driver_cuda(load) is None


def test_a_device_that_jax_cannot_open(monkeypatch):
    def fails() -> None:
        raise RuntimeError("Unable to initialize backend 'cuda':\n CUDA_ERROR_NO_DEVICE")

    monkeypatch.setattr(devices.jax, "local_devices", fails)
    (found,) = devices.check_devices()
    assert found.value == "Unable to initialize backend 'cuda': CUDA_ERROR_NO_DEVICE"
    assert found.remedy


# --- devices -------------------------------------------------------------------------------------


def test_eight_cpu_devices_compute_and_sum_right():
    sizes = devices.Sizes(matmul=64, products=2, tokens=32, collective=64)
    first, *_, collective = found = list(devices.check_devices(sizes))
    assert first_wrong(found) is None
    assert first.figures["all"] == 8
    assert {f.name for f in found} >= {"matmul 7", "attention 7", "memory 7"}
    assert float(collective.figures["bytes_per_s"]) > 0


def test_a_device_that_computes_wrong_sums(monkeypatch):
    import jax

    ones = devices._timed
    monkeypatch.setattr(devices, "_timed", lambda *a: (1.0, ones(*a, repeats=1)[1] + 1))
    sizes = devices.Sizes(matmul=32, products=1, tokens=32, collective=64)
    device = jax.devices()[0]
    assert "wrong sums" in (devices.check_matmul(device, None, sizes).remedy or "")
    assert "attention is off" in (devices.check_attention(device, None, sizes).remedy or "")
    assert "sum is wrong" in (devices.check_collective(jax.devices(), 64).remedy or "")


def test_a_rate_far_below_the_peak_is_wrong():
    chip = chip_of("NVIDIA H100 80GB HBM3")
    assert devices._rate("matmul 0", 700e12, chip).remedy is None
    slow = devices._rate("matmul 0", 200e12, chip)
    assert "20 % of the peak of 989" in slow.value
    assert slow.remedy


def test_memory_that_another_process_holds():
    class Device:
        id = 0
        limit = 60e9

        def memory_stats(self):
            return {"bytes_limit": self.limit, "bytes_in_use": 0}

    chip, device = chip_of("NVIDIA H100 80GB HBM3"), Device()
    assert devices.check_memory(device, chip).remedy is None
    device.limit = 10e9
    assert "another process" in (devices.check_memory(device, chip).remedy or "")


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5p"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7x"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA L40S", None),
        ("cpu", None),
    ],
)
def test_the_chip_of_a_device_kind(kind, name):
    chip = chip_of(kind)
    assert (chip and chip.name) == name


def test_no_two_chips_have_a_kind_in_common():
    kinds = [kind for chip in CHIPS for kind in chip.kinds]
    assert len(kinds) == len(set(kinds))


# --- the verb ------------------------------------------------------------------------------------


def test_the_first_that_is_wrong_is_the_error(monkeypatch, capsys):
    found = [Finding("versions", "python"), Finding("cache", "broken", "mend it")]
    found.append(Finding("data", "gone", "copy it"))
    monkeypatch.setattr(run, "examine", lambda *_, **__: found)
    assert cli.main(["doctor"]) == 1
    printed = capsys.readouterr()
    assert printed.err == "nrt-jax: error: cache: broken; mend it\n"
    assert printed.out.splitlines() == table(found)
    assert cli.main(["doctor", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert told["first_wrong"] == "cache"
    assert [line["ok"] for line in told["findings"]] == [True, False, False]


def test_what_is_wrong_on_another_host_is_shown(monkeypatch):
    mine, theirs = Finding("cache", "fast"), Finding("matmul 3", "slow", "replace it")
    monkeypatch.setattr(run.distributed, "gather", lambda what, value: [value, list(theirs[:3])])
    found = run.of_all([mine])
    assert found == [mine, theirs._replace(name="process 1: matmul 3")]
    with pytest.raises(RunFailed, match="process 1: matmul 3: slow; replace it"):
        run.raise_first(found)


def test_a_sound_machine_passes(monkeypatch, capsys, tmp_path):
    small = devices.Sizes(matmul=32, products=1, tokens=32, collective=64)
    monkeypatch.setattr(devices, "CPU", small)
    assert cli.main(["doctor", "quickstart/nrt", f"run_dir={tmp_path}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith("ok ") for line in lines)
    assert "run directory" in lines[-1]
