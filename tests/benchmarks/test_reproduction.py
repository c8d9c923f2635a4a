"""The claims of the paper from made records: figures by hand, intervals, verdicts, the page."""

import json

import numpy as np
import pytest

from benchmarks import reproduction
from nrt_jax.evaluation.reference_log import ReferenceRow, write_references
from nrt_jax.experiments.sweep import CELLS_FILE

TRACES = {"nrt_ws_neg_log_p": "rain 3 4 8 0", "rlpr": "rain 3 4 8 1"}
"""What the methods write for the question: 3 + 1, + 4, + 2, modulo 10, and one wrong total."""


def references(logprobs, entropies, trace) -> list[ReferenceRow]:
    """One question, the same in every run."""
    arrays = {name: np.array(logprobs, np.float32) for name in ("logprobs", "direct_logprobs")}
    return [
        ReferenceRow(
            row=0,
            source="",
            question="rain 3 1 4 2",
            reference="r",
            trace=trace,
            trace_end=None,
            answer="r",
            correct=True,
            tokens=list(range(len(logprobs))),
            texts=["t"] * len(logprobs),
            entropies=np.array(entropies, np.float32),
            **arrays,
        )
    ]


@pytest.fixture
def folder(tmp_path):
    """A sweep of SFT, AM and WS with two seeds, and a run of GM that is not finished."""
    cells = {}

    def add(method: str, seed: int, match: float, lengths: list[float], logprobs: list[float]):
        name = f"{method}-{seed}"
        cells[name] = {"method": method, "objective.token_signal": "derived", "seed": str(seed)}
        rows = [
            {"step": step + 1, "loss/total": 1.0, "trace/tokens": length}
            for step, length in enumerate(lengths)
        ]
        rows.insert(0, {"step": 0, "eval/exact_match": 0.0})
        if method != "nrt_gm":
            last = {"step": len(lengths), "eval/exact_match": match}
            rows.append(last | {"eval/trace_gain": match, "eval/shuffled_gain": 0.1})
        (tmp_path / name).mkdir()
        config = {
            "method": "sft" if method == "sft" else "nrt",
            "model": {"path": "/base"},
            "data": {"source": "hard_tokens"},
            "train": {"steps": len(lengths)},
        }
        (tmp_path / name / "config.yaml").write_text(json.dumps(config))
        (tmp_path / name / "versions.json").write_text("{}")
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / "metrics.jsonl").write_text(lines)
        rows = references(logprobs, [0.1] * 19 + [2.0], TRACES.get(method))
        write_references(tmp_path / name / "references", len(lengths), rows)
        untrained = references(logprobs, [0.1] * 20, None)
        write_references(tmp_path / name / "references", 0, untrained)

    easy = [-0.5] * 19
    for seed in (0, 1):
        add("sft", seed, 0.2, [8, 8], [*easy, np.log(0.1)])
        add("rlpr", seed, 0.5 + 0.1 * seed, [8, 2], [*easy, np.log(0.2)])
        add("nrt_ws_neg_log_p", seed, 0.9, [8, 12], [*easy, np.log(0.5)])
    add("nrt_gm", 0, 0.0, [8, 8], [*easy, -1.0])
    (tmp_path / CELLS_FILE).write_text(json.dumps(cells))
    return tmp_path


def test_figures_and_verdicts_of_claims(folder):
    runs = reproduction.read_cells_of(folder)
    found = {claim.text: claim.differences for claim in reproduction.claims(runs, {}, "derived")}
    assert found["exact match: AM less SFT"] == pytest.approx([0.3, 0.4])
    assert found["exact match: GM less AM"] == []
    kept = "share of the length of traces that is kept: WS(−log p) less AM"
    assert found[kept] == pytest.approx([1.25, 1.25])
    # The one token in twenty of the highest entropy: 0.5 / 0.1 less 0.2 / 0.1.
    lift = "P / P_SFT of the hardest tokens: WS(−log p) less AM"
    assert found[lift] == pytest.approx([3, 3], rel=1e-5)
    assert reproduction.verdict(found[lift]) == "holds"
    unclipped = {("rewards_not_clipped", "derived"): runs["rlpr", "derived"]}
    last = reproduction.claims(runs, unclipped, "derived")[-1]
    assert last.differences == pytest.approx([0.4, 0.3])
    control = "log P of the answer, nats per token: own trace less another question's, WS(−log p)"
    assert found[control] == pytest.approx([0.8, 0.8])


def test_traces_are_right_where_every_total_is(folder):
    runs = reproduction.read_cells_of(folder)
    shares = {
        method: [reproduction.worked_share(run) for run in by_seed.values()]
        for (method, _), by_seed in runs.items()
    }
    assert np.isnan(shares.pop("sft")).all()
    assert shares == {"rlpr": [0, 0], "nrt_ws_neg_log_p": [1, 1]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], "not measured"),
        ([0.3], "undecided, one seed"),
        ([0.3, 0.4], "undecided"),
        ([0.3, 0.31, 0.32], "holds"),
        ([-0.3, -0.31, -0.32], "does not hold"),
        ([0.0, 0.0, 0.0], "does not hold"),
    ],
)
def test_verdicts(values, expected):
    assert reproduction.verdict(values) == expected


def test_the_interval_is_that_of_students_t():
    """Two values: 12.706 times half their distance."""
    found = reproduction.interval([0.3, 0.4])
    assert found == pytest.approx((0.35, 12.706 * 0.05), rel=1e-3)


def test_the_page_keeps_all_but_the_figures(folder):
    tables = reproduction.methods_table(reproduction.read_cells_of(folder))
    assert len(tables) == 2 + 4
    assert tables[2].startswith("| before training | – | 2 | 0.000 ± 0.000 | – |")
    assert tables[-1].startswith("| nrt_ws_neg_log_p | `derived` | 2 | 0.900 ± 0.000 | 1.000 ±")
    page = f"above\n{reproduction.BEGIN}old\n{reproduction.END}below\n"
    text = reproduction.with_figures(page, tables)
    assert text.startswith("above\n")
    assert text.endswith("below\n")
    assert "old" not in text
    assert tables[-1] in text
