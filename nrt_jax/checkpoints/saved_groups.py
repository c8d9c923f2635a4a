"""Prefetched groups as text in a checkpoint, exact to the bit."""

import base64
import io
from collections.abc import Sequence

import numpy as np

from nrt_jax.types import Group, TokenizedExample, Trace

NO_TOKEN = -1
SCORED = ("log_c_KA", "log_c_base_A")


def pack_groups(groups: Sequence[Group]) -> str:
    """Encode everything but the examples, which the saved data position gives back."""
    traces = [trace for group in groups for trace in group.traces]
    arrays = {
        "traces": np.asarray([len(group.traces) for group in groups]),
        "lengths": np.asarray([len(trace.tokens) for trace in traces]),
        "tokens": np.concatenate([trace.tokens for trace in traces]),
        "logprobs": np.concatenate([trace.logprobs for trace in traces]),
        "end_tokens": np.asarray(
            [NO_TOKEN if trace.end_token is None else trace.end_token for trace in traces]
        ),
        "end_logprobs": np.asarray([trace.end_logprob for trace in traces], np.float64),
        "versions": np.asarray([group.version for group in groups]),
    }
    for name in SCORED:
        if getattr(groups[0], name) is not None:
            arrays[name] = np.concatenate([np.ravel(getattr(group, name)) for group in groups])
    file = io.BytesIO()
    np.savez_compressed(file, **arrays)
    return base64.b64encode(file.getvalue()).decode("ascii")


def unpack_groups(text: str, examples: Sequence[TokenizedExample]) -> list[Group]:
    """Decode `pack_groups`, given the examples in the same order."""
    saved = read_arrays(text)
    starts = np.cumsum(saved["lengths"])[:-1]
    rows = zip(
        np.split(saved["tokens"], starts),
        np.split(saved["logprobs"], starts),
        saved["end_tokens"].tolist(),
        saved["end_logprobs"].tolist(),
        strict=True,
    )
    traces = iter(
        Trace(tokens, logprobs, None if end == NO_TOKEN else end, end_logprob)
        for tokens, logprobs, end, end_logprob in rows
    )
    answers = np.asarray([len(example.answer_tokens) for example in examples])
    log_c = _split(saved, "log_c_KA", saved["traces"] * answers)
    log_c_base = _split(saved, "log_c_base_A", answers)
    groups = []
    for p, example in enumerate(examples):
        K, log_c_KA = int(saved["traces"][p]), log_c[p]
        groups.append(
            Group(
                example=example,
                traces=tuple(next(traces) for _ in range(K)),
                version=int(saved["versions"][p]),
                log_c_KA=None if log_c_KA is None else log_c_KA.reshape(K, -1),
                log_c_base_A=log_c_base[p],
            )
        )
    return groups


def _split(
    saved: dict[str, np.ndarray], name: str, sizes: np.ndarray
) -> Sequence[np.ndarray | None]:
    """The values of each group, of which there are `sizes`; None for each where none are saved."""
    if name not in saved:
        return [None] * len(sizes)
    return np.split(saved[name], np.cumsum(sizes)[:-1])


def read_arrays(text: str) -> dict[str, np.ndarray]:
    """The arrays of an encoded text; raises when one bit of it has changed."""
    with np.load(io.BytesIO(base64.b64decode(text, validate=True))) as saved:
        return dict(saved)
