"""The runs that tests of training make, for tests of what answers with them."""

from tests.training.conftest import new_run, reference, tiny_config, words

__all__ = ["new_run", "reference", "tiny_config", "words"]
