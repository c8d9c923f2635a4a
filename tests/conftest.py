"""What every test shares: eight CPU devices, strict array promotion, the optional data folder."""

import os
import tempfile
from pathlib import Path

# Before jax is imported, and in the environment, so that the processes tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "8")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
# Compiled programs outlive the test run: the same models are compiled again and again.
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), "nrt_jax_tests_compiled")
)

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data and tokenizers; the test is skipped where there is none."""
    default = REPOSITORY.parent / "shared" / "data"
    folder = Path(os.environ.get("NRT_JAX_DATA", default))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; name one in NRT_JAX_DATA")
    return folder
