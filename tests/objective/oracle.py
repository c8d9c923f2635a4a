"""The formulas of the method once more, in plain Python floats and loops, to compare with.

Rows are lists of kept tokens only: masks are resolved by `kept`, before any formula.
"""

import math


def kept(row, mask):
    return [float(x) for x, keep in zip(row, mask, strict=True) if keep]


def weights(scheme, log_c_base, normalisation, cap):
    raw = []
    for log_c in log_c_base:
        w = {"ws_inv_p": 1 / math.exp(log_c), "ws_neg_log_p": -log_c}[scheme]
        raw.append(w if cap is None else min(w, cap))
    if normalisation == "sum":
        return raw
    total = len(raw) if normalisation == "mean" else sum(raw)
    return [w / total if total else 0.0 for w in raw]


def spread(rows):
    """The standard deviation of each token over the rows, one row per trace of a prompt."""
    sigma = []
    for token in zip(*rows, strict=True):
        mean = sum(token) / len(token)
        sigma.append(math.sqrt(sum((value - mean) ** 2 for value in token) / len(token)))
    return sigma


def aggregate(scheme, log_c, log_c_base, normalisation="sum", cap=None, sigma=None):
    """(R, [S_1, ..., S_T]) of one row; `sigma` is the spread of its tokens over the traces."""
    T = len(log_c)
    if T == 0:
        return 0.0, []
    c = [math.exp(value) for value in log_c]
    if scheme == "logp":
        return sum(log_c), [1.0] * T
    if scheme == "p":
        return math.prod(c), [math.prod(c)] * T
    if scheme == "gm":
        mean = math.exp(sum(log_c) / T)
        return mean, [mean / T] * T
    if scheme == "am":
        return sum(c) / T, [value / T for value in c]
    if scheme == "r3":
        assert sigma is not None
        w = [value / sum(sigma) if sum(sigma) else 0.0 for value in sigma]
        return sum(weight * value for weight, value in zip(w, log_c, strict=True)), w
    w = weights(scheme, log_c_base, normalisation, cap)
    signal = [weight * value for weight, value in zip(w, c, strict=True)]
    return sum(signal), signal


def advantages(rewards, baseline, estimator):
    """[A_1, ..., A_K] of one group; a group counts as equal only where it is exactly equal."""
    K = len(rewards)
    above = [max(0.0, r - baseline) for r in rewards]
    if estimator == "grpo":
        return standardised(above)
    if estimator == "grpo_unclipped":
        return standardised(rewards)
    if estimator == "rloo":
        return [r - (sum(rewards) - r) / (K - 1) if K > 1 else 0.0 for r in rewards]
    if estimator == "clip01":
        return [min(1.0, a) for a in above]
    if estimator == "dr_grpo":
        return [a - sum(above) / K for a in above]
    raise KeyError(estimator)


def standardised(values):
    K, mean = len(values), sum(values) / len(values)
    if len(set(values)) == 1:
        return [0.0] * K
    std = math.sqrt(sum((value - mean) ** 2 for value in values) / K)
    return [(value - mean) / std for value in values]


def ppo_clip(logprob, old_logprob, advantage, low, high):
    ratio = math.exp(logprob - old_logprob)
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def cispo(logprob, old_logprob, advantage, low, high):
    ratio = math.exp(logprob - old_logprob)
    if (advantage > 0 and ratio > 1 + high) or (advantage < 0 and ratio < 1 - low):
        return 0.0
    return -min(max(ratio, 1 - low), 1 + high) * advantage * logprob
