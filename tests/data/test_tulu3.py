"""The paper's 204,800 rows of tulu-3: split, counts by source and licences, on a miniature."""

import json
import logging
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.config.load import Section, load_config
from nrt_jax.config.presets import presets
from nrt_jax.config.tulu3 import ROWS, SOURCES
from nrt_jax.data import row_choice, training_rows
from nrt_jax.data.merge import merge
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.data.prepare import prepare
from nrt_jax.data.row_choice import choose_rows, row_order
from nrt_jax.data.row_tokens import RowTokenizer
from nrt_jax.data.source_counts import licences, source_table
from nrt_jax.data.training_rows import sources_of
from nrt_jax.errors import InputError

PRESET, TABLE4 = presets()["data/tulu3_200k"], presets()["data/tulu3_200k_table4"]
WILDCHAT = "ai2-adapt-dev/tulu_v3.9_wildchat_100k"
NO_ROBOTS = "ai2-adapt-dev/no_robots_converted"
GRADE_SCHOOL = "allenai/tulu-3-sft-personas-math-grade"
FLAN = "ai2-adapt-dev/flan_v2_converted"
MINI = {name: max(2, source.rows // 4000) for name, source in SOURCES.items()}
"""Rows of each source in the miniature."""
TOTAL = sum(MINI.values())
TOO_LONG = 60
"""Tokens of the answers of some rows of WildChat."""


class Run(Section):
    data: DataConfig


def mini_rows() -> list[dict]:
    """Rows of all sources, source after source; each eighth of WildChat is too long."""
    rows = []
    for source, count in MINI.items():
        for i in range(count):
            answer = "1" * TOO_LONG if source == WILDCHAT and i % 8 == 0 else str(i % 10)
            turns = [
                {"role": "user", "content": f"{len(rows)}+0"},
                {"role": "assistant", "content": answer},
            ]
            rows.append({"id": f"row{len(rows)}", "messages": turns, "source": source})
    return rows


@pytest.fixture(scope="module")
def mini(tmp_path_factory) -> Path:
    """A folder of two Parquet shards with the schema and the names of tulu-3."""
    folder, rows = tmp_path_factory.mktemp("mini"), mini_rows()
    half = len(rows) // 2
    for i, part in enumerate((rows[:half], rows[half:])):
        table = pyarrow.Table.from_pylist(part)
        pyarrow.parquet.write_table(table, folder / f"train-{i:05d}-of-00002.parquet")
    return folder


@pytest.fixture
def config(mini, quickstart_directory):
    """The preset's config of the miniature."""

    def make(*overrides: str, preset: Path = PRESET) -> DataConfig:
        own = [
            f"data.path={mini}",
            f"data.tokenizer={quickstart_directory}",
            f"data.total_rows={TOTAL}",
            "data.eval_rows=10",
            "data.train_rows=60",
            "data.max_answer_tokens=50",
            "data.max_bad_share=0.2",
        ]
        return load_config(Run, [preset], [*own, *overrides]).data

    return make


@pytest.fixture
def message(config, tokenizer):
    def of(*overrides: str) -> str:
        with pytest.raises(InputError) as caught:
            load_dataset(config(*overrides), tokenizer)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    return of


def indices(examples) -> list[int]:
    return [example.example.index for example in examples]


def counts_of(examples) -> Counter:
    return Counter(example.example.source for example in examples)


# --- the split -----------------------------------------------------------------------------------


def test_the_split_of_the_release():
    """The rows that train_test_split of `datasets` gives for seed 42 on all 939,343 rows."""
    config = load_config(Run, [PRESET], ["data.path=x.parquet"]).data
    order = row_order(config, ROWS)
    assert order[:3].tolist() == [741378, 724234, 107024]
    assert order[config.eval_rows :][:3].tolist() == [622855, 14238, 926745]


def test_the_order_of_the_miniature(config, tokenizer):
    order = np.random.default_rng(42).permutation(TOTAL).tolist()
    rows = mini_rows()

    def is_usable(i: int) -> bool:
        return len(rows[i]["messages"][1]["content"]) < TOO_LONG

    dataset = load_dataset(config(), tokenizer)
    assert indices(dataset.eval) == [i for i in order[:10] if is_usable(i)]
    assert indices(dataset.train) == [i for i in order[10:] if is_usable(i)][:60]
    first = dataset.train[0].example
    assert (first.answer, first.source) == (
        rows[first.index]["messages"][1]["content"],
        rows[first.index]["source"],
    )
    assert dataset.bad_rows["answer too long"] > 0
    everything = load_dataset(config("data.train_rows=null"), tokenizer)
    assert indices(everything.train) == [i for i in order[10:] if is_usable(i)]


def test_rows_are_chosen_before_they_are_tokenised(config, tokenizer, monkeypatch):
    seen = []
    of_rows = RowTokenizer.of_rows

    def counted(self, rows):
        seen.extend(rows)
        return of_rows(self, rows)

    monkeypatch.setattr(RowTokenizer, "of_rows", counted)
    load_dataset(config(), tokenizer)
    # 60 rows, of which one in five may be unusable, and 10 of the evaluation.
    assert len(seen) == 75 + 10


def test_a_split_beside_evaluation_files(config, tokenizer, write_rows):
    turns = [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "2"}]
    path = write_rows([{"messages": turns, "source": "own"}])
    given = config(f"data.eval_path={path}", "data.train_rows=20", "data.source=null")
    dataset = load_dataset(given, tokenizer)
    order = np.random.default_rng(42).permutation(TOTAL)
    assert (dataset.eval[0].example.source, len(dataset.train)) == ("own", 20)
    assert set(indices(dataset.train)) <= set(order[:25].tolist())


def test_another_number_of_rows_is_another_split(message):
    text = message("data.total_rows=939343")
    assert f"has {TOTAL} rows and not data.total_rows=939343" in text


def test_too_few_usable_rows(message):
    text = message(f"data.train_rows={TOTAL - 10}")
    assert f"rows are missing to data.train_rows={TOTAL - 10} after those that cannot be" in text
    assert "raise data.max_bad_share=0.2" in text


# --- counts by source ----------------------------------------------------------------------------


def test_counts_by_source_are_exact(config, tokenizer):
    wanted = {WILDCHAT: 12, GRADE_SCHOOL: 5, FLAN: 0}
    given = config("data.train_rows=null", f"data.source_rows={wanted}")
    dataset = load_dataset(given, tokenizer)
    assert counts_of(dataset.train) == {WILDCHAT: 12, GRADE_SCHOOL: 5}
    everything = load_dataset(config("data.train_rows=null"), tokenizer)
    of_wildchat = [e for e in everything.train if e.example.source == WILDCHAT]
    mine = [e for e in dataset.train if e.example.source == WILDCHAT]
    assert indices(mine) == indices(of_wildchat)[:12]


def test_the_counts_of_table_4(config):
    given = config("data.train_rows=null", preset=TABLE4)
    assert given.rows_by_source == {name: source.table4 for name, source in SOURCES.items()}
    assert given.rows_in_all == sum(source.table4 for source in SOURCES.values()) == 204_800
    assert sum(source.rows for source in SOURCES.values()) == ROWS
    assert load_config(Run, [TABLE4], ["data.path=x"]).data.train_rows == 204_800


@pytest.mark.parametrize(
    ("counts", "said"),
    [
        (f"{{{GRADE_SCHOOL}: 13}}", "training rows, fewer than data.source_rows=13; lower it"),
        (f"{{{NO_ROBOTS}x: 1}}", f"which no row has; did you mean '{NO_ROBOTS}'?"),
        (f"{{{WILDCHAT}: 22}}", f"are missing to data.source_rows of {WILDCHAT} after"),
        ("tulu3_table4", "training rows, fewer than data.source_rows=33036; lower it"),
    ],
)
def test_counts_that_cannot_be_had(counts, said, message):
    assert said in message("data.train_rows=null", f"data.source_rows={counts}")


def test_the_table_beside_that_of_the_paper(config, tokenizer, caplog):
    counts = {WILDCHAT: 30, FLAN: 10, "own": 0}
    header, first, second, third = source_table(config(), counts)
    assert header.split() == ["source", "rows", "share", "Table", "4", "share", "licence"]
    assert first.split() == [WILDCHAT, "30", "75.00%", "19,378", "9.46%", "ODC-BY-1.0"]
    assert second.split() == [FLAN, "10", "25.00%", "20,010", "9.77%", "unstated"]
    assert third.split() == ["own", "0", "0.00%", "-", "-", "unstated"]
    with caplog.at_level(logging.INFO):
        load_dataset(config(), tokenizer)
    assert sum("9.46%" in line for line in caplog.messages) == 1


# --- licences ------------------------------------------------------------------------------------


def test_licences_by_source(config):
    found = licences(config())
    assert (found[NO_ROBOTS], found[FLAN]) == ("CC-BY-NC-4.0", None)
    assert found["ai2-adapt-dev/tulu_v3.9_open_math_2_gsm8k_50k"] is None
    assert config("data.licence=MIT").licence_of("own") == "MIT"


def test_sources_are_left_out_by_their_licence(config, tokenizer):
    given = ("data.train_rows=null", "data.eval_rows=50")
    before = load_dataset(config(*given), tokenizer)
    excluded = load_dataset(
        config(*given, "data.exclude_licences=[CC-BY-NC-4.0, unstated]"), tokenizer
    )

    def allowed(examples) -> list[int]:
        return [
            example.example.index
            for example in examples
            if SOURCES[example.example.source].licence not in (None, "CC-BY-NC-4.0")
        ]

    assert indices(excluded.train) == allowed(before.train) != indices(before.train)
    assert indices(excluded.eval) == allowed(before.eval) != indices(before.eval)
    in_order = config(*given[:1], "data.permutation_seed=null", "data.total_rows=null")
    kept = in_order.model_copy(update={"exclude_licences": ("ODC-BY-1.0", "Apache-2.0")})
    left = counts_of(load_dataset(kept, tokenizer).train)
    assert set(left) == {
        name for name, s in SOURCES.items() if s.licence not in ("ODC-BY-1.0", "Apache-2.0")
    }


def test_table_4_without_a_licence(config):
    given = config("data.exclude_licences=[CC-BY-NC-4.0]", "data.train_rows=null", preset=TABLE4)
    assert given.rows_in_all == 204_800 - SOURCES[NO_ROBOTS].table4


def test_an_unknown_licence(message, config):
    text = message("data.exclude_licences=[CC-BY-NC]")
    assert "data.exclude_licences" in text
    assert "CC-BY-NC: no source has this licence; did you mean 'CC-BY-NC-4.0'?" in text


def test_parts_of_a_mixture_are_left_out_by_their_licence(tmp_path):
    parts = "[{name: a, path: a.jsonl, licence: MIT}, {name: b, path: b.jsonl}]"
    one = load_config(Run, [], [f"data.mixture={parts}", "data.exclude_licences=[MIT]"]).data
    assert (one.source_names, licences(one)) == (("b",), {"b": None})
    with pytest.raises(InputError, match="exclude_licences leaves no source of mixture"):
        load_config(Run, [], [f"data.mixture={parts}", "data.exclude_licences=[MIT, unstated]"])


def test_prepared_rows_and_their_licences(config, tokenizer, tmp_path):
    given = config()
    merge(prepare(given, tokenizer, tmp_path / "out", workers=1, share=(0, 1)), 1)
    found = load_dataset(given.model_copy(update={"path": tmp_path / "out"}), tokenizer)
    expected = load_dataset(given, tokenizer)
    assert indices(found.train) == indices(expected.train)
    assert indices(found.eval) == indices(expected.eval)
    by_source = json.loads((tmp_path / "out" / "manifest.json").read_text())["examples_by_source"]
    assert {name: of["train"]["rows"] for name, of in by_source.items() if "train" in of} == dict(
        counts_of(expected.train)
    )
    assert by_source[WILDCHAT]["licence"] == "ODC-BY-1.0"
    assert by_source[FLAN]["licence"] is None


# --- what does not fit ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.train_rows=5"], "train_rows counts rows in a permuted order; set permutation_seed"),
        (["data.permutation_seed=1", "data.source_rows={a: 1}"], "set source_field"),
        (["data.eval_split=test"], "eval_split=test is a split of eval_path; set eval_path"),
        (["data.exclude_licences=[unstated]"], "set source_field or a mixture"),
        (
            [
                "data.permutation_seed=1",
                "data.source_field=s",
                "data.source_rows={a: 1}",
                "data.train_rows=2",
            ],
            "train_rows=2 and source_rows, which has 1 rows in all, differ",
        ),
    ],
)
def test_settings_that_do_not_fit(overrides, said):
    with pytest.raises(InputError) as caught:
        load_config(Run, [], ["data.path=x.jsonl", *overrides])
    assert said in str(caught.value)


