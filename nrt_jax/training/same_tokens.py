"""Several processes train on the same tokens: digests of them, compared in every step.

All processes take the same decisions from the same values. Where one of them comes apart, by a
library that depends on the host or a file that changed, the sum of the gradients would still be
finite, and wrong.
"""

import hashlib
from collections.abc import Sequence

import numpy as np

from nrt_jax import distributed
from nrt_jax.errors import RunFailed
from nrt_jax.types import Group, TokenizedExample

_REMEDY = (
    "the processes have come apart, so nothing was trained on them; run the same command again, "
    "and compare the hosts' packages if it happens again"
)


def check_same_rows(
    when: str,
    examples: Sequence[TokenizedExample],
    traces: Sequence[np.ndarray] | None = None,
) -> None:
    """RunFailed, with the first that differs, unless all processes have these examples and, for
    each of them, these tokens of a trace."""
    if distributed.process_count() == 1:
        return
    parts = {_row(i, example): _of_example(example) for i, example in enumerate(examples)}
    for i, tokens in enumerate(traces or ()):
        parts[f"{_row(i, examples[i])}, trace"] = _digest(tokens)
    distributed.check_same(when, parts, _REMEDY, RunFailed)


def check_same_groups(when: str, groups: Sequence[Group]) -> None:
    """RunFailed, with the first trace that differs, unless all processes have these groups.

    Tokens, ends and logprobs must be the same to the bit.
    """
    if distributed.process_count() == 1:
        return
    parts = {}
    for i, group in enumerate(groups):
        row = _row(i, group.example)
        parts[row] = _of_example(group.example)
        for k, trace in enumerate(group.traces):
            end = np.asarray([-1 if trace.end_token is None else trace.end_token], np.int64)
            parts[f"{row}, trace {k}"] = _digest(trace.tokens, trace.logprobs, end)
        for name in ("log_c_KA", "log_c_base_A"):
            if (scored := getattr(group, name)) is not None:
                parts[f"{row}, {name}"] = _digest(scored)
    distributed.check_same(when, parts, _REMEDY, RunFailed)


def _row(place: int, example: TokenizedExample) -> str:
    """The name of a row; an example may be taken twice in a step."""
    return f"prompt {place} (row {example.example.index})"


def _of_example(example: TokenizedExample) -> str:
    return _digest(example.prompt_tokens, example.after_start_tokens, example.answer_tokens)


def _digest(*arrays: np.ndarray) -> str:
    """Eight bytes in hexadecimal, enough to find an accident."""
    digest = hashlib.blake2b(digest_size=8)
    for array in arrays:
        digest.update(np.ascontiguousarray(array).tobytes())
        digest.update(b"|")
    return digest.hexdigest()
