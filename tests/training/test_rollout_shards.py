"""The files of the log of rollouts: their size, and what a run that continues leaves of them."""

import os

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nrt_jax.analysis.rollout_log import read_batches
from nrt_jax.config.logging import LoggingConfig
from nrt_jax.errors import InputError
from nrt_jax.training.logger import MetricsWriter
from nrt_jax.training.rollout_shards import SCHEMA, SHARD_STEPS, RolloutShards, shards

TRACES, TOKENS = 6, 50
STEP_BYTES = 4 * TRACES * TOKENS
"""Of the tokens alone."""


def table(step: int) -> pa.Table:
    """A step in which every value says where it belongs."""
    rows = [
        {
            "step": step,
            "group": k // 2,
            "sample": k % 2,
            "source": "s",
            "row": 10 * step + k,
            "tokens": [1000 * step + k] * TOKENS,
            "logprobs": [-0.1 * (step * i % 17) for i in range(TOKENS)],
            "reward": 0.1 * k,
        }
        for k in range(TRACES)
    ]
    return pa.Table.from_pylist(rows, schema=SCHEMA)


def write(folder, steps, after=0, shard_bytes=4 * STEP_BYTES, save_every=2) -> None:
    """Write steps as a run does that saves a checkpoint every few steps."""
    with RolloutShards(folder, after=after, shard_bytes=shard_bytes) as log:
        for step in steps:
            log.add(table(step))
            if step % save_every == 0:
                log.sync()


def contents(folder) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder))}


@pytest.fixture
def whole(tmp_path) -> dict[str, bytes]:
    write(tmp_path / "whole", range(1, 13))
    return contents(tmp_path / "whole")


def test_files_are_bounded_and_hold_every_row_once(tmp_path, whole):
    assert list(whole) == [f"{number:05}.parquet" for number in range(len(whole))]
    assert 4 < len(whole) < 12
    # Whole traces, so that a step may begin in one file and end in the next.
    sizes = [pq.read_table(tmp_path / "whole" / name).nbytes for name in whole]
    assert max(sizes) <= 4 * STEP_BYTES
    assert max(map(len, whole.values())) <= 4 * STEP_BYTES + 8192
    rows = pd.read_parquet(tmp_path / "whole")
    assert rows["row"].tolist() == [10 * step + k for step in range(1, 13) for k in range(TRACES)]


def test_a_trace_larger_than_a_file_is_written_all_the_same(tmp_path):
    write(tmp_path / "log", [1], shard_bytes=10)
    assert [pq.read_metadata(path).num_rows for path in shards(tmp_path / "log")] == TRACES * [1]


def test_small_steps_end_a_file_by_their_number(tmp_path):
    write(tmp_path / "log", range(1, SHARD_STEPS + 2), shard_bytes=2**30, save_every=1000)
    first, second = (pq.read_table(path) for path in shards(tmp_path / "log"))
    assert (first["step"][-1].as_py(), second["step"][0].as_py()) == (SHARD_STEPS, SHARD_STEPS + 1)


@pytest.mark.parametrize(("checkpoint", "more"), [(0, 3), (3, 3), (4, 0), (7, 1), (8, 3), (12, 0)])
def test_a_run_that_continues_leaves_the_same_files(checkpoint, more, tmp_path, whole):
    """Killed some steps after a checkpoint, of which files may have been written."""
    last = min(checkpoint + more, 12)
    log = RolloutShards(tmp_path / "log", after=0, shard_bytes=4 * STEP_BYTES)
    for step in range(1, last + 1):
        log.add(table(step))
        if step == checkpoint or more == 3:
            log.sync()
    (tmp_path / "log.part").write_bytes(b"half a file")
    write(tmp_path / "log", range(checkpoint + 1, 13), after=checkpoint)
    assert contents(tmp_path / "log") == whole
    assert not (tmp_path / "log.part").exists()


def test_a_reader_finds_whole_files_only(tmp_path):
    """While a file grows, and after the run was killed while it wrote one."""
    log = RolloutShards(tmp_path / "rollouts", after=0)
    log.add(table(1))
    log.sync()
    log.add(table(2))
    (tmp_path / "rollouts.part").write_bytes(b"half a file")
    assert pd.read_parquet(tmp_path / "rollouts")["step"].tolist() == TRACES * [1]
    assert [batch.num_rows for batch in read_batches(tmp_path, columns=["row"])] == [TRACES]
    log.sync()
    assert len(pd.read_parquet(tmp_path / "rollouts")) == 2 * TRACES


def test_a_broken_file_is_named(tmp_path):
    write(tmp_path / "rollouts", range(1, 13))
    last = shards(tmp_path / "rollouts")[-1]
    last.write_bytes(last.read_bytes()[:-5])
    unreadable = rf"^{last}: cannot be read \([^\n]*; "
    with pytest.raises(InputError, match=f"{unreadable}delete this file"):
        RolloutShards(tmp_path / "rollouts", after=12)
    with pytest.raises(InputError, match=f"{unreadable}copy the file again"):
        list(read_batches(tmp_path))
    last.unlink()
    RolloutShards(tmp_path / "rollouts", after=12)


# --- by the writer of the metrics ----------------------------------------------------------------


def open_writer(directory, after: int, **logging) -> MetricsWriter:
    config = LoggingConfig(tensorboard=False, **logging)
    return MetricsWriter(directory, config, after=after, total=9, resolved={})


def test_rows_are_on_the_disk_before_a_checkpoint_and_at_the_end(tmp_path):
    with open_writer(tmp_path, -1, rollouts=True) as writer:
        writer.write_rollouts(table(1))
        assert not shards(tmp_path / "rollouts")
        writer.sync()
        assert len(pd.read_parquet(tmp_path / "rollouts")) == TRACES
        writer.write_rollouts(table(2))
    assert len(pd.read_parquet(tmp_path / "rollouts")) == 2 * TRACES


def test_a_run_that_fails_keeps_its_last_traces(tmp_path):
    writer = open_writer(tmp_path, -1, rollouts=True)
    writer.write_rollouts(table(1))
    writer.__exit__(RuntimeError, RuntimeError("a gradient was not finite"), None)
    assert len(pd.read_parquet(tmp_path / "rollouts")) == TRACES


def test_the_log_of_an_abandoned_end_is_cut_even_when_it_is_off(tmp_path):
    with open_writer(tmp_path, -1, rollouts=True) as writer:
        writer.write_rollouts(table(1))
        writer.write_rollouts(table(2))
    open_writer(tmp_path, 1).close()
    assert pd.read_parquet(tmp_path / "rollouts")["step"].unique().tolist() == [1]
    open_writer(tmp_path, -1).close()
    assert shards(tmp_path / "rollouts") == []


def test_off_by_default(tmp_path):
    open_writer(tmp_path, -1).close()
    assert not (tmp_path / "rollouts").exists()


def test_a_full_disk_names_the_file(tmp_path, monkeypatch, caplog):
    def full(fd):
        raise OSError(28, "No space left on device")

    log = RolloutShards(tmp_path / "rollouts", after=0)
    log.add(table(1))
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*rollouts/00000\.parquet'"):
        log.sync()
    with pytest.raises(RuntimeError, match="of the run"), log:
        raise RuntimeError("of the run")
    assert "00000.parquet: No space left on device; the newest rollouts are lost" in caplog.text
