"""Several samples per document: pass@k."""

import math
from collections.abc import Iterable, Sequence

KS = (1, 10)


def keep_all(responses: Iterable[Sequence[str]], docs: object) -> list[list[str]]:
    """The filter of lm-eval that hands every sample of a document to `process_results`."""
    return [list(samples) for samples in responses]


def pass_at(k: int, samples: int, right: int) -> float:
    """The probability that one of k samples is right, k drawn from all without replacement.

        pass@k = 1 - C(samples - right, k) / C(samples, k)

    2 right of 20 gives pass@10 = 0.76316.
    """
    assert 0 <= right <= samples >= k, (k, samples, right)
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def scores(samples: int, right: int) -> dict[str, float]:
    """The metrics of a document."""
    return {f"pass@{k}": pass_at(k, samples, right) for k in KS}
