"""Checkpoints: what is kept, what damage does, and what is refused."""

import logging
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from nrt_jax.checkpoints.fingerprint import fingerprints
from nrt_jax.checkpoints.store import Checkpoints
from nrt_jax.checkpoints.train_state import TrainState
from nrt_jax.config.checkpoint import CheckpointConfig
from nrt_jax.errors import InputError, RunFailed

LAST = 3


def state(step: int, width: int = 64, optimizer: optax.GradientTransformation | None = None):
    keys = jax.random.split(jax.random.key(step))
    params = {
        "embedding": jax.random.normal(keys[0], (5, width)),
        "layers": {"mlp": jax.random.normal(keys[1], (2, width, 16))},
    }
    opt_state = (optimizer or optax.adam(1e-3)).init(params)
    return TrainState(params, opt_state, jnp.int32(step), jnp.int32(0), jnp.int32(0))


def save(directory: Path, metrics: dict[int, dict], config: CheckpointConfig) -> list[int]:
    """Save each step with its metrics, as one process does; the steps that are kept."""
    checkpoints = Checkpoints(directory, config, writable=True)
    for step, measured in metrics.items():
        checkpoints.save(step, state(step), {"step": step}, measured)
    checkpoints.close()
    return Checkpoints(directory, config, writable=False).steps


def restore(directory: Path, target: TrainState | None = None):
    checkpoints = Checkpoints(directory, CheckpointConfig(), writable=False)
    return checkpoints.restore_newest(state(0) if target is None else target)


@pytest.fixture
def saved(tmp_path) -> Path:
    directory = tmp_path / "checkpoints"
    save(directory, {step: {} for step in range(1, LAST + 1)}, CheckpointConfig(keep_last=LAST))
    return directory


def assert_restored(restored, step: int) -> None:
    assert restored.step == step
    assert restored.progress["step"] == step
    for read, written in zip(
        jax.tree.leaves(restored.state), jax.tree.leaves(state(step)), strict=True
    ):
        assert np.asarray(read).tobytes() == np.asarray(written).tobytes()


def test_state_comes_back_bit_for_bit(saved):
    assert_restored(restore(saved), LAST)


def test_nothing_to_restore(tmp_path):
    assert restore(tmp_path / "none") is None
    assert not (tmp_path / "none").exists()


# --- what is kept ---------------------------------------------------------------------------------


def scores(*values: float) -> dict[int, dict]:
    return {step: {"eval/x": value} for step, value in enumerate(values, start=1)}


@pytest.mark.parametrize(
    ("values", "mode", "kept"),
    [
        ((0.1, 0.9, 0.2, 0.3), "max", [2, 4]),
        ((0.5, 0.9, 0.2, 0.3), "min", [3, 4]),
        ((0.1, 0.2, 0.3, 0.9), "max", [4]),
        ((0.1, float("nan"), 0.05, 0.02), "max", [1, 4]),
    ],
)
def test_keeps_the_newest_and_the_best(tmp_path, values, mode, kept):
    config = CheckpointConfig(keep_last=1, best_metric="eval/x", best_mode=mode)
    assert save(tmp_path, scores(*values), config) == kept


def test_keeps_the_last_ones(tmp_path):
    assert save(tmp_path, scores(9.0, 1.0, 2.0, 3.0, 4.0), CheckpointConfig(keep_last=2)) == [4, 5]


def test_best_is_known_after_a_restart(tmp_path):
    config = CheckpointConfig(keep_last=1, best_metric="eval/x")
    metrics = scores(0.1, 0.9, 0.2, 0.3, 0.4, 0.5)
    save(tmp_path, {step: metrics[step] for step in (1, 2, 3)}, config)
    assert save(tmp_path, {step: metrics[step] for step in (4, 5, 6)}, config) == [2, 6]


def test_checkpoints_without_the_metric_are_never_the_best(tmp_path):
    config = CheckpointConfig(keep_last=1, best_metric="eval/x")
    assert save(tmp_path, {1: {"eval/x": -5.0}, 2: {}, 3: {"y": 1.0}, 4: {}}, config) == [1, 4]


def test_damage_to_an_old_one_does_not_stop_a_restart(saved):
    """Deleting an old checkpoint may have been cut short by a kill."""
    config = CheckpointConfig(keep_last=2, best_metric="eval/x")
    shutil.rmtree(saved / "1" / "progress")
    (saved / "1" / "_CHECKPOINT_METADATA").write_bytes(b"")
    assert save(saved, {4: {"eval/x": 1.0}}, config) == [3, 4]


# --- damage ---------------------------------------------------------------------------------------


