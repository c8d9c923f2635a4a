"""Prefill, insert and generate, one call at a time."""

import jax
import numpy as np
import pytest

from nrt_jax.engine.decode_state import SlotRequests, bucket, padded, slot_sampling
from nrt_jax.engine.sampling import Sampling
from nrt_jax.planning.compiled_text import collectives
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
from tests.models.tiny import mesh


def prefill(run, tokens, padding=0):
    padded = np.full(bucket(len(tokens)), padding, np.int32)
    padded[: len(tokens)] = tokens
    return run.prefill(params=params(), padded_tokens=padded, true_length=len(tokens))


def drive(run, state, steps):
    """Results of some steps on the host."""
    results = []
    for _ in range(steps):
        state, sampled = run.generate(params(), state)
        results.append(jax.tree.map(np.asarray, sampled))
    return state, results


def tokens_at(results, slot):
    return [int(result.tokens[0, slot]) for result in results if result.count_B[slot]]


def greedy_request(slot):
    request = requests([slot], prompt_slot=slot)
    return request._replace(sampling=slot_sampling([Sampling(temperature=0.0)]))


def requests(slots, seed=0, limit=12, prompt_slot=0):
    return SlotRequests(
        slot_K=np.asarray(slots, np.int32),
        row_K=np.arange(len(slots), dtype=np.int32),
        prompt=prompt_slot,
        key_K=jax.random.split(jax.random.key(seed), len(slots)),
        limit_K=np.full(len(slots), limit, np.int32),
        sampling=slot_sampling([Sampling()] * len(slots)),
    )


def test_a_step_draws_a_token_in_every_active_slot():
    """A slot's tokens are the greedy continuation, and then nothing until it is filled again."""
    run, (first, second, third) = engine(), prompts(6, 17, 9)
    state = run.init_decode_state()
    for slot, tokens in ((2, first), (0, second)):
        state = run.insert(prefill(run, tokens), state, greedy_request(slot))
    state, results = drive(run, state, 13)
    state = run.insert(prefill(run, third), state, greedy_request(2))
    state, more = drive(run, state, 13)
    for tokens, slot, read in ((first, 2, results), (second, 0, results), (third, 2, more)):
        written, end = greedy(LLAMA_64, tokens, 12, STOPS)
        assert tokens_at(read, slot) == written + ([] if end is None else [end])
    assert tokens_at(results + more, 1) == tokens_at(more, 0) == []


def test_a_step_says_which_slots_are_done_and_the_logprobs_of_its_tokens():
    run, tokens = engine(), prompt(6)
    state = run.insert(prefill(run, tokens), run.init_decode_state(), requests([3], limit=1))
    state, result = run.generate(params(), state)
    assert result.count_B.tolist() == [0, 0, 0, 1]
    assert result.done_B.tolist() == [False, False, False, True]
    assert int(state.generated_B[3]) == 1
    expected = logits_after(LLAMA_64, tokens, [0])[0]
    expected = jax.nn.log_softmax(expected)[result.tokens[0, 3]]
    np.testing.assert_allclose(result.logprobs[0, 3], expected, atol=1e-4)


def test_samples_of_one_prefill_are_single_requests():
    run, tokens = engine(slots=16, stop_ids=NO_STOPS), prompt(18)
    together = requests([2, 0, 3])
    prefix = prefill(run, tokens)
    _, copied = drive(run, run.insert(prefix, run.init_decode_state(), together), 12)
    for k, slot in enumerate([2, 0, 3]):
        alone = requests([slot])._replace(key_K=together.key_K[k : k + 1])
        state = run.insert(prefill(run, tokens), run.init_decode_state(), alone)
        _, single = drive(run, state, 12)
        assert tokens_at(copied, slot) == tokens_at(single, slot)
        for a, b in zip(copied, single, strict=True):
            np.testing.assert_allclose(a.logprobs[0, slot], b.logprobs[0, slot], atol=1e-5)
    assert len({tuple(tokens_at(copied, slot)) for slot in (2, 0, 3)}) == 3


