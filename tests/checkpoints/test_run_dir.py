"""A run directory: whose it is, what it says, and what may be changed in it."""

import fcntl
import importlib.metadata
import json
import socket

import jax
import pytest

import nrt_jax
from nrt_jax import distributed
from nrt_jax.checkpoints.inputs import RunInputs
from nrt_jax.checkpoints.run_dir import check_config, describe, how_to_continue, load_run, locked
from nrt_jax.config.load import dump_config, load_config
from nrt_jax.config.run import RunConfig
from nrt_jax.errors import InputError


@pytest.fixture
def config(tmp_path, tiny_config):
    def make(*overrides: str) -> RunConfig:
        run_dir = f"run_dir={tmp_path / 'run'}"
        return load_config(RunConfig, [tiny_config], [run_dir, *overrides])

    return make


def has_trained(config: RunConfig) -> None:
    prepare_locked(config)
    (config.run_dir / "checkpoints" / "2").mkdir(parents=True)


def prepare_locked(config: RunConfig) -> None:
    with locked(config.run_dir):
        check_config(config)
        describe(config, RunInputs({}))


def test_says_what_the_run_is(config):
    prepare_locked(config("seed=7"))
    directory = config().run_dir
    assert load_run(directory) == config("seed=7")
    assert (directory / "config.yaml").read_text("utf-8") == dump_config(config("seed=7"))
    versions = json.loads((directory / "versions.json").read_text("utf-8"))
    assert versions["nrt_jax"] == nrt_jax.__version__
    assert versions["packages"]["jax"] == jax.__version__
    assert len(versions["devices"]) == jax.device_count()
    assert "git_revision" in versions


def test_an_extra_that_is_not_installed_has_no_version(config, monkeypatch):
    version = importlib.metadata.version

    def without_jetstream(name: str) -> str:
        if name == "google-jetstream":
            raise importlib.metadata.PackageNotFoundError(name)
        return version(name)

    monkeypatch.setattr(importlib.metadata, "version", without_jetstream)
    prepare_locked(config())
    packages = json.loads((config().run_dir / "versions.json").read_text("utf-8"))["packages"]
    assert packages["google-jetstream"] is None
    assert packages["jax"] == jax.__version__


@pytest.mark.parametrize(
    "change",
    [
        "checkpoint.every_steps=1",
        "logging.tensorboard=false",
        "compilation.cache=off",
        "data.cache=off",
        "data.read_threads=0",
        "train.max_skipped_updates=3",
        # No schedule depends on the length of this run.
        "train.steps=99",
    ],
)
def test_what_changes_no_weight_may_be_changed(config, change):
    constant = ("optimizer.schedule=constant", "optimizer.warmup_ratio=0")
    has_trained(config(*constant))
    prepare_locked(config(*constant, change))
    assert load_run(config().run_dir) == config(*constant, change)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("seed=3", r"seed is 0 in this run and 3 now"),
        ("train.steps=99", r"train\.steps is 8 in this run and 99 now"),
        ("optimizer.learning_rate=0.5", r"optimizer\.learning_rate is 0\.01 in this run and 0\.5"),
        ("objective.scheme=gm", r"objective\.scheme is 'ws_neg_log_p' in this run and 'gm' now"),
        ("data.chain.digits=4", r"data\.chain\.digits is 3 in this run and 4 now"),
        ("method=sft", r"method is 'nrt' in this run and 'sft' now"),
    ],
)
def test_what_changes_weights_may_not(config, change, said):
    has_trained(config())
    with pytest.raises(InputError, match=rf"/config\.yaml: {said}.*choose another run_dir$"):
        prepare_locked(config(change))
    assert load_run(config().run_dir) == config()


def test_anything_may_be_changed_before_the_first_checkpoint(config):
    prepare_locked(config())
    prepare_locked(config("seed=3", "train.micro_batch_prompts=2"))
    assert load_run(config().run_dir).seed == 3


def test_leftovers_of_a_start_that_was_killed(config):
    directory = config().run_dir
    directory.mkdir()
    for name in ("lock", "config.yaml.part"):
        (directory / name).write_text("half")
    (directory / "checkpoints").mkdir()
    prepare_locked(config())
    files = ["checkpoints", "config.yaml", "inputs.json", "lock", "versions.json"]
    assert sorted(p.name for p in directory.iterdir()) == files


def test_checkpoints_without_their_config_are_left_alone(config):
    saved = config().run_dir / "checkpoints" / "2"
    saved.mkdir(parents=True)
    with pytest.raises(InputError, match=r"/run: holds checkpoints but no config\.yaml"):
        prepare_locked(config())
    assert saved.exists()


def test_says_how_a_run_continues(config):
    directory = config().run_dir
    assert how_to_continue(directory) == (
        "nothing is saved yet, and the same command starts the run anew"
    )
    (directory / "checkpoints" / "4").mkdir(parents=True)
    (directory / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    assert how_to_continue(directory) == "the same command continues the run from step 4"


def test_paths_are_compared_by_what_they_lead_to(config, tmp_path):
    has_trained(config())
    prepare_locked(config(f"data.tokenizer={tmp_path}", f"model.path={tmp_path}"))


def test_other_files_are_left_alone(config):
    directory = config().run_dir
    directory.mkdir()
    (directory / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match=r"run_dir .*/run: holds thesis\.tex but no config\.yaml"):
        prepare_locked(config())
    assert [p.name for p in directory.iterdir()] == ["thesis.tex"]


def test_one_process_at_a_time(config):
    directory = config().run_dir
    with locked(directory):
        with pytest.raises(InputError, match=r"run_dir .*/run: another process trains in it"):
            prepare_locked(config())
        assert not (directory / "config.yaml").exists()
    prepare_locked(config())


def test_a_directory_that_another_process_does_not_see(config, monkeypatch):
    directory = config().run_dir
    monkeypatch.setattr(distributed, "from_first", lambda what, name: f"not {name}")
    with pytest.raises(InputError) as error, locked(directory):
        pass
    assert str(error.value) == (
        f"run_dir {directory}: process 0 on {socket.gethostname()} does not see what process "
        "0 writes there; name a directory that all hosts share"
    )


def test_the_logs_of_other_processes_are_no_foreign_files(config):
    directory = config().run_dir
    directory.mkdir()
    (directory / "log.3.txt").touch()
    with locked(directory):
        pass
    (directory / "log.txt").touch()
    with pytest.raises(InputError, match=r"holds log.txt but no"), locked(directory):
        pass


def test_the_lock_is_the_systems(config):
    """It ends with the process however that ends: the file alone locks nothing."""
    lock = config().run_dir / "lock"
    with locked(config().run_dir), lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    with locked(config().run_dir):
        pass


@pytest.mark.parametrize("under", ["file", "file/run"])
def test_no_directory_there(tmp_path, config, under):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=rf"run_dir .*/{under}: .*; choose a directory that you"):
        prepare_locked(config(f"run_dir={tmp_path / under}"))


def test_no_run(tmp_path):
    with pytest.raises(InputError, match=r"no config\.yaml in it; name the directory of a run"):
        load_run(tmp_path)
