"""Rows of new tokens copied from known ones."""

import numpy as np
import pytest
from flax import nnx

from nrt_jax.checkpoints.token_rows import (
    MEAN_ROW,
    RowNames,
    copy_token_rows,
    row_sources,
    with_new_rows,
)
from nrt_jax.data.tokenizer import Tokenizer
from nrt_jax.errors import InputError
from tests.data.made_tokenizers import write_made_tokenizer
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


# --- rows of new think tokens --------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.load(write_made_tokenizer("llama3", tmp_path_factory.mktemp("made") / "it"))


@pytest.mark.parametrize("tied", [False, True])
def test_mean_rows_have_the_mean_norm_of_their_rows(tied, small_tokenizer):
    """The end token copies a row, the start token takes the mean of a text or of all tokens."""
    tokenizer = small_tokenizer
    a = architecture(vocab_size=tokenizer.vocab_size, tie_word_embeddings=tied)
    params = nnx.to_pure_dict(nnx.state(decoder(a, vocab_multiple=128)))
    start, end = tokenizer.new_ids
    text = tokenizer.encode("the user asks the assistant")
    all_others = [i for i in range(tokenizer.vocab_size) if i not in (start, end)]
    for name, ids in (("text:the user asks the assistant", text), (MEAN_ROW, all_others)):
        changed = with_new_rows(params, tokenizer, RowNames(name, "<|eot_id|>"))
        tables = [("embedding", 0), *([] if tied else [("head", 1)])]
        assert len(ids) > 2
        assert changed.keys() == params.keys()
        for weight, dim in tables:
            before, after = (np.moveaxis(np.array(p[weight]), dim, 0) for p in (params, changed))
            mean = before[ids].mean(0)
            norm = np.linalg.norm(before[ids], axis=1).mean()
            np.testing.assert_allclose(after[start], mean * norm / np.linalg.norm(mean), rtol=1e-4)
            np.testing.assert_array_equal(after[end], before[tokenizer.eos_id])
            others = np.setdiff1d(np.arange(len(before)), [start, end])
            np.testing.assert_array_equal(after[others], before[others])


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", "model.new_rows_from: 'nothing' is no token of .*; use an entry of its"),
        ("text:", "model.new_rows_from: 'text:' is a text that .* cannot spell; use another text"),
    ],
)
def test_a_name_without_rows_is_one_line(name, message, small_tokenizer):
    with pytest.raises(InputError, match=f"^{message}"):
        row_sources(small_tokenizer, name)
