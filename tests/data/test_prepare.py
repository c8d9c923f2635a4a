"""Prepared data: the rows of `load_dataset`, the same bytes however many processes make them."""

import json
import os
import pickle
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest

from nrt_jax.config.data import DataConfig
from nrt_jax.data import merge, parts, plan, prepare, prepared_files
from nrt_jax.data.batches import BatchIterator
from nrt_jax.data.pipeline import Dataset, load_dataset
from nrt_jax.errors import InputError
from nrt_jax.types import TokenizedExample


def additions(count: int, first: int = 0) -> list:
    """Questions of which some are asked twice, and unusable rows."""
    rows: list = [
        {"question": f"{i % 23}+{i % 7}", "answer": [f"={i % 23 + i % 7}", f"{i}"]}
        for i in range(first, first + count)
    ]
    return [*rows[:5], b"{broken", *rows[5:], {"question": "", "answer": "=1"}]


pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture
def make(make_config, tokenizer, tmp_path):
    """Prepare a config in a folder."""

    def prepared(config: DataConfig, out: str | Path = "out", shares=((0, 1),), workers=1) -> Path:
        for share in shares:
            begun = prepare.prepare(config, tokenizer, tmp_path / out, workers=workers, share=share)
        merge.merge(begun, workers)
        return tmp_path / out

    return prepared


def as_values(example: TokenizedExample) -> tuple:
    return (
        example.example,
        example.prompt_tokens.tolist(),
        example.answer_tokens.tolist(),
        example.after_start_tokens.tolist(),
        example.prompt_tokens.dtype,
    )


def values(dataset: Dataset) -> tuple:
    train, held_out = ([as_values(e) for e in of] for of in (dataset.train, dataset.eval))
    return train, held_out, dataset.bad_rows