def largest_file(directory: Path) -> Path:
    return max((p for p in directory.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


def garble(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    "one bit of the arrays": lambda step: garble(largest_file(step)),
    "half of the arrays": lambda step: truncate(largest_file(step)),
    "no arrays": lambda step: largest_file(step).unlink(),
    "no index of the arrays": lambda step: (step / "state" / "manifest.ocdbt").unlink(),
    "half of the description": lambda step: truncate(step / "state" / "_METADATA"),
    "no description": lambda step: (step / "state" / "_METADATA").unlink(),
    "no state": lambda step: shutil.rmtree(step / "state"),
    "no progress": lambda step: shutil.rmtree(step / "progress"),
    "half of the progress": lambda step: truncate(step / "progress" / "metadata"),
    "nothing": lambda step: [shutil.rmtree(p) for p in step.iterdir() if p.is_dir()],
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_falls_back_to_the_one_before(damage, saved, caplog, capfd):
    DAMAGE[damage](saved / str(LAST))
    with caplog.at_level(logging.WARNING):
        assert_restored(restore(saved), LAST - 1)
    (said,) = caplog.messages
    assert said.startswith(f"checkpoint {LAST} cannot be read, using {LAST - 1}: ")
    assert "\n" not in said
    # Orbax's own threads print tracebacks of the reads that were given up.
    assert capfd.readouterr().err == ""
    assert (saved / str(LAST)).exists()


def test_all_damaged(saved, caplog):
    for step in range(1, LAST + 1):
        truncate(largest_file(saved / str(step)))
    with pytest.raises(InputError, match=r"none of the checkpoints \[1, 2, 3\] can be read") as e:
        restore(saved)
    assert str(saved) in str(e.value)
    assert "\n" not in str(e.value)
    assert caplog.messages == []
    assert sorted(p.name for p in saved.iterdir()) == ["1", "2", "3"]


def test_the_damaged_one_is_written_anew(saved):
    truncate(largest_file(saved / str(LAST)))
    checkpoints = Checkpoints(saved, CheckpointConfig(keep_last=3), writable=True)
    restored = checkpoints.restore_newest(state(0))
    checkpoints.remove_after(restored.step)
    checkpoints.save(LAST, state(LAST), {"step": LAST}, {})
    checkpoints.close()
    assert_restored(restore(saved), LAST)


def test_naming_a_damaged_one(saved):
    truncate(largest_file(saved / "2"))
    checkpoints = Checkpoints(saved, CheckpointConfig(), writable=False)
    with pytest.raises(InputError, match=r"/2: cannot be read .*use another of .*\[1, 2, 3\]"):
        checkpoints.restore(2, state(0))


# --- other models ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (
            state(0, width=4),
            r"/3: params\.embedding: has shape \(5, 64\) in the checkpoint, has shape \(5, 4\) in",
        ),
        (
            state(0, optimizer=optax.sgd(1e-3)),
            r"/3: opt_state\.0\.count: has shape \(\) in the checkpoint, is not in this model",
        ),
        (
            state(0)._replace(params=state(0).params | {"head": jnp.zeros((64, 5))}),
            r"/3: params\.head: is not in the checkpoint, has shape \(64, 5\) in this model",
        ),
        (
            state(0)._replace(params={"layers": state(0).params["layers"]}),
            r"/3: params\.embedding: has shape \(5, 64\) in the checkpoint, is not in this model",
        ),
    ],
    ids=["width", "other optimizer", "extra weight", "missing weight"],
)
def test_other_model(saved, target, message):
    with pytest.raises(InputError, match=message) as error:
        restore(saved, target)
    assert "\n" not in str(error.value)


# --- writing --------------------------------------------------------------------------------------


def test_a_leftover_of_a_killed_save_is_removed_by_a_writer_only(saved):
    left = saved / "4.orbax-checkpoint-tmp"
    shutil.copytree(saved / "3", left)
    reader = Checkpoints(saved, CheckpointConfig(), writable=False)
    assert reader.steps == [1, 2, 3]
    assert left.exists()
    assert save(saved, {4: {}}, CheckpointConfig(keep_last=2)) == [3, 4]
    assert sorted(p.name for p in saved.iterdir()) == ["3", "4"]


def test_a_failed_save_harms_no_older_one(saved, monkeypatch):
    config = CheckpointConfig(keep_last=1)
    checkpoints = Checkpoints(saved, config, writable=True)

    async def full(*_, **__):
        # TensorStore names the file at each of its layers before it says why.
        raise ValueError(f"Error writing {'layer of ' * 50}: No space left on device")

    monkeypatch.setattr(ocp.JsonCheckpointHandler, "async_save", full)
    with pytest.raises(RunFailed, match=r"be written \(Error .* on device\); those") as e:
        checkpoints.save(4, state(4), {"step": 4}, {})
    checkpoints.close()
    assert str(saved) in str(e.value)
    assert_restored(restore(saved), LAST)


# --- fingerprints ---------------------------------------------------------------------------------


def test_fingerprints_tell_every_bit_apart():
    start = state(1)
    then = fingerprints(start)
    embedding = np.asarray(start.params["embedding"]).copy()
    for bit in range(32):
        changed = embedding.copy()
        changed.view(np.uint32)[3, 2] ^= np.uint32(1 << bit)
        now = fingerprints(
            start._replace(params=start.params | {"embedding": jnp.asarray(changed)})
        )
        assert [name for name in now if now[name] != then[name]] == ["params.embedding"]
    swapped = embedding[::-1]
    now = fingerprints(start._replace(params=start.params | {"embedding": jnp.asarray(swapped)}))
    assert now["params.embedding"] != then["params.embedding"]


def test_fingerprints_do_not_depend_on_the_mesh():
    mesh = jax.make_mesh((2, 4), ("a", "b"))
    spread = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "b", "a"))
    start = state(1)
    layers = {"mlp": jax.device_put(start.params["layers"]["mlp"], spread)}
    sharded = start._replace(params=start.params | {"layers": layers})
    name = "params.layers.mlp"
    assert fingerprints(sharded)[name] == fingerprints(start)[name]
