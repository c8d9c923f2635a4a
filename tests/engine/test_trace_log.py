"""Traces cut out of dispatches: of any lengths, over slots that are refilled and that move."""

import numpy as np

from nrt_jax.engine.decode_state import Sampled
from nrt_jax.engine.requests import Read
from nrt_jax.engine.slot_table import SequenceId
from nrt_jax.engine.trace_log import TraceLog

STEPS = 4


def read(tokens, names, before, *, done=(), stopped=(), layout=0):
    """A dispatch whose slot b drew `tokens[b]`, of sequence `names[b]`."""
    drawn = np.zeros((STEPS, len(tokens)), np.int32)
    for slot, of_slot in enumerate(tokens):
        drawn[: len(of_slot), slot] = of_slot
    count_B = np.asarray([len(of_slot) for of_slot in tokens])
    none = np.zeros((STEPS, len(tokens), 0))
    return Read(
        sampled=Sampled(
            tokens=drawn,
            logprobs=-drawn.astype(np.float32),
            top_ids=none.astype(np.int32),
            top_logprobs=none.astype(np.float32),
            count_B=count_B,
            done_B=np.isin(np.arange(len(tokens)), done),
            steps=np.int32(count_B.max()),
        ),
        sequences=[None if name is None else SequenceId(name, 0) for name in names],
        live_B=count_B > 0,
        before_B=np.asarray(before),
        finished={slot: "stop" if slot in stopped else "length" for slot in done},
        layout=layout,
    )


def ended(log, one):
    return {
        sequence.ticket: (trace.tokens.tolist(), trace.end_token)
        for sequence, trace in log.add(one)
    }


def test_a_trace_is_what_its_slot_drew_between_start_and_end():
    log = TraceLog()
    assert ended(log, read([[1, 2, 3], [11, 12, 13]], [1, 2], [0, 0])) == {}
    assert ended(log, read([[4], [14, 15]], [1, 2], [3, 3], done=[0])) == {1: ([1, 2, 3, 4], None)}
    refilled = read([[21, 22], [16]], [3, 2], [0, 5], done=[0, 1], stopped=[0, 1])
    assert ended(log, refilled) == {3: ([21], 22), 2: ([11, 12, 13, 14, 15], 16)}
    assert not log._reads, "no dispatch is kept for nobody"
    assert ended(log, read([[31], []], [4, None], [0, 0], done=[0])) == {4: ([31], None)}


def test_a_sequence_whose_slot_moves_keeps_its_tokens():
    log = TraceLog()
    ended(log, read([[1, 2], [11, 12], []], [1, 2, None], [0, 0, 0]))
    moved = read([[13, 14], [21, 22]], [2, 3], [2, 0], layout=1)
    assert ended(log, moved) == {}
    last = read([[15], [23]], [2, 3], [4, 2], done=[0, 1], layout=1)
    assert ended(log, last) == {2: ([11, 12, 13, 14, 15], None), 3: ([21, 22, 23], None)}


def test_logprobs_go_with_the_tokens():
    log = TraceLog()
    ((_, trace),) = log.add(read([[5, 6]], [1], [0], done=[0], stopped=[0]))
    assert (trace.logprobs.tolist(), trace.end_logprob) == ([-5.0], -6.0)