def test_generated_rows_are_not_permuted():
    with pytest.raises(InputError, match="and source 'chain_addition' generates its own"):
        load_config(Run, [], ["data.source=chain_addition", "data.permutation_seed=1"])


def test_a_row_without_a_source_is_bad(make_config, write_rows, tokenizer):
    rows = [{"question": f"{i}+1", "answer": "1", "kind": {"name": "a"}} for i in range(20)]
    del rows[3]["kind"]
    given = make_config(
        path=write_rows(rows), source_field="kind.name", eval_rows=2, max_bad_share=0.1
    )
    dataset = load_dataset(given, tokenizer)
    assert dataset.bad_rows == {"without 'kind.name'": 1}
    assert {e.example.source for e in dataset.train} == {"a"}
    (source,) = sources_of(given)
    assert choose_rows(source) is None


@pytest.mark.parametrize("overrides", [(), ("data.exclude_licences=[CC-BY-NC-4.0]",)])
def test_rows_are_chosen_once(overrides, config, tokenizer, tmp_path, monkeypatch):
    """To choose them may take a pass over all rows, before the one that reads them."""
    given, read = config(*overrides), []
    for module in (row_choice, training_rows):
        read_all = module.read_all
        monkeypatch.setattr(
            module, "read_all", lambda *a, read_all=read_all: read.append(1) or read_all(*a)
        )
    monkeypatch.setattr(row_choice, "count_rows", lambda *_: read.append(1) or TOTAL)
    load_dataset(given, tokenizer)
    assert len(read) == 2
    merge(prepare(given, tokenizer, tmp_path / "out", workers=1, share=(0, 1)), 1)
    assert len(read) == 4
