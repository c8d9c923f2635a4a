"""The engine as JetStream's driver uses it, and what our own loop asks of it besides."""

import jax
import numpy as np
import pytest

from nrt_jax.engine import jetstream_compat as jetstream
from nrt_jax.engine.decode_state import SlotRequests, bucket, padded, slot_sampling
from nrt_jax.engine.engine import DecoderEngine, SampledTokens
from nrt_jax.engine.sampling import Sampling
from tests.engine.toy import (
    LLAMA_64,
    NO_STOPS,
    STOPS,
    engine,
    greedy,
    logits_after,
    params,
    prompt,
    prompts,
)


def prefill(run, tokens, padding=0):
    padded = np.full(bucket(len(tokens)), padding, np.int32)
    padded[: len(tokens)] = tokens
    return run.prefill(params=params(), padded_tokens=padded, true_length=len(tokens))


def drive(run, state, steps):
    """Results of some steps on the host, as JetStream's detokenize thread reads them."""
    results = []
    for _ in range(steps):
        state, result = run.generate(params(), state)
        result.copy_to_host_async()
        results.append(result.convert_to_numpy())
    return state, results


def tokens_at(results, slot):
    data = [result.get_result_at_slot(slot) for result in results]
    return [int(d.tokens[0, 0]) for d in data if d.valid[0, 0]]


def requests(slots, seed=0, limit=12, room=0):
    return SlotRequests(
        slot_K=np.asarray(slots, np.int32),
        row_K=np.arange(len(slots), dtype=np.int32),
        prompt=room,
        key_K=jax.random.split(jax.random.key(seed), len(slots)),
        limit_K=np.full(len(slots), limit, np.int32),
        sampling=slot_sampling([Sampling()] * len(slots)),
    )


def test_is_an_engine_of_jetstream():
    run = engine()
    assert issubclass(DecoderEngine, jetstream.Engine)
    assert run.max_concurrent_decodes == 4
    assert run.max_prefill_length == 32
    assert run.samples_per_slot == 1
    weights = params()
    assert run.load_params(weights) is weights
    assert run.get_tokenizer() == jetstream.TokenizerParameters(path="")


def test_driven_as_jetstream_does_it_writes_the_greedy_continuation():
    """Prefill, transfer, insert, free the prefix, generate, read by slot, refill the slot."""
    run, (first, second, third) = engine(), prompts(6, 17, 9)
    state = run.init_decode_state()
    for slot, tokens in ((2, first), (0, second)):
        prefix = jax.device_put(prefill(run, tokens), run.get_prefix_destination_sharding())
        state = run.insert(prefix, state, slot=slot)
        jax.tree.map(lambda leaf: leaf.delete(), prefix)
    state, results = drive(run, state, 13)
    state = run.insert(prefill(run, third), state, slot=2)
    state, more = drive(run, state, 13)
    for tokens, slot, read in ((first, 2, results), (second, 0, results), (third, 2, more)):
        written, end = greedy(LLAMA_64, tokens, 12, STOPS)
        assert tokens_at(read, slot) == written + ([] if end is None else [end])
    assert tokens_at(results + more, 1) == tokens_at(more, 0) == []


def test_results_are_what_jetstreams_detokenizer_expects():
    """It stops a slot by its lengths, by its own stop tokens, and at the first invalid token."""
    run, tokens = engine(), prompt(6)
    written, end = greedy(LLAMA_64, tokens, 12, STOPS)
    state = run.insert(prefill(run, tokens), run.init_decode_state(), slot=1)
    _, results = drive(run, state, 13)
    data = [result.get_result_at_slot(1) for result in results]
    drawn = len(written) + (end is not None)
    assert [int(d.lengths[0]) for d in data[:drawn]] == list(range(1, drawn + 1))
    assert [bool(d.valid[0, 0]) for d in data] == [True] * drawn + [False] * (13 - drawn)
    assert data[0].tokens.shape == data[0].valid.shape == (1, 1)


def test_convert_to_numpy_keeps_the_columns_and_the_class():
    run, tokens = engine(), prompt(6)
    state = run.insert_copies(prefill(run, tokens), run.init_decode_state(), requests([3], limit=1))
    _, result = run.generate(params(), state)
    host = result.convert_to_numpy()
    assert isinstance(host, SampledTokens)
    assert isinstance(host.data, np.ndarray)
    assert host.valid_B.tolist() == host.done_B.tolist() == [False, False, False, True]
    assert host.length_B[3] == 1
    expected = logits_after(LLAMA_64, tokens, [0])[0]
    expected = jax.nn.log_softmax(expected)[host.token_B[3]]
    np.testing.assert_allclose(host.logprob_B[3], expected, atol=1e-4)


