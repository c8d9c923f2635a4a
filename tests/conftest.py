"""What every test shares: eight CPU devices, strict array promotion, the optional data folder."""

import gc
import os
import signal
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import hypothesis
import pytest

REPOSITORY = Path(__file__).resolve().parent.parent

# A shell starts its background jobs with Ctrl-C ignored, and so would be the programs of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# jax reads these when it is imported, which no module above does; in the environment, so that the
# processes that tests start have them too.
for name, value in {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "8",
    "JAX_NUMPY_RANK_PROMOTION": "raise",
    # Compiled programs outlive a test: the same small models are compiled again and again.
    "JAX_COMPILATION_CACHE_DIR": str(REPOSITORY / ".pytest_cache" / "compiled"),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    # Most programs of the tests run once: what makes code fast costs more than it saves. The older
    # emitters of loops, where jax has them, compile three times as fast, and one part per program
    # needs one LLVM module.
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + (" --xla_cpu_use_fusion_emitters=false" if version("jax").startswith("0.10.") else ""),
}.items():
    os.environ.setdefault(name, value)

# The first example of a test compiles, and takes as long as the machine is busy.
hypothesis.settings.register_profile("tests", deadline=None)
hypothesis.settings.load_profile("tests")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and tokenizers; the test is skipped where there is none."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("NRT_JAX_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; name one in NRT_JAX_DATA")
    return folder


@pytest.fixture(scope="session")
def shared_faults(shared_data) -> Path:
    """The folder of inputs that once broke something, beside the data."""
    folder = shared_data.parent / "faults"
    if not folder.is_dir():
        pytest.skip(f"no folder of faulty inputs at {folder}")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """A directory of SmolLM2-135M-Instruct; the test is skipped where there is none."""
    folder = Path(os.environ.get("NRT_JAX_SMOLLM2", REPOSITORY.parent / "smollm2"))
    if not (folder / "config.json").is_file():
        pytest.skip(f"no SmolLM2-135M-Instruct at {folder}; name its directory in NRT_JAX_SMOLLM2")
    return folder


@pytest.fixture(autouse=True, scope="module")
def bounded_memory() -> Iterator[None]:
    """Forget compiled programs before they take too much: gigabytes, or too many maps of memory.

    Each maps memory three times and the large ones thirty times, and a process that asks Linux for
    more than 65,530 maps is aborted inside XLA.
    """
    yield
    maps, sizes = Path("/proc/self/maps"), Path("/proc/self/statm")
    if not maps.exists():
        return
    resident_bytes = int(sizes.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    if resident_bytes > 3e9 or len(maps.read_bytes().splitlines()) > 25_000:
        import jax

        jax.clear_caches()
        gc.collect()
