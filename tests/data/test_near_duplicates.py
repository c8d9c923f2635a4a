"""Near-duplicates by datatrove's local executor in four tasks, and the list that training takes."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from nrt_jax.cli import main
from nrt_jax.config.data import DataConfig
from nrt_jax.data.leave_out import LeaveOut
from nrt_jax.data.manifest import FORMAT
from nrt_jax.data.training_rows import read_source, sources_of
from nrt_jax.errors import InputError
from tests.training.runs import write_config_for_any_text

pytest.importorskip("datatrove")
from nrt_jax.data import near_duplicates

LONG = (
    "A farmer has a field of wheat and a field of barley, and each of them is as long as it is "
    "wide. The field of wheat is larger than the other one by a third, and both together have a "
    "fence of poles which stand two metres apart from each other. How many poles does he need?"
)
SUM = "Ann has 3 red and 4 blue balls and finds 5 more and 6 of hers are lost: are 7 left?"
PERU = "What is the capital of Peru, which lies in South America?"
ROWS = {
    "long": LONG,
    "long, one word": LONG.replace("barley", "rye"),
    "long, case and punctuation": LONG.upper().replace(",", " -"),
    "long, backwards": " ".join(reversed(LONG.split())),
    "long, a part": LONG.split(".")[0],
    "sum": SUM,
    "sum, white space": f" {SUM}\n",
    "sum, numbers": "".join(chr(ord(c) + 2) if c.isdigit() else c for c in SUM),
    "short": "Why?",  # too short for a 5-gram, as the next two
    "short, again": "Why?",
    "short, another": "Why not?",
    "benchmark": PERU,
    "unusable": "",
}
GROUPS = {
    "duplicate": [{"sum", "sum, white space"}, {"short", "short, again"}],
    "near-duplicate": [{"long", "long, one word", "long, case and punctuation"}],
}


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("rows")
    path, benchmark = folder / "rows.jsonl", folder / "benchmark.jsonl"
    lines = [json.dumps({"question": text, "answer": "7"}) for text in ROWS.values()]
    path.write_text("\n".join(lines))
    benchmark.write_text(json.dumps({"question": PERU}))
    return DataConfig(path=path, contamination=[benchmark])


@pytest.fixture(scope="module")
def out(config, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("work") / "out"
    counts = near_duplicates.deduplicate(config, out, tasks=4)
    assert counts == {"duplicate": 2, "near-duplicate": 2, "question of a benchmark": 1}
    return out


def read(config: DataConfig):
    (source,) = sources_of(config)
    return read_source(source, source.path)


def test_one_of_each_group_stays(config, out):
    names = {f"line {i + 1}": name for i, name in enumerate(ROWS)}
    lines = [json.loads(line) for line in (out / "leave_out.jsonl").open(encoding="utf-8")]
    left_out = {names[line["row"]]: line for line in lines}
    assert len(left_out) == len(lines) == 5
    for reason, groups in GROUPS.items():
        for group in groups:
            assert len(group & set(left_out)) == len(group) - 1, group
            assert {left_out[name]["reason"] for name in group & set(left_out)} == {reason}
    assert set(left_out) <= {"benchmark"}.union(*(g for of in GROUPS.values() for g in of))
    assert left_out["benchmark"]["detail"].startswith("100% of the words of ")
    (stays,) = GROUPS["near-duplicate"][0] - set(left_out)
    place = next(place for place, name in names.items() if name == stays)
    for line in lines:
        if line["reason"] == "near-duplicate":
            assert line["detail"] == f"is in the cluster of {config.path} {place}, which stays"


def test_training_takes_the_list(config, out):
    leave_out = LeaveOut(out / near_duplicates.LIST_FILE)
    found = [leave_out.find(row) for row in read(config)]
    leave_out.check_all_met(every_row=True)
    reasons = Counter(one.reason for one in found if one is not None)
    assert reasons == {"duplicate": 2, "near-duplicate": 2, "question of a benchmark": 1}


def test_finished_work_is_kept_and_other_work_refused(config, out, tmp_path):
    written = (out / near_duplicates.LIST_FILE).stat().st_mtime_ns
    assert near_duplicates.deduplicate(config, out, tasks=4).total() == 5
    assert (out / near_duplicates.LIST_FILE).stat().st_mtime_ns == written
    other = config.model_copy(update={"contamination_ngram": 9})
    for changed, tasks in ((config, 3), (other, 4)):
        with pytest.raises(InputError, match=r"out: holds the work on other data, settings or"):
            near_duplicates.stages(changed, out, tasks)
    (tmp_path / "mine.txt").touch()
    with pytest.raises(InputError, match=r"is not empty and holds no such work; name another"):
        near_duplicates.stages(config, tmp_path, 4)
    nothing = config.model_copy(update={"path": tmp_path / "*.jsonl"})
    with pytest.raises(InputError, match=r"\*.jsonl: matches no file; correct data.path"):
        near_duplicates.stages(nothing, tmp_path / "new", 4)
    missing = config.model_copy(update={"path": tmp_path / "none.jsonl"})
    with pytest.raises(InputError, match=r"none.jsonl: No such file or directory; correct data.pa"):
        near_duplicates.stages(missing, tmp_path / "new", 4)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("tasks", [1, 2, 3, 5])
def test_tasks_share_the_rows(tasks, tmp_path):
    """Of one file every n-th row, of more files than tasks whole files; no row twice."""
    names = ["a", "b", "c"]
    for name in names:
        lines = (json.dumps({"question": f"{name}{i}", "answer": "7"}) for i in range(7))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    parts = [{"name": "one", "path": str(tmp_path / "a.jsonl")}]
    parts += [{"name": "all", "path": str(tmp_path / "[b-c].jsonl")}]
    reader = near_duplicates.RowReader(DataConfig(mixture=parts))
    shares = [[doc.id for doc in reader.run(None, rank, tasks)] for rank in range(tasks)]
    expected = [f"{tmp_path}/{name}.jsonl line {i + 1}" for name in names for i in range(7)]
    assert sorted(name for share in shares for name in share) == expected
    assert all(shares)


def test_tasks_share_a_choice_of_rows(tmp_path):
    """Of files of which not every row is read, each task reads its share of the choice."""
    for name in "ab":
        lines = (json.dumps({"question": f"{name}{i}", "answer": "7"}) for i in range(7))
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    path = str(tmp_path / "*.jsonl")
    config = DataConfig(path=path, permutation_seed=1, eval_rows=2, train_rows=5, max_bad_share=0)
    reader = near_duplicates.RowReader(config)
    shares = [[doc.id for doc in reader.run(None, rank, 2)] for rank in range(2)]
    found = [name for share in shares for name in share]
    assert sorted(found) == sorted(f"{row.file} {row.place_in_file}" for row in read(config))
    assert len(found) == 7


def test_prepared_data_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT}))
    with pytest.raises(InputError, match="is prepared data; name the files that it was"):
        near_duplicates.stages(DataConfig(path=tmp_path), tmp_path / "new", 1)


def test_the_verb(config, out, tmp_path, monkeypatch, capsys):
    model = write_config_for_any_text(tmp_path)
    words = ["data", "deduplicate", str(model), "data.source=jsonl", f"data.path={config.path}"]
    given = []
    monkeypatch.setattr(
        near_duplicates, "deduplicate", lambda *args: given.append(args) or Counter(near=2, same=1)
    )
    assert main([*words, "--out", str(out), "--tasks", "3"]) == 0
    ((data, folder, tasks),) = given
    assert (data.path, folder, tasks) == (config.path, out, 3)
    path = out / near_duplicates.LIST_FILE
    assert capsys.readouterr().out.splitlines() == [
        "2  near",
        "1  same",
        f"{path} names 3 rows; data.leave_out={path} trains without them",
    ]
    monkeypatch.setitem(sys.modules, "datatrove.data", None)
    monkeypatch.delitem(sys.modules, near_duplicates.__name__)
    monkeypatch.delattr("nrt_jax.data.near_duplicates")
    assert main([*words, "--out", str(out)]) == 2
    assert capsys.readouterr().err == (
        "nrt-jax: error: data deduplicate: the package datatrove is not installed; "
        "pip install 'nrt-jax[datatrove]'\n"
    )
