"""Rows of benchmarks: averages by hand, the same bytes from any order, damage in one line."""

import json
import math

import pytest

from nrt_jax.errors import InputError
from nrt_jax.evaluation.results import (
    DocumentScore,
    SuiteResult,
    from_json,
    is_evaluation,
    read_results,
    read_scores,
    summarise,
    to_json,
    write_results,
)


def score(document: str, value: float, group: str = "", **more: int) -> DocumentScore:
    return DocumentScore(task="t", group=group, document=document, score=value, **more)


def row(scores: list[DocumentScore], average: str = "micro", **more):
    return summarise(task="t", title="T", metric="accuracy", average=average, scores=scores, **more)


GROUPED = [score("0", 1.0, "a"), score("1", 1.0, "a"), score("2", 0.0, "a"), score("3", 0.0, "b")]


def suite(*rows) -> SuiteResult:
    return SuiteResult(model="models/tiny", settings="abc", limit=None, tasks=tuple(rows))


def test_micro_weighs_documents_and_macro_weighs_groups():
    assert row(GROUPED).value == 0.5
    assert row(GROUPED, "macro").value == pytest.approx((2 / 3 + 0) / 2)
    assert {name: group.n for name, group in row(GROUPED).groups.items()} == {"a": 3, "b": 1}
    assert row([score("0", 1.0)]).groups == {}


def test_standard_errors_by_hand():
    # Deviations of 1, 1, 0, 0 from 1/2 are 1/2: sum of squares 1, over n (n - 1) = 12.
    assert row(GROUPED).stderr == pytest.approx(math.sqrt(1 / 12))
    assert row([score("0", 1.0)]).stderr is None
    assert row(GROUPED, "macro").stderr is None  # group b has one document
    even = [*GROUPED, score("4", 1.0, "b")]
    # Group a: sum of squares 2/3, over 6. Group b: 1/2, over 2.
    assert row(even, "macro").stderr == pytest.approx(math.sqrt(1 / 9 + 1 / 4) / 2)


def test_counts_are_over_all_answers():
    scores = [
        score("0", 0.5, answers=20, unclosed=3, truncated=1, trace_tokens=400, answer_tokens=60),
        score("1", 0.5, answers=20, trace_tokens=0, answer_tokens=20),
    ]
    result = row(scores)
    assert (result.n, result.answers, result.unclosed, result.truncated) == (2, 40, 3, 1)
    assert (result.mean_trace_tokens, result.mean_answer_tokens) == (10.0, 2.0)
    scored = row([score("0", 0.5, answers=0)])
    assert scored.mean_trace_tokens is scored.mean_answer_tokens is None


def test_overall_is_the_plain_mean_of_the_headlines():
    first, second = row([score("0", 1.0)]), row([score("0", 0.5), score("1", 0.5)])
    variant = row([score("0", 0.0)], headline=False)
    assert suite(first, second, variant).overall == 0.75
    assert suite(variant).overall is None


def test_any_order_gives_the_same_bytes(tmp_path):
    # In this order, 0.1 + 0.2 + 0.3 is not what 0.3 + 0.2 + 0.1 is.
    scores = [score("0", 0.1, "b"), score("1", 0.2, "a"), score("2", 0.3, "a")]
    for name, ordered in {"x": scores, "y": scores[::-1]}.items():
        write_results(tmp_path / name, suite(row(ordered, "macro")), ordered)
    for file in ("results.json", "scores.parquet"):
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [
        "results.json",
        "scores.parquet",
    ]


def test_what_is_read_is_what_was_written(tmp_path):
    result = suite(row(GROUPED), row([score("0", 1.0)]))
    assert not is_evaluation(tmp_path)
    write_results(tmp_path, result, GROUPED)
    assert is_evaluation(tmp_path)
    assert read_results(tmp_path) == result
    assert read_scores(tmp_path) == GROUPED
    assert from_json(to_json(result)) == result
    assert json.loads(to_json(result))["overall"] == 0.75


def test_damage_is_told_in_one_line(tmp_path):
    with pytest.raises(InputError, match=r"results.json: no such file; name a folder"):
        read_results(tmp_path)
    with pytest.raises(InputError, match=r"scores.parquet: no such file; copy the whole"):
        read_scores(tmp_path)
    write_results(tmp_path, suite(row(GROUPED)), GROUPED)
    text = (tmp_path / "results.json").read_text()
    for damaged, message in {
        text[: len(text) // 2]: "run the same nrt-jax evaluate again",
        text.replace('"format": 1', '"format": 2'): "holds no results in format 1",
        text.replace('"value": 0.5', '"value": "half"', 1): r"tasks.0.value: Input should be",
        "[]": "holds no results in format 1",
    }.items():
        (tmp_path / "results.json").write_text(damaged)
        with pytest.raises(InputError, match=message) as raised:
            read_results(tmp_path)
        assert "\n" not in str(raised.value)
    whole = (tmp_path / "scores.parquet").read_bytes()
    (tmp_path / "scores.parquet").write_bytes(whole[:-10])
    with pytest.raises(InputError, match=r"scores.parquet: .*again") as raised:
        read_scores(tmp_path)
    assert "\n" not in str(raised.value)
