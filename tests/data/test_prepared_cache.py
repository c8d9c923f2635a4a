"""Large files are prepared at the first start: the data of a run in memory, in the same batches."""

import json
import os
import threading
from dataclasses import replace
from itertools import islice
from pathlib import Path

import filelock
import numpy as np
import pytest

from nrt_jax import distributed
from nrt_jax.config.data import DataConfig
from nrt_jax.data import prepare, prepared_cache
from nrt_jax.data.batches import BatchIterator
from nrt_jax.data.pipeline import Dataset, load_dataset
from nrt_jax.data.prepared import open_cached
from nrt_jax.errors import InputError, RunFailed
from nrt_jax.types import Example, TokenizedExample
from tests.data.test_prepare import in_killed_process


def rows_of(count: int, first: int = 0) -> list:
    """Additions, of which some are asked twice, and unusable rows."""
    rows: list = [
        {"question": f"{i % 31}+{i % 7}", "answer": [f"={i % 31 + i % 7}", f"{i}"]}
        for i in range(first, first + count)
    ]
    return [*rows[:5], b"{broken", *rows[5:], {"question": "\udc80", "answer": "=1"}]


@pytest.fixture(autouse=True)
def no_file_is_small(small_parts, monkeypatch):
    monkeypatch.setattr(prepared_cache, "MEMORY_BYTES", 0)


@pytest.fixture
def config(make_config, write_rows, tmp_path) -> DataConfig:
    """A mixture with an evaluation file."""
    paths = [write_rows(rows_of(60)), write_rows(rows_of(40, 300), "more.jsonl")]
    return make_config(
        source=None,
        mixture=[{"name": "a", "path": paths[0], "rows": 50}, {"name": "b", "path": paths[1]}],
        eval_path=write_rows(rows_of(6, 3), "held.jsonl"),
        max_bad_share=0.5,
        eval_rows=4,
        cache=tmp_path / "cache",
    )


def values(dataset: Dataset) -> tuple:
    train, held_out = (
        [(e.example, e.prompt_tokens.tolist(), e.answer_tokens.tolist()) for e in of]
        for of in (dataset.train, dataset.eval)
    )
    rejected, sources = list(dataset.rejected), list(dataset.sources)
    return train, held_out, dataset.bad_rows, rejected, sources


def with_(config: DataConfig, **changes) -> DataConfig:
    return config.model_copy(update=changes)


def entries(config: DataConfig) -> list[str]:
    folder = Path(config.cache)
    return sorted(path.name for path in folder.iterdir() if path.is_dir())


def test_the_data_is_that_of_a_run_in_memory(config, tokenizer, monkeypatch):
    expected = values(load_dataset(with_(config, cache="off"), tokenizer))
    assert not Path(config.cache).exists()
    assert values(load_dataset(config, tokenizer)) == expected
    assert len(expected[0]) > 50
    assert len(expected[3]) > 4
    # A second start reads no row.
    monkeypatch.setattr(prepare, "slices", lambda plan: pytest.fail("rows are read again"))
    assert values(load_dataset(config, tokenizer)) == expected
    assert len(entries(config)) == 1


def test_small_files_stay_in_memory(config, tokenizer, monkeypatch):
    monkeypatch.setattr(prepared_cache, "MEMORY_BYTES", 10_000)
    assert isinstance(load_dataset(config, tokenizer).train, list)
    assert not Path(config.cache).exists()


def test_what_decides_the_rows_has_an_entry_of_its_own(config, tokenizer):
    load_dataset(config, tokenizer)
    load_dataset(with_(config, shuffle=False, read_threads=7), tokenizer)
    assert len(entries(config)) == 1
    load_dataset(with_(config, duplicates="keep"), tokenizer)
    load_dataset(with_(config, max_answer_tokens=9), tokenizer)
    load_dataset(config, replace(tokenizer, bos_id=None))
    assert len(entries(config)) == 4
    path = config.mixture[1].path
    path.write_bytes(path.read_bytes().replace(b"=1", b"=2"))
    expected = values(load_dataset(with_(config, cache="off"), tokenizer))
    assert values(load_dataset(config, tokenizer)) == expected
    assert len(entries(config)) == 5


def test_a_process_waits_for_the_one_that_prepares(config, tokenizer, monkeypatch):
    load_dataset(config, tokenizer)
    (entry,) = entries(config)
    monkeypatch.setattr(prepare, "slices", lambda plan: pytest.fail("rows are read again"))
    found = []
    second = threading.Thread(target=lambda: found.append(load_dataset(config, tokenizer)))
    manifest = Path(config.cache) / entry / "manifest.json"
    with filelock.FileLock(f"{manifest.parent}.lock"):
        manifest.rename(manifest.with_name("not.yet"))
        second.start()
        second.join(0.2)
        assert not found
        manifest.with_name("not.yet").rename(manifest)
    second.join(10)
    assert len(found) == 1


