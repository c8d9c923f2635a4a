"""Filters of rows in prepared data: those of `load_dataset`, whichever process meets which row."""

import json
import logging
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data import merge, plan, prepare
from nrt_jax.data.bad_rows import BadRow, LeftOut
from nrt_jax.data.pipeline import load_dataset
from nrt_jax.errors import InputError
from tests.data.test_prepare import additions, from_prepared, tree, values


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(plan, "ROWS_PER_PART", 16)
    monkeypatch.setattr(prepare, "ROWS_PER_PART", 16)


@pytest.fixture
def make(tokenizer, tmp_path):
    def prepared(config: DataConfig, out: str = "out", shares=((0, 1),)) -> Path:
        for share in shares:
            begun = prepare.prepare(config, tokenizer, tmp_path / out, workers=1, share=share)
        merge.merge(begun, 1)
        return tmp_path / out

    return prepared


@pytest.fixture
def configs(make_config, write_rows):
    """Duplicates in one part, in others and in other sources; questions of benchmarks; listed rows,
    of which one is unusable; and rows that cannot be used, in between."""
    own = additions(60)
    rows = write_rows([*own[:9], own[2], *own[9:], own[7], b"[", own[3], own[2], *own[30:40]])
    more = write_rows([own[4], *additions(40, first=300), own[4], own[50]], "more.jsonl")
    benchmark = write_rows([{"question": own[i]["question"]} for i in (1, 20, 50)], "bench.jsonl")
    listed = [
        {"file": str(rows), "row": "line 3", "reason": "near-duplicate"},
        {"file": str(rows), "row": "line 6"},  # {broken
        {"file": str(more), "row": "line 9"},
    ]
    held = write_rows([*own[6:12], own[3], own[3]], "held.jsonl")
    common = {
        "eval_rows": 7,
        "max_bad_share": 0.06,
        "contamination": [benchmark],
        "leave_out": write_rows(listed, "list.jsonl"),
    }
    files = {"source": None, "path": (rows, more), **common}
    parts = [{"name": "a", "path": rows, "rows": 40}, {"name": "b", "path": more}]
    return {
        "held out": make_config(**files),
        "evaluation file": make_config(**files, eval_path=held),
        "kept": make_config(**files, duplicates="keep"),
        "permuted": make_config(**files, permutation_seed=4),
        "permuted, a part": make_config(
            **files | {"max_bad_share": 0.4}, permutation_seed=4, train_rows=40
        ),
        "mixture": make_config(source=None, mixture=parts, eval_path=held, **common),
    }


def reasons(config: DataConfig) -> set[str]:
    found = {"question of a benchmark"}
    if config.train_rows is None:
        found |= {"near-duplicate", "named by data.leave_out"}
    return found | ({"duplicate"} if config.duplicates == "drop" else set())


@pytest.mark.parametrize(
    "kind", ["held out", "evaluation file", "kept", "permuted", "permuted, a part", "mixture"]
)
def test_the_rows_are_those_of_the_files(kind, configs, make, tokenizer, caplog):
    config = configs[kind]
    expected = load_dataset(config, tokenizer)
    assert set(expected.bad_rows) >= reasons(config)
    with caplog.at_level(logging.INFO):
        out = make(config)
    assert any("duplicates are kept" in line for line in caplog.messages) == (kind == "kept")
    assert values(load_dataset(from_prepared(config, out), tokenizer)) == values(expected)
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == list(expected.rejected)
    sources = json.loads((out / "manifest.json").read_text())["sources"]
    assert all(s["rows"] == s["usable"] + sum(s["rejected"].values()) for s in sources)
    assert tree(make(config, "two", [(1, 2), (0, 2)])) == tree(out)


def test_workers_filter_alike(configs, make, tokenizer, tmp_path):
    config = configs["mixture"]
    # Apart from jax, whose threads would make the workers start anew.
    script = """if True:
        import pickle, sys
        from nrt_jax.data import merge, plan, prepare
        plan.ROWS_PER_PART = prepare.ROWS_PER_PART = 16
        config, tokenizer, out = pickle.load(sys.stdin.buffer)
        merge.merge(prepare.prepare(config, tokenizer, out, workers=2, share=(0, 1)), 2)
    """
    given = pickle.dumps((config, tokenizer, tmp_path / "workers"))
    subprocess.run([sys.executable, "-c", script], input=given, check=True)
    assert tree(tmp_path / "workers") == tree(make(config))


