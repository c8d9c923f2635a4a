"""`nrt-jax data stats`: its table, its page and its picture, and the padding that it tells."""

import json
import os
import re
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from nrt_jax.analysis.length_figures import OTHERS, edges, legend, panel_svgs, sides
from nrt_jax.analysis.padding import AT_LIMIT, NO_TRACES, SPREAD, padding
from nrt_jax.cli import main
from nrt_jax.config.load import load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.data.stats import SourceLengths
from nrt_jax.training.packing import Layout, Lengths
from tests.analysis.test_report import Page

SIZES = (
    "data.source=chain_addition",
    "data.tokenizer=nowhere",
    "model.path=nowhere",
    "data.max_prompt_tokens=64",
    "data.max_answer_tokens=16",
    "rollout.max_trace_tokens=32",
    "rollout.max_response_tokens=64",
    "rollout.traces_per_prompt=2",
    "train.batch_prompts=8",
    "train.mini_batch_prompts=4",
    "train.micro_batch_prompts=2",
)


SMALL = ("train.batch_prompts=8", "train.mini_batch_prompts=8", "train.micro_batch_prompts=8")


def config_of(*overrides: str) -> RunConfig:
    return load_config(RunConfig, [], [*SIZES, *overrides])


def test_padding_of_equal_rows_is_what_rounding_leaves():
    """40 tokens of 9 + 32 with the first target left out: a row has 8 times 5, and no padding."""
    config = config_of("method=sft")
    layout = Layout(2, largest=Lengths(0, (79,), 0))
    rows = padding(config, layout, [(9, 32)] * 64)
    assert [(row["traces"], row["packing"], row["configured"]) for row in rows] == [
        (NO_TRACES, True, True),
        (NO_TRACES, False, False),
    ]
    for row in rows:
        assert row["tokens"] == pytest.approx(4 * 40)
        assert row["padding"] == pytest.approx(0, abs=1e-9)
    # One token more than 40: the next row length is 48.
    (_, unpacked) = padding(config, layout, [(10, 32)] * 64)
    assert unpacked["padding"] == pytest.approx(1 - 41 / 48)


def test_traces_are_assumed_at_their_limit_and_spread_below_it():
    config = config_of("train.packing=false")
    layout = Layout(2, largest=Lengths(64, (48, 48), 17))
    rows = padding(config, layout, [(8, 4)] * 8)
    by_name = {(row["traces"], row["packing"]): row for row in rows}
    # A prompt, two completions of 32 + 1 + 4 tokens, and a baseline of 5, for each of 4 prompts.
    assert by_name[AT_LIMIT, False]["tokens"] == pytest.approx(4 * (8 + 2 * 37 + 5))
    assert by_name[AT_LIMIT, False]["configured"]
    assert by_name[AT_LIMIT, False]["micro_batches"] == 2
    assert by_name[SPREAD, False]["tokens"] < by_name[AT_LIMIT, False]["tokens"]
    assert by_name[SPREAD, True]["padding"] < by_name[SPREAD, False]["padding"]


def test_data_smaller_than_a_batch_are_one_batch():
    config = config_of("method=sft")
    layout = Layout(2, largest=Lengths(0, (79,), 0))
    rows = padding(config, layout, [(9, 32)] * 3)
    assert rows[0]["tokens"] == pytest.approx(3 * 40)


def test_a_bin_per_length_and_then_four_per_octave():
    assert edges(12).tolist() == [0.5, 1.5, 2.5, 3.5, 4.5, 5.5, 6.5, 7.5, 9.5, 10.5, 12.5]
    for longest in (1, 2, 7, 100, 4096):
        bounds = edges(longest)
        assert bounds[0] < 1
        assert bounds[-1] > longest
        counts = np.histogram(np.arange(1, longest + 1), bounds)[0]
        assert counts.sum() == longest


def many_sources(count: int) -> list[SourceLengths]:
    rng = np.random.default_rng(0)
    return [
        SourceLengths(
            f"source {i} <b>$x$",
            rng.integers(1, 100, i + 2).astype(np.int32),
            rng.integers(1, 9, i + 2).astype(np.int32),
            usable=i + 2,
            left_out={},
        )
        for i in range(count)
    ]


