"""Compiled programs are kept for the next process, in a folder that stays small."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from nrt_jax.compilation import CompileWatch, use_cache
from nrt_jax.config.compilation import CompilationConfig
from nrt_jax.config.load import load_config
from nrt_jax.config.paths import user_cache
from nrt_jax.errors import InputError
from nrt_jax.local import _environment, _free_port

REPOSITORY = Path(__file__).resolve().parent.parent
SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_compilation_cache_max_size",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture
def unset(monkeypatch):
    """jax as it is where nobody set up a cache."""
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    for name in SETTINGS:
        monkeypatch.delenv(name.upper(), raising=False)
    jax.config.update("jax_compilation_cache_dir", None)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "nrt_jax" / "compiled"


def config(*overrides: str) -> CompilationConfig:
    return load_config(CompilationConfig, [], overrides)


def test_on_by_default_in_the_users_cache_folder(unset, home):
    use_cache(config())
    assert jax.config.jax_compilation_cache_dir == str(home)
    assert jax.config.jax_compilation_cache_max_size == 2_000_000_000
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.1
    assert home.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("named", ["", "relative"])
def test_without_a_folder_of_xdg(named, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_cache() == tmp_path / ".cache" / "nrt_jax"


def test_off(unset, home):
    use_cache(config("cache=off"))
    assert jax.config.jax_compilation_cache_dir is None
    assert not home.exists()


def test_a_folder_of_ones_own(unset, tmp_path):
    use_cache(config(f"cache={tmp_path / 'mine'}", "cache_gb=0.5"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "mine")
    assert jax.config.jax_compilation_cache_max_size == 500_000_000


def test_the_settings_of_jax_win(unset, home, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_MAX_SIZE", "7")
    jax.config.update("jax_compilation_cache_max_size", 7)
    use_cache(config())
    assert jax.config.jax_compilation_cache_max_size == 7
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "jax"))
    use_cache(config(f"cache={tmp_path / 'mine'}"))
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "jax")


def test_a_folder_that_cannot_be_written_is_one_warning(unset, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    use_cache(config(f"cache={tmp_path / 'file' / 'cache'}"))
    (warning,) = caplog.messages
    assert warning == (
        f"{tmp_path}/file/cache: Not a directory: every start compiles anew; set "
        "compilation.cache to a folder, or to off"
    )
    assert jax.config.jax_compilation_cache_dir is None


def test_a_user_without_a_home(unset, monkeypatch, caplog):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    use_cache(config())
    assert "the user's cache folder: Could not determine home directory" in caplog.text


def test_what_a_killed_process_left_is_removed(unset, tmp_path):
    for name in ("whole-cache", "whole-atime", "half-cache"):
        (tmp_path / name).write_bytes(bytes(8))
    use_cache(config(f"cache={tmp_path}"))
    assert sorted(p.name for p in tmp_path.glob("*-*")) == ["whole-atime", "whole-cache"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("cache=gs://bucket/cache", "must be 'auto' or 'off' or a path of this machine, not a gs:"),
        ("cache=false", "cache=false: must be 'auto' or 'off'"),
        ("cache_gb=0", "cache_gb=0: must be greater than 0"),
    ],
)
def test_bad_settings(override, said):
    with pytest.raises(InputError) as error:
        config(override)
    assert said in str(error.value)


def test_counts_what_is_compiled():
    watch, seen = CompileWatch(), []
    watch.on_change = lambda: seen.append((watch.compiling, watch.programs))
    watch.listen()
    try:
        jax.jit(lambda x: x * 3 + 1)(jnp.arange(17)).block_until_ready()
    finally:
        watch.on_change = None
    assert seen[:2] == [(True, 0), (False, 1)]
    assert watch.take() > 0
    assert watch.take() == 0


FIRST_COMPILES = """
import sys
from nrt_jax import distributed
distributed.initialise(distributed.find_place())
import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from nrt_jax.compilation import use_cache
from nrt_jax.config.compilation import CompilationConfig
use_cache(CompilationConfig(cache=sys.argv[1]))
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
events = []
jax.monitoring.register_event_listener(lambda event, **_: events.append(event))
rows = NamedSharding(Mesh(jax.devices(), "x"), PartitionSpec("x"))
program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((2,), float, sharding=rows))
for process in range(2):
    if process == distributed.process_index():
        program.compile()
    distributed.wait_for_all("compiled")
print(events.count("/jax/compilation_cache/cache_hits"), file=sys.stderr)
distributed.leave()
"""


def test_processes_find_what_the_first_compiled(tmp_path):
    address = f"localhost:{_free_port()}"
    environment = {k: v for k, v in os.environ.items() if k not in map(str.upper, SETTINGS)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FIRST_COMPILES, str(tmp_path)],
            stderr=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            env=environment | _environment(address, process, 2, 1),
        )
        for process in range(2)
    ]
    said = [process.communicate(timeout=300)[1].split() for process in processes]
    assert [words[-1:] for words in said] == [["0"], ["1"]], said


PRINTS_NOTHING = """
from nrt_jax.devices import leave_out_absent_tpu
leave_out_absent_tpu()
import jax
print(jax.default_backend())
"""


def test_no_errors_of_libtpu_on_a_host_without_tpu():
    environment = {k: v for k, v in os.environ.items() if k != "JAX_PLATFORMS"}
    # Otherwise another process that holds libtpu would silence it.
    environment["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
    result = subprocess.run(
        [sys.executable, "-c", PRINTS_NOTHING],
        capture_output=True,
        text=True,
        cwd=REPOSITORY,
        env=environment,
    )
    if result.stdout != "cpu\n":
        pytest.skip("this host has an accelerator")
    assert result.stderr == ""
