"""What a checkpoint keeps of a run's progress, and what it refuses to continue."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from nrt_jax.checkpoints.inputs import Input, RunInputs
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.config.checkpoint import CheckpointConfig
from nrt_jax.data.batches import BatchIterator
from nrt_jax.errors import InputError
from nrt_jax.training.packing import Layout, Packer
from nrt_jax.training.progress import Prefetched, Progress, restore_progress, save_progress
from nrt_jax.types import Group, TokenizedExample, Trace
from tests.training import worlds

EXAMPLES = [group.example for group in worlds.random_groups(24, 1)]
STATE = TrainState(
    params={"weight": jnp.arange(6.0)},
    opt_state=(),
    updates=jnp.int32(3),
    skipped=jnp.int32(0),
    skipped_in_row=jnp.int32(0),
)

INPUTS = RunInputs({"data": Input("train.jsonl", {"": "digest"})})


def batches() -> BatchIterator:
    return BatchIterator(EXAMPLES, 4, True, seed=0)


def packer() -> Packer:
    return Packer(Layout(4, packing=False))


def checkpoints(directory: Path) -> Checkpoints:
    return Checkpoints(directory / "checkpoints", CheckpointConfig(), writable=True)


def save(directory: Path, progress: Progress, data: BatchIterator) -> None:
    opened = checkpoints(directory)
    save_progress(opened, progress, data, packer())
    opened.close()


def restore(directory: Path) -> tuple[Progress, BatchIterator]:
    opened, data = checkpoints(directory), batches()
    progress = restore_progress(opened, STATE, data, packer(), INPUTS)
    opened.close()
    assert progress is not None
    return progress, data


def rows(examples: list[TokenizedExample]) -> list[int]:
    return [example.example.index for example in examples]


def group(example: TokenizedExample, k: int) -> Group:
    """A group whose numbers are no short fractions, one trace of it cut by the limit."""
    rng = np.random.default_rng(k)
    ended = Trace(worlds.tokens(rng, 3), rng.normal(size=3).astype(np.float32), 2, -1 / (k + 3))
    cut = Trace(worlds.tokens(rng, 5), rng.normal(size=5).astype(np.float32), None, 0.0)
    log_c = rng.normal(size=(3, len(example.answer_tokens))).astype(np.float32)
    return Group(example, (ended, cut), version=2, log_c_KA=log_c[1:], log_c_base_A=log_c[0])


def test_nothing_is_restored_from_nothing(tmp_path):
    opened = checkpoints(tmp_path)
    assert restore_progress(opened, STATE, batches(), packer(), INPUTS) is None
    opened.close()


def test_the_next_batch_is_that_of_a_run_that_never_stopped(tmp_path):
    data = batches()
    next(data)
    save(tmp_path, Progress(STATE, INPUTS, step=3), data)
    progress, restored = restore(tmp_path)
    assert (progress.step, progress.prefetched) == (3, None)
    np.testing.assert_array_equal(progress.state.params["weight"], STATE.params["weight"])
    assert rows(next(restored)) == rows(next(data))


def test_prefetched_groups_come_back_with_their_examples(tmp_path):
    data = batches()
    next(data)
    position, taken = data.get_state(), next(data)
    groups = [group(example, k) for k, example in enumerate(taken)]
    save(tmp_path, Progress(STATE, INPUTS, step=3, prefetched=Prefetched(position, groups)), data)
    progress, restored = restore(tmp_path)
    assert progress.prefetched is not None
    assert progress.prefetched.data_position == position
    assert rows([g.example for g in progress.prefetched.groups]) == rows(taken)
    for mine, theirs in zip(progress.prefetched.groups, groups, strict=True):
        for one, other in zip(mine.traces, theirs.traces, strict=True):
            assert one.tokens.tobytes() == other.tokens.tobytes()
            assert one.logprobs.tobytes() == other.logprobs.tobytes()
            assert (one.end_token, one.end_logprob) == (other.end_token, other.end_logprob)
        np.testing.assert_array_equal(mine.log_c_KA, theirs.log_c_KA)
        np.testing.assert_array_equal(mine.log_c_base_A, theirs.log_c_base_A)
        assert mine.version == theirs.version
    assert rows(next(restored)) == rows(next(data))


@pytest.mark.parametrize("saved", [{}, {"format": 99}])
def test_a_checkpoint_of_another_version_is_refused_in_one_line(tmp_path, saved):
    opened = checkpoints(tmp_path)
    opened.save(5, STATE, {"step": 5, **saved}, {})
    opened.close()
    with pytest.raises(InputError) as error:
        restore(tmp_path)
    assert str(error.value) == (
        f"{tmp_path}/checkpoints/5: another version of nrt-jax saved it (format "
        f"{saved.get('format')}, this version reads 3); continue the run with that version, or "
        "choose another run_dir"
    )


# --- other inputs --------------------------------------------------------------------------------

OTHER_DATA = RunInputs({"data": Input("train.jsonl", {"": "another digest"})})


def saved_at_step_3(directory: Path) -> BatchIterator:
    """A checkpoint with prefetched groups; the data at the position before them."""
    data = batches()
    next(data)
    position, taken = data.get_state(), next(data)
    groups = [group(example, k) for k, example in enumerate(taken)]
    waiting = Prefetched(position, groups)
    save(directory, Progress(STATE, INPUTS, step=3, prefetched=waiting), data)
    data.set_state(position)
    return data


def test_other_data_are_refused(tmp_path):
    saved_at_step_3(tmp_path)
    opened = checkpoints(tmp_path)
    with pytest.raises(InputError) as error:
        restore_progress(opened, STATE, batches(), packer(), OTHER_DATA, ["model"])
    opened.close()
    assert str(error.value) == (
        f"{tmp_path}: the run was trained on other inputs: data=train.jsonl has changed; restore "
        "them, or continue on purpose with --allow-changed data, or choose another run_dir"
    )


def test_allowed_data_go_on_at_the_same_position_without_the_old_groups(tmp_path):
    position = saved_at_step_3(tmp_path)
    opened, data = checkpoints(tmp_path), batches()
    progress = restore_progress(opened, STATE, data, packer(), OTHER_DATA, ["data"])
    opened.close()
    assert progress is not None
    # Their traces are of other examples, which are sampled again.
    assert progress.prefetched is None
    assert rows(next(data)) == rows(next(position))
    (change,) = progress.inputs.allowed_changes
    assert (change["step"], change["input"]) == (3, "data")
    assert change["before"]["parts"] != change["after"]["parts"]
    # The next start takes the new data for the run's own.
    save_progress_of = Progress(STATE, progress.inputs, step=4)
    save(tmp_path, save_progress_of, data)
    opened = checkpoints(tmp_path)
    again = restore_progress(opened, STATE, batches(), packer(), OTHER_DATA)
    opened.close()
    assert again is not None
    assert again.inputs.allowed_changes == progress.inputs.allowed_changes


def test_allowed_data_with_other_rows_start_at_the_first(tmp_path, caplog):
    saved_at_step_3(tmp_path)
    opened, data = checkpoints(tmp_path), BatchIterator(EXAMPLES[:20], 4, True, seed=0)
    restore_progress(opened, STATE, data, packer(), OTHER_DATA, ["data"])
    opened.close()
    assert "data: 20 training rows, before 24: starting at the first" in caplog.text
    assert data.get_state() == BatchIterator(EXAMPLES[:20], 4, True, seed=0).get_state()


def test_an_allowed_model_changes_no_example(tmp_path):
    saved_at_step_3(tmp_path)
    model = RunInputs(INPUTS.inputs | {"model": Input("model", {"config.json": "digest"})})
    opened = checkpoints(tmp_path)
    progress = restore_progress(opened, STATE, batches(), packer(), model, ["model"])
    opened.close()
    assert progress is not None
    assert progress.prefetched is not None