def test_inserting_leaves_other_slots_alone():
    run, (first, second) = engine(slots=16, stop_ids=NO_STOPS), prompts(6, 20)
    state = run.insert(prefill(run, first), run.init_decode_state(), requests([0]))
    _, undisturbed = drive(run, state, 12)
    state = run.insert(prefill(run, first), run.init_decode_state(), requests([0]))
    state, start = drive(run, state, 5)
    state = run.insert(prefill(run, second), state, requests([1, -1], seed=1, prompt_slot=3))
    _, rest = drive(run, state, 7)
    assert tokens_at(start + rest, 0) == tokens_at(undisturbed, 0)
    assert len(tokens_at(rest, 1)) == 7
    assert tokens_at(rest, 15) == []  # where a slot of -1 would land if it counted from the end


def test_a_slots_last_sequence_leaves_no_trace_in_its_next():
    run, (long, short) = engine(slots=16, stop_ids=NO_STOPS), prompts(32, 2)
    state = run.insert(prefill(run, long), run.init_decode_state(), requests([1]))
    state, _ = drive(run, state, 12)
    state = run.insert(prefill(run, short), state, requests([1], seed=3))
    _, used = drive(run, state, 12)
    state = run.insert(prefill(run, short), run.init_decode_state(), requests([1], seed=3))
    _, fresh = drive(run, state, 12)
    assert tokens_at(used, 1) == tokens_at(fresh, 1)
    for a, b in zip(used, fresh, strict=True):
        np.testing.assert_array_equal(a.logprobs[0, 1], b.logprobs[0, 1])


def test_the_penalty_counts_a_slots_own_prompt_and_tokens_alone():
    """Not those of its neighbours, nor those of the sequence that had the slot before."""
    run, (first, second) = engine(slots=16, stop_ids=NO_STOPS), prompts(6, 20)
    state = run.insert(prefill(run, first), run.init_decode_state(), requests([0, 1]))
    state, results = drive(run, state, 5)
    state = run.insert(prefill(run, second), state, requests([1, 2], prompt_slot=3))
    seen = [set(np.nonzero(np.asarray(state.seen_BV)[slot])[0].tolist()) for slot in range(3)]
    assert seen[0] == {*first.tolist(), *tokens_at(results, 0)}
    assert seen[1] == seen[2] == set(second.tolist())
    assert not seen[1] >= seen[0]


def test_prefill_does_not_see_its_padding():
    run, tokens = engine(), prompt(9)
    one, other = prefill(run, tokens, padding=0), prefill(run, tokens, padding=5)
    np.testing.assert_array_equal(one.logits_RV, other.logits_RV)
    np.testing.assert_allclose(one.logits_RV[0], logits_after(LLAMA_64, tokens, [0])[0], atol=1e-4)


def test_prefill_refuses_what_it_cannot_do():
    run, tokens = engine(), prompt(16)
    with pytest.raises(ValueError, match="true_length 17 exceeds the 16"):
        run.prefill(params=params(), padded_tokens=tokens, true_length=17)


def test_the_state_is_donated_and_the_weights_are_not():
    run = engine()
    state = run.init_decode_state()
    inserted = run.insert(prefill(run, prompt(4)), state, requests([0]))
    generated, _ = run.generate(params(), inserted)
    assert state.layers[0].prompt_k.values.is_deleted()
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


def test_a_decode_step_of_several_devices_is_one_sum_of_two_counts(monkeypatch):
    """No device needs tokens, keys or values of the slots of another."""
    run, texts = engine(slots=8, mesh=mesh(data=2)), []
    get = run.programs.get

    def reads(kind, *shapes, make):
        def compiled(*args):
            program = get(kind, *shapes, make=make).__wrapped__.lower(*args).compile()
            texts.append(program.as_text())
            return program(*args)

        return compiled

    state = run.init_decode_state()
    monkeypatch.setattr(run.programs, "get", reads)
    run.generate(params(), state, steps=4)
    found = collectives(texts[0], 2, conditional=True)
    assert [(c.kind, c.shapes) for c in found if c.loops] == [("all-reduce", (("s32", (2,)),))]