def test_the_largest_sources_have_colours_and_the_others_share_grey():
    sources = many_sources(9)
    entries = legend(sources)
    assert entries[-1] == ("3 others", OTHERS)
    assert [name for name, _ in entries[:-1]] == [s.name for s in sources[-6:]]
    assert len({place for _, place in entries}) == 7
    svgs = panel_svgs(sources, sides(100, 4000))
    assert len(svgs) == 4
    assert all("#f" not in svg for svg in svgs)
    assert "<b>" not in "".join(svgs)


@pytest.fixture
def stats(capsys, tmp_path):
    """Run the verb on a config of the quickstart; its status and what it printed."""

    def call(*words: object) -> tuple[int, str, str]:
        status = main(["data", "stats", "quickstart/nrt", *SMALL, *map(str, words)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call


def test_a_generator(stats, tmp_path: Path):
    out = tmp_path / "out"
    status, told, _ = stats("--rows", 300, "--out", out)
    assert status == 0
    assert told.startswith("chain_addition, the first 300 rows of each source\n")
    assert "all traces at their limit" in told
    assert sorted(os.listdir(out)) == ["data_stats.html", "data_stats.json", "data_stats.png"]
    summary = json.loads((out / "data_stats.json").read_text())
    assert summary["all"]["trained"] == 300
    assert matplotlib.image.imread(out / "data_stats.png").std() > 0.05
    html = (out / "data_stats.html").read_text()
    page = Page(html)
    assert page.tags.count("svg") == 2
    assert not {"script", "link", "iframe", "img"} & set(page.tags)
    assert "300 of 300 read" in " ".join(page.text.split())


def test_sources_and_reasons(stats, tmp_path: Path):
    parts = []
    for number, name in enumerate(("one", "two")):
        rows = [{"question": f"{i}+{number}", "answer": "=1"} for i in range(9)]
        text = "".join(json.dumps(row) + "\n" for row in [*rows, {"question": "3"}])
        (tmp_path / f"{name}.jsonl").write_text(text)
        parts.append(f"{{name: {name}, path: {tmp_path}/{name}.jsonl}}")
    words = [f"data.mixture=[{', '.join(parts)}]", "data.source=null", "data.max_bad_share=0.5"]
    status, told, _ = stats(*words, "data.eval_rows=0", "--out", tmp_path / "out")
    assert status == 0
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "source read usable kept trained on tokens" in lines
    assert "all sources 20 18 90.0 % 18 " in "\n".join(line + " " for line in lines)
    assert "without 'answer' 2 one 1, two 1" in lines
    page = Page((tmp_path / "out" / "data_stats.html").read_text())
    assert "without 'answer'" in page.text
    assert page.tags.count("svg") == 4


def test_rows_of_tulu3_stand_beside_table_4(stats, tmp_path: Path):
    flan, own = "ai2-adapt-dev/flan_v2_converted", "mine"
    rows = [{"question": f"{i}", "answer": "=1", "of": own if i % 3 else flan} for i in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [f"data.path={tmp_path}/rows.jsonl", "data.source=jsonl", "data.source_field=of"]
    status, told, _ = stats(*words, "data.eval_rows=0", "--out", tmp_path / "out")
    assert status == 0
    lines = [" ".join(line.split()) for line in told.splitlines()]
    at = lines.index("source rows share Table 4 share licence")
    assert lines[at + 1] == "mine 6 66.67% - - unstated"
    assert re.fullmatch(rf"{flan} 3 33.33% [\d,]+ [\d.]+% unstated", lines[at + 2])
    assert "Table 4" in (tmp_path / "out" / "data_stats.html").read_text()


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--rows", "0"], "0 is no number of rows; give 1 or more"),
        (["--rows", "5", "--out", "FILE/out"], "--out FILE/out: Not a directory; choose a"),
        (["data.source=jsonl", "data.path=FILE.jsonl"], "FILE.jsonl"),
        (
            ["data.source=jsonl", "data.path=FILE", "--rows", "2"],
            "none of the first 2 rows can be used (2 without 'answer'); mend the rows",
        ),
    ],
)
def test_mistakes_are_one_line(words, error, stats, tmp_path, capsys):
    (tmp_path / "file").write_text(2 * '{"question": "1+1"}\n')
    words = [word.replace("FILE", str(tmp_path / "file")) for word in words]
    try:
        status, _, told = stats(*words)
    except SystemExit as ended:
        status, told = ended.code, capsys.readouterr().err
    lines = [line for line in told.splitlines() if "INFO" not in line]
    assert status == 2
    assert len(lines) == 1
    assert lines[0].startswith("nrt-jax: error: ")
    assert error.replace("FILE", str(tmp_path / "file")) in lines[0]