def test_copies_of_one_prefill_are_single_requests():
    run, tokens = engine(slots=16, stop_ids=NO_STOPS), prompt(18)
    together = requests([2, 0, 3])
    prefix = prefill(run, tokens)
    _, copied = drive(run, run.insert_copies(prefix, run.init_decode_state(), together), 12)
    for copy, slot in enumerate([2, 0, 3]):
        alone = requests([slot])._replace(key_K=together.key_K[copy : copy + 1])
        state = run.insert(prefill(run, tokens), run.init_decode_state(), slot, alone)
        _, single = drive(run, state, 12)
        assert tokens_at(copied, slot) == tokens_at(single, slot)
        for a, b in zip(copied, single, strict=True):
            np.testing.assert_allclose(a.logprob_B[slot], b.logprob_B[slot], atol=1e-5)
    assert len({tuple(tokens_at(copied, slot)) for slot in (2, 0, 3)}) == 3


def test_inserting_leaves_other_slots_alone():
    run, (first, second) = engine(slots=16, stop_ids=NO_STOPS), prompts(6, 20)
    state = run.insert_copies(prefill(run, first), run.init_decode_state(), requests([0]))
    _, undisturbed = drive(run, state, 12)
    state = run.insert_copies(prefill(run, first), run.init_decode_state(), requests([0]))
    state, start = drive(run, state, 5)
    state = run.insert_copies(prefill(run, second), state, requests([1, -1], seed=1, room=3))
    _, rest = drive(run, state, 7)
    assert tokens_at(start + rest, 0) == tokens_at(undisturbed, 0)
    assert len(tokens_at(rest, 1)) == 7
    assert tokens_at(rest, 15) == []  # where a slot of -1 would land if it counted from the end


def test_a_slots_last_sequence_leaves_no_trace_in_its_next():
    run, (long, short) = engine(slots=16, stop_ids=NO_STOPS), prompts(32, 2)
    state = run.insert_copies(prefill(run, long), run.init_decode_state(), requests([1]))
    state, _ = drive(run, state, 12)
    state = run.insert_copies(prefill(run, short), state, requests([1], seed=3))
    _, used = drive(run, state, 12)
    state = run.insert_copies(prefill(run, short), run.init_decode_state(), requests([1], seed=3))
    _, fresh = drive(run, state, 12)
    assert tokens_at(used, 1) == tokens_at(fresh, 1)
    for a, b in zip(used, fresh, strict=True):
        np.testing.assert_array_equal(a.logprob_B[1], b.logprob_B[1])


def test_prefill_does_not_see_its_padding():
    run, tokens = engine(), prompt(9)
    one, other = prefill(run, tokens, padding=0), prefill(run, tokens, padding=5)
    np.testing.assert_array_equal(one.logits_V, other.logits_V)
    np.testing.assert_allclose(one.logits_V, logits_after(LLAMA_64, tokens, [0])[0], atol=1e-4)


def test_prefill_refuses_what_it_cannot_do():
    run, tokens = engine(), prompt(16)
    with pytest.raises(ValueError, match="true_length 17 exceeds the 16"):
        run.prefill(params=params(), padded_tokens=tokens, true_length=17)


def test_the_state_is_donated_and_the_weights_are_not():
    run = engine()
    state = run.init_decode_state()
    inserted = run.insert(prefill(run, prompt(4)), state, slot=0)
    generated, _ = run.generate(params(), inserted)
    assert state.layers[0].prompt_k_NHSd.values.is_deleted()
    assert inserted.layers[0].own_v_BHTd.values.is_deleted()
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(generated))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params()))


@pytest.mark.parametrize(
    ("length", "size"), [(1, 16), (16, 16), (17, 32), (32, 32), (33, 64), (4096, 4096)]
)
def test_bucket(length, size):
    assert bucket(length) == size


def test_padded():
    tokens = padded(np.arange(1, 18))
    assert tokens.dtype == np.int32
    assert tokens.tolist() == [*range(1, 18), *[0] * 15]
    assert len(padded(np.arange(16))) == 16
