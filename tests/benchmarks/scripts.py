"""The scripts of benchmarks/, which is no package, as modules."""

import importlib.util
from types import ModuleType

from tests.conftest import REPOSITORY


def load(name: str) -> ModuleType:
    """The module of `benchmarks/<name>.py`, which must import no other script."""
    spec = importlib.util.spec_from_file_location(name, REPOSITORY / "benchmarks" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
