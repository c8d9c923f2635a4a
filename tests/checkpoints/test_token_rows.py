"""Rows of new tokens copied from known ones."""

import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints.token_rows import copy_token_rows
from nrt_jax.errors import InputError
from tests.models.tiny import architecture, decoder


@pytest.mark.parametrize("tied", [False, True])
def test_rows_and_logits_are_those_of_the_source(tied):
    """A chain 5 ← 6 ← 7 reads 6 as it was before."""
    a = architecture(tie_word_embeddings=tied)
    params = nnx.to_pure_dict(nnx.state(decoder(a)))
    before = np.array(params["embedding"])
    copied = copy_token_rows(params, {5: 6, 6: 7})
    expected = before.copy()
    expected[[5, 6]] = before[[6, 7]]
    np.testing.assert_array_equal(copied["embedding"], expected)
    np.testing.assert_array_equal(params["embedding"], before)
    assert copied.keys() == params.keys()
    if not tied:
        head = np.array(params["head"])
        head[:, [5, 6]] = head[:, [6, 7]]
        np.testing.assert_array_equal(copied["head"], head)


@pytest.mark.parametrize("rows", [{61: 0}, {0: 61}, {-1: 0}])
def test_ids_outside_the_vocabulary_are_refused(rows):
    params = nnx.to_pure_dict(nnx.state(decoder(architecture())))
    with pytest.raises(InputError, match=r"token id (61|-1): must be in 0..60"):
        copy_token_rows(params, rows)
