"""A pretrained decoder token by token, padded and packed, against transformers doing the same."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from nrt_jax.checkpoints import load_pretrained
from nrt_jax.checkpoints.hf_config import read_architecture
from nrt_jax.models.decoder import Decoder
from tests.models.incremental import prefill_and_decode
from tests.models.parity import assert_close_logits, compare_gradients
from tests.models.references import VOCAB, load_model, save_gradients
from tests.models.tiny import close, read, tokens

PROMPT, LENGTH = 108, 116


class Pair(NamedTuple):
    """One directory, read by us and by transformers."""

    ours: Decoder
    theirs: Any


@pytest.fixture(scope="module", params=["llama3.1", "mistral_v0.1", "llama3.2_tied"])
def directory(request, reference_of):
    return reference_of(request.param).directory


@pytest.fixture(scope="module")
def pair(directory) -> Pair:
    return Pair(load_pretrained(directory), load_model(directory))


forward = nnx.jit(lambda model, *inputs: model(*inputs))


def as_torch(ids: Any) -> torch.Tensor:
    return torch.tensor(np.array(ids), dtype=torch.long)


def test_prefill_and_decode(pair):
    """Prompt and sequence are longer than the window of 100, so that tokens fall out of it."""
    ids = tokens((2, LENGTH), VOCAB)
    ours = prefill_and_decode(pair.ours, ids, PROMPT)
    close(ours, forward(pair.ours, ids))
    theirs = []
    with torch.no_grad():
        step = pair.theirs(as_torch(ids[:, :PROMPT]), use_cache=True)
        theirs.append(step.logits)
        for t in range(PROMPT, LENGTH):
            step = pair.theirs(
                as_torch(ids[:, t : t + 1]), past_key_values=step.past_key_values, use_cache=True
            )
            theirs.append(step.logits)
    assert_close_logits(ours, torch.cat(theirs, dim=1).numpy())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(pair, side):
    """Rows with 0, 5 and 31 tokens of padding, whose ids are junk."""
    valid = np.arange(LENGTH)[None] >= np.asarray([0, 5, 31])[:, None]
    valid = valid if side == "left" else valid[:, ::-1].copy()
    ids = tokens(valid.shape, VOCAB)
    logits = forward(pair.ours, ids, None, jnp.asarray(valid, jnp.int32))
    for row, keep in enumerate(valid):
        alone = forward(pair.ours, ids[row : row + 1, keep])
        close(jax.nn.log_softmax(logits[row, keep]), jax.nn.log_softmax(alone[0]))
    with torch.no_grad():
        theirs = pair.theirs(
            as_torch(ids),
            attention_mask=as_torch(valid),
            position_ids=as_torch(np.maximum(np.cumsum(valid, axis=1) - 1, 0)),
        ).logits.numpy()
    assert_close_logits(logits[valid], theirs[valid])


LENGTHS = (130, 70, 1, 45)


def test_packed_segments(pair, directory, tmp_path):
    """One row of four sequences and some padding: values and gradients of the four alone."""
    ids = tokens((1, 256), VOCAB)
    ends = np.cumsum(LENGTHS)
    pieces = [slice(end - n, end) for end, n in zip(ends, LENGTHS, strict=True)]
    segments = np.zeros((1, 256), np.int32)
    for n, piece in enumerate(pieces):
        segments[:, piece] = n + 1
    definition, state = nnx.split(pair.ours)

    def log_likelihood(logits, ids):
        return jnp.take_along_axis(
            jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1
        ).sum()

    @jax.jit
    def packed(params):
        logits = nnx.merge(definition, nnx.State(params))(ids, None, jnp.asarray(segments))
        alone = [log_likelihood(logits[:, piece], ids[:, piece]) for piece in pieces]
        return sum(alone), logits

    gradients, logits = jax.grad(packed, has_aux=True)(nnx.to_pure_dict(state))

    theirs = load_model(directory)
    for piece in pieces:
        sequence = as_torch(ids[:, piece])
        reference = theirs(sequence).logits
        assert_close_logits(logits[:, piece], reference.detach().numpy())
        log_pi = torch.log_softmax(reference[:, :-1], dim=-1)
        log_pi.gather(-1, sequence[:, 1:, None]).sum().backward()
    expected = read(save_gradients(theirs, tmp_path), read_architecture(directory))
    errors = compare_gradients(gradients, expected)
    assert max(errors.values()) <= 1e-4, errors


def test_positions_may_be_given(pair):
    """Rotary positions are relative: a shift of all changes nothing, a gap does."""
    ids = tokens((1, 24), VOCAB)
    places = jnp.arange(24)[None]
    expected = forward(pair.ours, ids)
    close(forward(pair.ours, ids, places), expected, 1e-6)
    close(forward(pair.ours, ids, places + 50), expected, 1e-4)
    gap = jnp.where(places < 12, places, places + 7)
    logits = forward(pair.ours, ids, gap)
    close(logits[:, :12], expected[:, :12])
    assert np.abs(logits - expected)[:, 12:].max() > 1e-2
    with torch.no_grad():
        # The mask of ones, since transformers without one takes a gap for the end of a sequence.
        theirs = pair.theirs(
            as_torch(ids), attention_mask=torch.ones((1, 24)), position_ids=as_torch(gap)
        ).logits.numpy()
    assert_close_logits(logits, theirs)
