"""Prefetched groups as text in a checkpoint, exact to the bit."""

import base64
import io
from collections.abc import Sequence

import numpy as np

from nrt_jax.types import Group, TokenizedExample, Trace

NO_TOKEN = -1


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
        "baselines": np.asarray([group.baseline for group in groups], np.float64),
    }
    if groups[0].rewards is not None:
        arrays["rewards"] = np.stack([np.asarray(group.rewards) for group in groups])
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
    return [
        Group(
            example=example,
            traces=tuple(next(traces) for _ in range(saved["traces"][p])),
            version=int(saved["versions"][p]),
            rewards=saved["rewards"][p] if "rewards" in saved else None,
            baseline=float(saved["baselines"][p]),
        )
        for p, example in enumerate(examples)
    ]


def read_arrays(text: str) -> dict[str, np.ndarray]:
    """The arrays of an encoded text; raises when one bit of it has changed."""
    with np.load(io.BytesIO(base64.b64decode(text, validate=True))) as saved:
        return dict(saved)
