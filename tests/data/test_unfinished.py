"""A preparation that is disturbed: one line, and the same command makes the same bytes."""

import errno
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nrt_jax.data import merge, plan, prepare
from nrt_jax.errors import InputError
from tests.data.test_prepare import additions, tree

pytestmark = pytest.mark.usefixtures("small_parts")


@pytest.fixture
def make(make_config, write_rows, tokenizer, tmp_path):
    """Run the steps of `nrt-jax data prepare` in a folder, or the first of them alone."""
    config = make_config(path=write_rows(additions(90)), max_bad_share=0.5, eval_rows=7)

    def run(out: str, *, to_the_end: bool = True) -> Path:
        begun = prepare.prepare(config, tokenizer, tmp_path / out, workers=1, share=(0, 1))
        if to_the_end:
            merge.merge(begun, 1)
        return tmp_path / out

    return run


def full_at(monkeypatch, write: int) -> None:
    """The disk is full when a file is brought to it for the `write`-th time."""
    sync, writes = os.fsync, []

    def fsync(number: int) -> None:
        writes.append(number)
        if len(writes) >= write:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)


# The plan, parts, the rows in all, shards, notes of shards, the rejected rows and the manifest.
@pytest.mark.parametrize("write", [1, 2, 5, 8, 9, 10, 13, 20, 21])
def test_a_full_disk_harms_nothing(write, make, monkeypatch, tmp_path):
    expected = tree(make("undisturbed"))
    with monkeypatch.context() as patched:
        full_at(patched, write)
        with pytest.raises(OSError, match="No space left on device") as caught:
            make("out")
    assert str(tmp_path / "out") in str(caught.value.filename)
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert tree(make("out")) == expected


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


DAMAGE = {
    "a part is cut": ("000-000001.part", cut, "000-000001.part: is damaged ("),
    "a part is empty": (
        "000-000002.part",
        lambda path: path.write_bytes(b""),
        "000-000002.part: is damaged (",
    ),
    "the rows in all are cut": ("totals.json", cut, "totals.json: is damaged ("),
    "the plan is cut": ("plan.json", cut, "plan.json: is damaged ("),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_a_damaged_disk_leaves_is_named(kind, make, tmp_path):
    name, damage, said = DAMAGE[kind]
    expected = tree(make("undisturbed"))
    work = make("out", to_the_end=False) / plan.WORK
    damage(work / name)
    with pytest.raises(InputError) as caught:
        make("out")
    assert str(caught.value).startswith(f"{work}/{said}")
    assert "\n" not in str(caught.value)
    # As the line says: a plan is begun anew, and what else is gone is made again.
    if name == "plan.json":
        work.rename(tmp_path / "removed")
    else:
        (work / name).unlink()
    assert tree(make("out")) == expected


def test_what_is_gone_is_made_again(make):
    expected = tree(make("undisturbed"))
    work = make("out", to_the_end=False) / plan.WORK
    (work / "000-000004.part").unlink()
    assert tree(make("out")) == expected


@pytest.mark.slow
def test_kills_at_random_moments(tmp_path, quickstart_directory):
    rows = tmp_path / "rows.jsonl"
    lines = [f'{{"question": "{i}+{i % 7}", "answer": "={i % 10}"}}\n' for i in range(60_000)]
    rows.write_text("".join(lines))

    def start(out: str, workers: int) -> subprocess.Popen:
        words = f"data prepare quickstart/sft {tmp_path / out} --workers {workers}"
        words += f" data.path={rows} data.source=jsonl data.tokenizer={quickstart_directory}"
        return subprocess.Popen([sys.executable, "-m", "nrt_jax", *words.split()])

    assert start("undisturbed", 1).wait() == 0
    expected, moments, killed = tree(tmp_path / "undisturbed"), random.Random(0), 0
    for workers in (1, 2):
        out = f"killed-{workers}"
        for _ in range(4):
            command = start(out, workers)
            while not (tmp_path / out).exists() and command.poll() is None:
                time.sleep(0.02)
            time.sleep(moments.uniform(0, 3))
            command.kill()
            killed += command.wait() != 0
        assert start(out, workers).wait() == 0
        assert tree(tmp_path / out) == expected
    assert killed > 3