def tree(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def from_prepared(config: DataConfig, out: Path) -> DataConfig:
    changes = {"path": out, "source": None, "mixture": (), "eval_path": None}
    return config.model_copy(update=changes)


@pytest.fixture
def configs(make_config, write_rows):
    """Held-out rows, an evaluation file, and a mixture."""
    rows = write_rows(additions(90))
    more = write_rows(additions(40, first=300), "more.jsonl")
    held = write_rows(additions(6, first=3), "held.jsonl")
    loose = {"max_bad_share": 0.5, "eval_rows": 7, "seed": 3}
    parts = [{"name": "a", "path": rows, "rows": 50}, {"name": "b", "path": more}]
    return {
        "held out": make_config(path=rows, **loose),
        "evaluation file": make_config(path=rows, eval_path=held, **loose),
        "mixture": make_config(source=None, mixture=parts, eval_path=held, **loose),
        "permuted": make_config(path=rows, permutation_seed=4, train_rows=30, **loose),
        "several files": make_config(path=[rows, more], template="tulu", **loose),
    }


@pytest.mark.parametrize(
    "kind", ["held out", "evaluation file", "mixture", "permuted", "several files"]
)
def test_the_rows_are_those_of_the_files(kind, configs, make, tokenizer):
    config = configs[kind]
    out = make(config)
    expected = load_dataset(config, tokenizer)
    found = load_dataset(from_prepared(config, out), tokenizer)
    assert values(found) == values(expected)
    assert len(expected.train) >= 30
    lines = (out / "rejected.jsonl").read_text().splitlines()
    assert [tuple(json.loads(line).values()) for line in lines] == list(expected.rejected)


def test_batches_are_the_same(configs, make, tokenizer):
    config = configs["held out"]
    datasets = (
        load_dataset(config, tokenizer),
        load_dataset(from_prepared(config, make(config)), tokenizer),
    )
    batches = [islice(BatchIterator(d.train, 8, True, 5), 30) for d in datasets]
    for one, other in zip(*batches, strict=True):
        assert list(map(as_values, one)) == list(map(as_values, other))


# --- the same bytes ------------------------------------------------------------------------------


def test_any_number_of_shares_gives_the_same_bytes(configs, make):
    expected = tree(make(configs["mixture"]))
    assert tree(make(configs["mixture"], "three", [(2, 3), (0, 3), (1, 3)])) == expected
    assert tree(make(configs["mixture"], "again", [(1, 2), (0, 2), (0, 1)])) == expected
    assert sum(".array_record-" in name for name in expected) > 3


def test_workers_give_the_same_bytes(configs, make, tokenizer, tmp_path):
    expected = tree(make(configs["several files"]))
    # Apart from jax, whose threads would make the workers start anew.
    script = """if True:
        import pickle, sys
        from nrt_jax.data import merge, plan, prepare
        plan.ROWS_PER_PART = prepare.ROWS_PER_PART = 16
        merge.SHARD_BYTES = 3000
        config, tokenizer, out = pickle.load(sys.stdin.buffer)
        merge.merge(prepare.prepare(config, tokenizer, out, workers=3, share=(0, 1)), 3)
    """
    given = pickle.dumps((configs["several files"], tokenizer, tmp_path / "workers"))
    subprocess.run([sys.executable, "-c", script], input=given, check=True)
    assert tree(tmp_path / "workers") == expected


def in_killed_process(run: Callable[[], object]) -> int:
    """The status of a process that ends where `run` ends it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # jax warns of forks, and the child leaves it alone
        child = os.fork()
    if not child:
        try:
            run()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_at(monkeypatch, module, name: str, call: int) -> None:
    """From now on the process ends at a call of a function."""
    function, calls = getattr(module, name), []

    def last(*args, **kwargs):
        calls.append(args)
        if len(calls) == call:
            os._exit(9)
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, last)


@pytest.mark.parametrize(
    ("module", "name", "call"),
    [
        (parts.os, "replace", 1),  # the plan
        (parts.os, "replace", 4),  # a part
        (merge, "merge", 1),
        (prepared_files.os, "fsync", 11),  # the second shard
        (merge, "write_metadata", 1),
        (merge, "read_manifest", 1),  # after the manifest
    ],
)
def test_a_killed_preparation_goes_on(module, name, call, configs, make, monkeypatch):
    config = configs["held out"]
    expected = tree(make(config))

    def run():
        with monkeypatch.context() as patched:
            # Threads of a forked process crash ArrayRecord, which has had some before the fork.
            patched.setattr(prepare, "in_workers", lambda make, tasks, _, threads: map(make, tasks))
            dies_at(patched, module, name, call)
            make(config, "killed")

    assert in_killed_process(run) == 9
    assert tree(make(config, "killed")) == expected


def test_finished_parts_are_kept(configs, make, tokenizer, tmp_path, monkeypatch):
    config, out = configs["held out"], tmp_path / "out"
    prepare.prepare(config, tokenizer, out, workers=1, share=(0, 2))
    made = []
    monkeypatch.setattr(
        prepare, "write_part", lambda *args: (made.append(args), parts.write_part(*args))
    )
    make(config)
    assert len(made) == 3
    make(config)
    assert len(made) == 3


def test_a_killed_command_ends_its_workers(tmp_path, quickstart_directory):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(f'{{"question": "{i}+1", "answer": "=1"}}\n' for i in range(200_000)))
    words = f"data prepare quickstart/sft {tmp_path / 'out'} --workers 2 data.path={rows}"
    words += f" data.source=jsonl data.tokenizer={quickstart_directory}"
    command = subprocess.Popen([sys.executable, "-m", "nrt_jax", *words.split()])
    first = tmp_path / "out" / plan.WORK / "000-000001.part"
    while not first.exists():
        assert command.poll() is None
        time.sleep(0.02)
    children = Path(f"/proc/{command.pid}/task/{command.pid}/children").read_text().split()
    command.kill()
    command.wait()
    assert len(children) == 2
    until = time.monotonic() + 30
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < until, "a worker outlives its parent"
        time.sleep(0.02)


# --- refusals ------------------------------------------------------------------------------------


def test_another_config_or_other_files_are_refused(configs, make, tmp_path):
    make(configs["held out"])
    with pytest.raises(InputError, match=r"config\.seed was 3 and is 4; undo it"):
        make(configs["held out"].model_copy(update={"seed": 4}))
    (tmp_path / "rows.jsonl").write_bytes(b'{"question": "1", "answer": "2"}\n' * 3)
    with pytest.raises(InputError, match=r"sources\.0\.files was \w+ and is \w+; undo it"):
        make(configs["held out"])


def test_folders_of_others_are_left_alone(configs, make, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    for name, said in (("file", "is a file"), ("full", "exists and is not empty")):
        with pytest.raises(InputError, match=f"{name}: {said}; give a new folder"):
            make(configs["held out"], name)


def test_a_missing_share_is_named(configs, make, tokenizer, tmp_path):
    config, out = configs["held out"], tmp_path / "out"
    with pytest.raises(InputError, match="nothing was prepared here"):
        plan.read_plan(out)
    begun = prepare.prepare(config, tokenizer, out, workers=1, share=(1, 3))
    with pytest.raises(InputError, match="run nrt-jax data prepare CONFIG OUT --shard 0/3"):
        merge.merge(begun, 1)
    prepare.prepare(config, tokenizer, out, workers=1, share=(0, 3))
    with pytest.raises(InputError, match="run nrt-jax data prepare CONFIG OUT --shard 2/3"):
        merge.merge(plan.read_plan(out), 1)
    prepare.prepare(config, tokenizer, out, workers=1, share=(2, 3))
    merge.merge(plan.read_plan(out), 1)


@pytest.mark.parametrize(
    ("place", "said"),
    [(-9, "the checksum of record 14 differs"), (20, "."), (400, ".")],
)
def test_a_damaged_part_is_named(place, said, configs, make, tokenizer, tmp_path):
    config, out = configs["held out"], tmp_path / "out"
    begun = prepare.prepare(config, tokenizer, out, workers=1, share=(0, 1))
    part = begun.part_path(0, 0)
    content = part.read_bytes()
    changed = bytearray(content)
    changed[place] ^= 2
    part.write_bytes(content[:place] if place > 0 else changed)
    with pytest.raises(InputError, match=rf"{part}: is damaged \({said}.*\); remove it and run"):
        merge.merge(begun, 1)
    part.unlink()
    make(config)


def test_too_many_bad_rows_stop_the_preparation(make_config, make, tokenizer, write_rows):
    config = make_config(path=write_rows(additions(10)), eval_rows=2)
    with pytest.raises(InputError) as expected:
        load_dataset(config, tokenizer)
    with pytest.raises(InputError) as found:
        make(config)
    assert str(found.value) == str(expected.value)
    assert "2 of 12 rows are unusable" in str(found.value)


def test_generated_rows_are_not_prepared(make_config, make):
    with pytest.raises(InputError, match="its rows are made when they are read"):
        make(make_config("chain_addition"))


def test_a_full_disk_is_told_by_its_file(tmp_path):
    path = tmp_path / "shard"
    path.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left on device") as caught:
        prepared_files.write_shard(path, [b"x" * 100_000] * 10)
    assert caught.value.filename == str(path)
    assert not path.is_symlink()