def test_a_reason_stays_what_it_is_between_processes():
    for kind in (BadRow, LeftOut):
        found = pickle.loads(pickle.dumps(kind("reason", "detail")))
        assert (type(found), found.reason, found.detail) == (kind, "reason", "detail")


def test_a_source_of_duplicates_alone(configs, make, tokenizer, write_rows):
    twice = [{"name": name, "path": write_rows(additions(20)[6:-1], name)} for name in ("a", "b")]
    given = {"mixture": (), "path": None, "leave_out": None, "contamination": ()}
    config = configs["mixture"].model_copy(update=given)
    mixture = DataConfig(mixture=[{**part, "source": "jsonl"} for part in twice]).mixture
    config = config.model_copy(update={"mixture": mixture})
    with pytest.raises(InputError) as expected:
        load_dataset(config, tokenizer)
    with pytest.raises(InputError) as found:
        make(config)
    assert str(found.value) == str(expected.value)
    assert "15 of 15 rows are left out (15 duplicate), none is left; first line 1" in str(
        found.value
    )


def test_a_listed_row_that_no_part_has(configs, make, tokenizer, write_rows):
    config = configs["held out"]
    path = write_rows([{"file": "other.jsonl", "row": "line 1"}], "list.jsonl")
    config = config.model_copy(update={"leave_out": path})
    with pytest.raises(InputError) as expected:
        load_dataset(config, tokenizer)
    with pytest.raises(InputError) as found:
        make(config, shares=[(0, 2), (1, 2)])
    assert str(found.value) == str(expected.value)
    assert "names other.jsonl line 1, which is not among the training rows" in str(found.value)


@pytest.mark.parametrize(
    ("file", "setting"),
    [("bench.jsonl", r"data\.contamination\[0\]"), ("list.jsonl", r"data\.leave_out")],
)
def test_another_filter_file_is_noticed(file, setting, configs, make, tmp_path):
    make(configs["held out"])
    with (tmp_path / file).open("a") as content:
        content.write(" \n")
    with pytest.raises(InputError, match=rf"filters\.{setting} was \w+ and is \w+; undo it"):
        make(configs["held out"])


def test_a_damaged_note_is_named(configs, make, tokenizer, tmp_path):
    config = configs["held out"]
    begun = prepare.prepare(config, tokenizer, tmp_path / "out", workers=1, share=(0, 1))
    part = begun.part_path(0, 0)
    content = part.read_bytes()
    assert content.count(b'line 8", ') == 1
    part.write_bytes(content.replace(b'line 8", ', b'line 9", '))
    with pytest.raises(InputError, match=rf"{part}: is damaged \(the checksum of note \d+ differs"):
        merge.merge(begun, 1)


# --- filters of a run on prepared data -----------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("contamination", "contamination=[], and this run has data.contamination=DIR/bench.jsonl;"),
        ("leave_out", "leave_out=null, and this run has data.leave_out=DIR/list.jsonl;"),
        ("duplicates", "duplicates=drop, and this run has data.duplicates=keep;"),
    ],
)
def test_filters_that_the_data_lacks_are_refused(setting, said, configs, make, tokenizer, tmp_path):
    filtered = configs["kept"]
    without = {"contamination": (), "leave_out": None, "duplicates": "drop", "max_bad_share": 0.5}
    plain = filtered.model_copy(update=without)
    run = from_prepared(plain, make(plain))
    load_dataset(run, tokenizer)
    with pytest.raises(InputError) as caught:
        load_dataset(
            run.model_copy(update={setting: getattr(filtered, setting)}),
            tokenizer,
        )
    assert str(caught.value).replace(str(tmp_path), "DIR") == (
        f"DIR/out: was prepared with data.{said} rows are filtered when they are prepared: leave "
        f"data.{setting} out, or prepare the data again"
    )


def test_filters_that_the_data_has_may_be_left_out(configs, make, tokenizer):
    config = configs["held out"]
    run = from_prepared(config, make(config))
    without = run.model_copy(update={"contamination": (), "leave_out": None})
    assert values(load_dataset(without, tokenizer)) == values(load_dataset(run, tokenizer))
    with pytest.raises(InputError, match="contamination_ngram=8, and this run has"):
        load_dataset(run.model_copy(update={"contamination_ngram": 9}), tokenizer)
