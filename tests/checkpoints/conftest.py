"""The models and the runs that tests of models and of training make, for tests of their files."""

from tests.models.conftest import copy, reference_of
from tests.training.conftest import new_run, reference, tiny_config, words

__all__ = ["copy", "new_run", "reference", "reference_of", "tiny_config", "words"]