def test_a_killed_start_is_gone_on_with(config, tokenizer, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(prepared_cache, "merge", lambda plan, workers: os._exit(9))
        assert in_killed_process(lambda: load_dataset(config, tokenizer)) == 9
    made = []
    monkeypatch.setattr(prepare, "write_part", lambda *part: made.append(part))
    load_dataset(config, tokenizer)
    assert not made


def test_data_that_is_refused_leaves_nothing(config, tokenizer):
    said = []
    for cache in ("off", config.cache):
        with pytest.raises(InputError, match=r"more than data\.max_bad_share=0") as caught:
            load_dataset(with_(config, cache=cache, max_bad_share=0.0), tokenizer)
        said.append(str(caught.value))
    assert said[0] == said[1]
    assert not entries(config)


def test_a_damaged_entry(config, tokenizer):
    load_dataset(config, tokenizer)
    shard = next(Path(config.cache).rglob("*train.array_record-00000*"))
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    entry = shard.parent.parent.parent
    remedy = f"; remove the folder {entry}, and the next start prepares the data again"
    with pytest.raises(InputError, match=rf"^{shard}: has .* bytes, .*{remedy}"):
        load_dataset(config, tokenizer)
    shard.write_bytes(bytes(len(content)))
    with pytest.raises(InputError) as caught:
        open_cached(entry, config, tokenizer).train[0]
    assert str(caught.value) == f"{shard}: is damaged (0 readable rows of 12){remedy}"


def test_a_folder_that_cannot_be_written(config, tokenizer, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFailed) as caught:
        load_dataset(with_(config, cache=tmp_path / "file" / "cache"), tokenizer)
    folder = tmp_path / "file" / "cache"
    assert str(caught.value) == (
        f"data.cache={folder}: {folder}: Not a directory; make room or allow access there, name "
        "another folder, or set data.cache=off to tokenise in memory at every start"
    )


# --- batches -------------------------------------------------------------------------------------


def batches_of(config: DataConfig, tokenizer, state: dict | None = None) -> list:
    train = load_dataset(config, tokenizer).train
    batches = BatchIterator(train, 8, True, 5, read_threads=config.read_threads)
    if state is not None:
        batches.set_state(json.loads(json.dumps(state)))
    return [
        [(e.example, e.prompt_tokens.tolist(), e.answer_tokens.tolist()) for e in batch]
        for batch in islice(batches, 12)
    ]


@pytest.mark.parametrize("cache", ["off", "prepared"])
def test_every_process_has_the_same_batches(cache, config, tokenizer, monkeypatch):
    """Each of several processes takes the whole batches of one alone."""
    expected = batches_of(with_(config, cache="off", read_threads=0), tokenizer)
    own = with_(config, cache="off") if cache == "off" else config
    for processes, threads in ((1, 1), (2, 0), (2, 3), (4, 2)):
        for process in range(processes):
            place = distributed.Place("host:1", process, processes)
            monkeypatch.setattr(distributed._State, "place", place)
            assert batches_of(with_(own, read_threads=threads), tokenizer) == expected


@pytest.mark.parametrize("threads", [0, 1, 4])
def test_a_position_does_not_count_what_is_read_ahead(threads, config, tokenizer):
    train = load_dataset(config, tokenizer).train
    batches = BatchIterator(train, 8, True, 5, read_threads=threads)
    list(islice(batches, 3))
    state = batches.get_state()
    assert state["next_batch"] == 3
    expected = batches_of(with_(config, read_threads=0), tokenizer, state)
    assert batches_of(with_(config, read_threads=threads), tokenizer, state) == expected


def test_batches_are_read_ahead():
    """The step does not wait for a batch that is read while the one before it is used."""
    asked, two_are_read = [], threading.Event()

    class Examples(list):
        def __getitem__(self, row):
            asked.append(row)
            if len(asked) == 3 * 2:
                two_are_read.set()
            return super().__getitem__(row)

    tokens = np.zeros(1, np.int32)
    examples = Examples(TokenizedExample(Example(i, "", ""), tokens, tokens) for i in range(8))
    batches = BatchIterator(examples, 2, False, 0, read_threads=2)
    assert [example.example.index for example in next(batches)] == [0, 1]
    assert two_are_read.wait(10)
